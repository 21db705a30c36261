"""A text of YAML as settings are written, read into plain data; what is wrong with one that can't be read; and
a value as such a text."""

from __future__ import annotations

import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but `1e-3` is a number and a key may not stand twice."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # a date that no calendar has; PyYAML lets it through
            problem = f"'{node.value}' can't be read: {error}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key '{twice}' stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_yaml(text: str) -> Any:
    """The data of a YAML text; yaml.YAMLError where it is none."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506  a SafeLoader subclass


def in_a_list(value: Any) -> str:
    """The list of this one value, in a line: `[0.5]`, `[null]`, `[[1, 2]]`."""
    return yaml.safe_dump([value], default_flow_style=True, width=float("inf")).strip()


def yaml_problem(error: Exception) -> str:
    """What an error of `load_yaml` says, with the line where it knows it; for the middle of a sentence."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{problem}, line {mark.line + 1}" if mark else str(problem)
