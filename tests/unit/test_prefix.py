"""Passes that skip what lies before a hook against whole passes, in six families; and models that can't be skipped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from midiscover.config import ModelConfig
from midiscover.lm import LanguageModel
from midiscover.models import resolve_model
from midiscover.prefix import Prefix, blocks_before
from tests.tiny import KINDS, MLP_OUTPUT, Kind, make_tiny_model


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, str]]:
    """A model and a hook in its last block but one of four."""
    kind: Kind = request.param
    folder = make_tiny_model(kind, tmp_path_factory.mktemp("models") / kind, layers=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIDISCOVER_HOME", str(folder.parent))
        identity = resolve_model(ModelConfig(id=str(folder)))
        attention = "eager" if kind == "gemma2" else "sdpa"
        yield LanguageModel.load(identity, dtype="float32", attention=attention), MLP_OUTPUT[kind].format(2)


def ids_for(lm: LanguageModel, seed: int = 1) -> Tensor:
    return torch.randint(lm.vocab_size, (2, 17), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("side", ["", ":in"])
def test_skipped_passes_are_the_whole_ones(case: tuple[LanguageModel, str], side: str) -> None:
    lm, hook = case
    ran: list[int] = []
    blocks = blocks_before(lm.model, [hook + side])
    assert len(blocks) == 2
    inner = [next(part for part in block.modules() if isinstance(part, nn.LayerNorm) or "Norm" in type(part).__name__)
             for block in blocks]  # fmt: skip
    handles = [part.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, part in enumerate(inner)]
    prefix = Prefix(lm.model, [hook + side])
    for seed in (1, 2):
        ids, mask = ids_for(lm, seed), torch.ones(2, 17, dtype=torch.long)
        mask[1, 11:] = 0
        edit = {hook + side: torch.zeros_like}
        whole = lm.logits(ids, attention_mask=mask, replace=edit)
        ran.clear()
        with prefix.kept():
            clean = lm.logits(ids, attention_mask=mask)
        assert sorted(set(ran)) == [0, 1]
        prefix.check(lambda ids=ids, mask=mask: lm.logits(ids, attention_mask=mask), clean)
        assert prefix.blocks
        ran.clear()
        with prefix.skipped():
            for _ in range(2):
                assert torch.equal(lm.logits(ids, attention_mask=mask, replace=edit), whole)
        assert not ran, "nothing inside the two blocks was run"
        assert not torch.equal(clean, whole)
    for handle in handles:
        handle.remove()
    assert all("forward" not in block.__dict__ for block in blocks)


def test_several_hooks_skip_what_lies_before_the_first(case: tuple[LanguageModel, str]) -> None:
    lm, hook = case
    earlier, later = hook.replace("2", "1"), hook.replace("2", "3")
    assert [len(blocks_before(lm.model, hooks)) for hooks in ([later], [hook, later], [later, earlier])] == [3, 2, 1]
    assert blocks_before(lm.model, [hook.replace("2", "0")]) == []
    embeddings = next(name for name, part in lm.model.named_modules() if isinstance(part, nn.Embedding))
    assert blocks_before(lm.model, [embeddings]) == blocks_before(lm.model, [embeddings, hook]) == []
    with Prefix(lm.model, [embeddings]).kept():
        lm.logits(ids_for(lm))


class Sharing(nn.Module):
    """Whose end reads what the first block's own code leaves elsewhere; `missing`: and fails where it is not there."""

    def __init__(self, *, missing: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Leaving(), nn.Identity(), nn.Linear(4, 4)])
        self.missing = missing

    def forward(self, x: Tensor) -> Tensor:
        left = self.blocks[0].left = {}
        for block in self.blocks:
            x = block(x)
        return x + (left["sum"] if self.missing else left.get("sum", 0))


class Leaving(nn.Module):
    """The block that does."""

    left: dict[str, Tensor]

    def forward(self, x: Tensor) -> Tensor:
        self.left["sum"] = x.sum()
        return x


@pytest.mark.parametrize("missing", [False, True])
def test_a_model_whose_blocks_share_more_is_run_whole(missing: bool) -> None:
    model, x = Sharing(missing=missing), torch.randn(2, 3, 4)
    prefix = Prefix(model, ["blocks.2"])
    with prefix.kept():
        whole = model(x)
    prefix.check(lambda: model(x), whole)
    assert prefix.blocks == []
    with prefix.skipped():
        assert torch.equal(model(x), whole)


def test_a_block_that_writes_into_its_input_spoils_nothing() -> None:
    class Adding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1)

    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(4, 4), Adding()])
    run = lambda x: model.blocks[1](model.blocks[0](x))  # noqa: E731
    prefix = Prefix(model, ["blocks.1"])
    with torch.inference_mode(), prefix.kept():
        whole = run(torch.ones(2, 4)).clone()
    with torch.inference_mode(), prefix.skipped():
        assert torch.equal(run(torch.ones(2, 4)), whole)
        assert torch.equal(run(torch.ones(2, 4)), whole)
