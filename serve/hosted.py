"""One SAE that a deployment hosts: what of its record is read, and under which names it goes. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from midiscover.errors import UserError
from midiscover.frontier import is_control
from midiscover.publish.names import model_id, source_id, source_set


@dataclass(frozen=True, kw_only=True, slots=True)
class Hosted:
    """One SAE."""

    id: str
    record: Mapping[str, Any]
    is_promoted: bool
    by_id: bool = False
    """Whether its id is its source, as another one has what Neuronpedia would call it."""

    @property
    def model(self) -> tuple[str, str]:
        """Digest of the language model, and whether its weights were shuffled."""
        model = self.record["lineage"]["model"]
        return model["digest"], model.get("weights", "trained")

    @property
    def model_name(self) -> str:
        """Of the language model, as its maker calls it."""
        return self.record["lineage"]["model"]["name"]

    @property
    def neuronpedia_model(self) -> str:
        """What Neuronpedia would call its model; made of the digest where the name holds nothing to make one of."""
        try:
            return model_id(self.model_name)
        except UserError:
            return f"model-{self.model[0][:8]}"

    @property
    def set(self) -> str:
        """What Neuronpedia would call its source set."""
        return source_set(self.record)

    @property
    def source(self) -> str:
        """Its name for Neuronpedia's clients, which no other SAE of its model has here."""
        return self.id if self.by_id else self.usual_source

    @property
    def usual_source(self) -> str:
        """What Neuronpedia would call it."""
        return source_id(self.record, self.set)

    def summary(self) -> dict[str, Any]:
        """For listings."""
        record = self.record
        names = ("id", "hook", "output_hook", "layer", "kind", "d_in", "d_sae", "created", "metrics")
        return {name: record.get(name) for name in names} | {
            "model": self.model_name,
            "promoted": self.is_promoted,
            "neuronpedia": {"modelId": self.neuronpedia_model, "source": self.source},
        }


def require_record(record: Mapping[str, Any], name: str) -> None:
    """Any exception where a record.json, which somebody else may have written, lacks or garbles what a deployment reads
    of it."""
    json.dumps(record, allow_nan=False)  # as answers are written
    hosted = Hosted(id=name, record=record, is_promoted=False)
    _ = hosted.model, hosted.source, is_control(record["sae"]), hosted.summary()
    for key, kind in (("hook", str), ("d_in", int), ("d_sae", int), ("metrics", Mapping)):
        if not isinstance(record[key], kind) or isinstance(record[key], bool):
            raise TypeError(f"its {key} is {record[key]!r}")
    for key in ("fvu", "l0"):
        value = record["metrics"].get(key)
        if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool)):
            raise TypeError(f"its {key} is {value!r}")


def told_apart(hosted: Mapping[str, Hosted]) -> dict[str, Hosted]:
    """Those of one source by their ids, but for one that alone of them is promoted.

    A source says neither which of a layer's hooks is read nor how the SAE was trained, and whoever steers by its
    features must know.
    """
    namesakes: dict[tuple[str, str], list[Hosted]] = {}
    for one in hosted.values():
        namesakes.setdefault((one.neuronpedia_model, one.usual_source), []).append(one)
    found = dict(hosted)
    for group in namesakes.values():
        chosen = [one for one in group if one.is_promoted] or group
        by_id = group if len(chosen) > 1 else [one for one in group if one is not chosen[0]]
        found |= {one.id: replace(one, by_id=True) for one in by_id}
    return found
