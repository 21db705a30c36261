"""A pack is cut into as few parts as fit, in order; the reckoning against sums written out; memory that ends anyway."""

from __future__ import annotations

import itertools
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from jobs.halving import in_parts, room_of_card
from midiscover.config import ModelConfig
from midiscover.configio import load_config
from midiscover.errors import ModelError
from midiscover.lm import LanguageModel
from midiscover.memory import FIXED_BYTES, Sizes, fit_together, measuring_bytes, training_bytes
from midiscover.models import resolve_model
from midiscover.resolve import resolve
from midiscover.sae import replay
from tests.runs import write_run
from tests.tiny import make_tiny_model


def test_the_reckoning_written_out() -> None:
    """phi-2's width and 20,480 features: two weights of d_in x d_sae and their biases, four float32 copies of each."""
    sae = Sizes(2560, 20480, 2560, 4096)
    kept = 4 * 4 * (2 * 2560 * 20480 + 2 * 20480)
    step = 4 * 4096 * (6 * 20480 + 8 * 5120)
    assert training_bytes([sae]) == FIXED_BYTES + kept + step
    assert training_bytes([sae] * 5) == FIXED_BYTES + 5 * kept + step
    assert training_bytes([]) == FIXED_BYTES
    weights, table = 4 * 2 * 2560 * 20480, 4 * 4096 * (6 * 20480 + 8 * 5120)
    assert measuring_bytes([sae._replace(batch_size=64)] * 3) == 3 * weights + table, "4,096 rows, whatever the batch"


def test_a_skip_connection_counts(tmp_path: Path) -> None:
    """W_skip, [d_out, d_in]: 24 x 24 numbers of the tiny model."""
    hook = {"hooks": ["model.layers.0.mlp:in"]}
    kinds = {"sae.kind": ["transcoder", "skip_transcoder"]}
    plain, skip = resolve(load_config(write_run(tmp_path, harvest=hook, grid=kinds))).saes
    assert skip.d_in == skip.d_out == 24
    assert skip.sizes.kept_bytes - plain.sizes.kept_bytes == 4 * 4 * 24 * 24


@pytest.mark.parametrize("widths", [(64,), (64, 64, 64), (64, 512, 64, 64), (512, 512), (64, 128, 256, 512, 1024)])
@pytest.mark.parametrize("room", [1, 300, 700, 10_000])
def test_parts_are_in_order_fit_and_are_as_few_as_can_be(widths: tuple[int, ...], room: int) -> None:
    saes = [Sizes(32, width, 32, 16) for width in widths]
    limit = training_bytes([Sizes(32, room, 32, 16)])
    parts = fit_together(saes, limit)
    assert [i for part in parts for i in part] == list(range(len(saes)))
    for part in parts:
        assert len(part) == 1 or training_bytes([saes[i] for i in part]) <= limit

    def fits(cuts: tuple[int, ...]) -> bool:
        edges = [0, *cuts, len(saes)]
        pieces = [saes[a:b] for a, b in itertools.pairwise(edges)]
        return all(len(piece) == 1 or training_bytes(piece) <= limit for piece in pieces)

    fewest = min(
        n + 1 for n in range(len(saes)) for cuts in itertools.combinations(range(1, len(saes)), n) if fits(cuts)
    )
    assert len(parts) == fewest


class Card:
    """A pretended card of 100 bytes, of which PyTorch keeps what is freed, as it does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.used = self.kept = 0
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 - self.used - self.kept - self.pool, 100))
        monkeypatch.setattr(torch.cuda, "empty_cache", self.empty)
        monkeypatch.setattr(replay, "_keepers", {0: "a graph"})
        self.pool = 20

    def empty(self) -> None:
        self.kept, self.pool = 0, self.pool if replay._keepers else 0

    def train(self) -> None:
        """Allocates 60 bytes, which a circle of objects holds when it is over."""
        slot: Any = type("Slot", (), {})()
        slot.itself = slot
        weakref.finalize(slot, self.free)
        self.used += 60

    def free(self) -> None:
        self.used, self.kept = self.used - 60, self.kept + 60


def test_what_the_crew_before_took_is_room_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its SAEs, what PyTorch keeps of them, and the pool of its recordings."""
    card = Card(monkeypatch)
    card.train()
    assert torch.cuda.mem_get_info() == (20, 100)
    assert room_of_card(1.0) == 95
    assert room_of_card(0.5) == 47


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA` to enable assertions."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=str)
def test_memory_that_ran_out_is_known_in_whatever_words(error: Exception) -> None:
    sizes: list[int] = []

    def work(part: list[int]) -> None:
        sizes.append(len(part))
        if len(part) > 1:
            raise error

    in_parts([[1, 2, 3]], work)
    assert sizes == [3, 1, 2, 1, 1]


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        ValueError("out of memory is no error of a card here"),
    ],
    ids=str,
)
def test_what_is_no_lack_of_memory_is_not_tried_in_halves(error: Exception) -> None:
    sizes: list[int] = []

    def work(part: list[int]) -> None:
        sizes.append(len(part))
        raise error

    with pytest.raises(type(error), match=str(error)[:10]):
        in_parts([[1, 2]], work)
    assert sizes == [2]


def test_halves_have_the_room_of_what_was_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    card, found = Card(monkeypatch), list[int]()

    def work(part: list[int]) -> None:
        found.append(torch.cuda.mem_get_info()[0])
        if len(part) > 1:
            card.train()
            raise torch.OutOfMemoryError("CUDA out of memory.")

    in_parts([[1, 2]], work)
    assert found == [80, 100, 100]


SETTINGS = r"in the settings of a run, .*resources\.gpus_per_model, or give model\.dtype"


@pytest.mark.parametrize(
    ("where", "way"),
    [
        ("read", r" there is; free some, or, "),
        ("moved", r" there is \(1\.5 of 3\.0 GiB of the card are not held by other processes\); free the card, or, "),
        ("nowhere", r" there is; free the card, or, "),
    ],
)
def test_a_model_that_is_too_large_is_wrong_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, way: str
) -> None:
    """No error that another try would mend; on a card, pretended here, that others may hold whole."""
    config = ModelConfig(id=str(make_tiny_model("phi", tmp_path / "phi")))
    full = torch.AcceleratorError("CUDA error: out of memory") if where == "read" else torch.OutOfMemoryError("CUDA")

    def fails(*_: Any, **__: Any) -> None:
        raise full

    if where == "read":
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fails)
    else:
        monkeypatch.setattr(transformers.PreTrainedModel, "to", fails)

    def asked(_: torch.device) -> tuple[int, int]:
        if where == "nowhere":
            raise full
        return 2**30, 3 * 2**30

    monkeypatch.setattr(torch.cuda, "mem_get_info", asked)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2**29)
    with pytest.raises(ModelError, match="does not fit into the memory" + way + SETTINGS):
        LanguageModel.load(resolve_model(config), dtype="float32", device="cuda")


def test_a_card_that_fails_while_a_model_is_loaded_is_no_wrong_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(id=str(make_tiny_model("phi", tmp_path / "phi")))

    def fails(*_: Any) -> None:
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")

    monkeypatch.setattr(transformers.PreTrainedModel, "to", fails)
    with pytest.raises(torch.AcceleratorError, match="ECC"):
        LanguageModel.load(resolve_model(config), dtype="float32")
