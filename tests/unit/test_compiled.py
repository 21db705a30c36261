"""Compiled attention against the modules as transformers writes them; with Dynamo, but without a device's compiler."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from midiscover.compiled import CompiledAttention, attention_paths
from midiscover.config import HarvestConfig, ModelConfig
from midiscover.lm import LanguageModel
from midiscover.models import resolve_model
from midiscover.reading import Reader
from tests.tiny import KINDS, Kind, make_tiny_model


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, Any]:
    """A compiled model, and the same as it is."""
    kind: Kind = request.param
    folder = make_tiny_model(kind, tmp_path_factory.mktemp("models") / kind)
    attention = "eager" if kind == "gemma2" else "sdpa"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIDISCOVER_HOME", str(folder.parent))
        identity = resolve_model(ModelConfig(id=str(folder)))
        lm, plain = (LanguageModel.load(identity, dtype="float32", attention=attention) for _ in range(2))
    torch._dynamo.reset()
    lm.compiled = CompiledAttention(lm.model, partial(torch.compile, backend="eager"))
    return lm, plain


def ids_for(lm: LanguageModel) -> Tensor:
    return torch.randint(lm.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))


def inner_linear(lm: LanguageModel, path: str) -> str:
    """The first linear layer inside a module."""
    module = lm.model.get_submodule(path)
    return next(f"{path}.{name}" for name, part in module.named_modules() if getattr(part, "weight", None) is not None)


def test_activations_and_edits_are_those_of_the_model_as_written(pair: tuple[LanguageModel, LanguageModel]) -> None:
    lm, plain = pair
    assert lm.compiled is not None
    paths = lm.compiled.paths
    assert len(paths) == lm.model.config.num_hidden_layers
    ids, inside, last = ids_for(lm), inner_linear(lm, paths[1]), paths[-1]
    for hooks in ([last, f"{last}:in"], [inside, f"{inside}:in", last], [last]):
        found, expected = lm.activations(ids, hooks), plain.activations(ids, hooks)
        for hook in hooks:
            torch.testing.assert_close(found[hook], expected[hook])
    for hook in (last, inside):
        edit = {hook: torch.zeros_like}
        torch.testing.assert_close(lm.logits(ids, replace=edit), plain.logits(ids, replace=edit))
        assert not torch.allclose(lm.logits(ids, replace=edit), lm.logits(ids))


def test_what_is_compiled_was_run_compiled(pair: tuple[LanguageModel, LanguageModel]) -> None:
    lm, _ = pair
    calls = []

    def compiler(written: Any, *, dynamic: bool) -> Any:
        assert dynamic
        return lambda *args, **kwargs: (calls.append(written), written(*args, **kwargs))[1]

    again = LanguageModel.load(lm.identity, dtype="float32", attention=lm.model.config._attn_implementation)
    again.compiled = CompiledAttention(again.model, compiler)
    paths = again.compiled.paths
    again.activations(ids_for(again), [paths[-1]])
    assert len(calls) == len(paths)
    again.activations(ids_for(again), [inner_linear(again, paths[0])])
    assert len(calls) == len(paths), "the hook's own module ran as it is written, and the pass ended there"


def test_a_model_that_cannot_be_compiled_runs_as_written(
    pair: tuple[LanguageModel, LanguageModel], caplog: pytest.LogCaptureFixture
) -> None:
    lm, plain = pair
    tried = 0

    def refuse(_graph: Any, _inputs: Any) -> Any:
        nonlocal tried
        tried += 1
        raise RuntimeError("no compiler here")

    torch._dynamo.reset()
    again = LanguageModel.load(lm.identity, dtype="float32", attention=lm.model.config._attn_implementation)
    again.compiled = CompiledAttention(again.model, partial(torch.compile, backend=refuse))
    ids, hook = ids_for(again), again.compiled.paths[-1]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(again.activations(ids, [hook]), plain.activations(ids, [hook]))
    assert tried == 1
    assert "attention is not compiled: backend='refuse' raised: RuntimeError: no compiler here" in caplog.text


def test_attention_inside_attention_is_part_of_it() -> None:
    class SelfAttention(torch.nn.Module):
        pass

    class LayerAttention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = SelfAttention()

    assert attention_paths(torch.nn.ModuleDict({"a": LayerAttention(), "b": SelfAttention()})) == ["a", "b"]


def test_it_is_asked_for_where_much_is_to_be_read(pair: tuple[LanguageModel, Any], tmp_path: Path) -> None:
    _, plain = pair
    asked = []
    plain.compile = lambda: asked.append(tmp_path)
    for ahead, times in ((0, 0), (7_999_999, 0), (8_000_000, 1)):
        Reader(plain, {"hook": 8}, HarvestConfig(), 16, ahead=ahead)
        assert len(asked) == times
    del plain.compile
    plain.compile()
    assert plain.compiled is None, "a CPU's numbers stay as they are"
