"""The harvest against a plain loop over the model: the same rows, the same masks, and nothing twice."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from midiscover import reading
from midiscover.config import CorpusConfig, HarvestConfig, ModelConfig
from midiscover.corpus import Corpus, build_corpus
from midiscover.errors import StageError
from midiscover.harvest import Harvester, HarvestJob
from midiscover.lm import LanguageModel
from midiscover.models import resolve_model
from midiscover.reading import Computed, position_mask, row_mask
from midiscover.store.blocks import Mask, block_plan, committed, read_block, read_tokens
from midiscover.store.storage import Storage, open_store
from midiscover.texts import resolve_source
from tests.tiny import make_tiny_model

CONTEXT = 16
HOOKS = {"transformer.h.0.mlp": 24, "transformer.h.1.mlp.c_fc:in": 24}
CONFIG = HarvestConfig(hooks=tuple(HOOKS), block_tokens=5 * CONTEXT, batch_tokens=2 * CONTEXT)
ID = "h.0000000000"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = make_tiny_model("gpt2", tmp_path_factory.mktemp("model") / "gpt2")
    return LanguageModel.load(resolve_model(ModelConfig(id=str(folder))), dtype="float32")


@pytest.fixture
def corpus(tmp_path: Path, model: LanguageModel) -> Corpus:
    return tiny_corpus(tmp_path, model, open_store(str(tmp_path / "store")))


def tiny_corpus(folder: Path, model: LanguageModel, storage: Storage) -> Corpus:
    text = folder / "text.jsonl"
    lines = [f'{{"text": "Document {i} speaks of {"rivers and " * (i % 7)} the number {i * i}."}}' for i in range(60)]
    text.write_text("\n".join(lines))
    config = CorpusConfig(source=str(text), context_size=CONTEXT, held_out=0.2)
    build_corpus(config, resolve_source(config), model.tokenizer, storage, "c.0", lineage={}, progress=lambda _n: None)
    return Corpus.open(storage, "c.0")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_store(str(tmp_path / "store"))


def harvester(model: LanguageModel, corpus: Corpus, storage: Storage, config: HarvestConfig = CONFIG) -> Harvester:
    return Harvester(HarvestJob(harvest_id=ID, hooks=HOOKS, config=config), model, corpus, storage)


def plan(corpus: Corpus) -> tuple:
    windows = corpus.manifest.windows
    return block_plan(windows["train"], windows["held_out"], context_size=CONTEXT, block_tokens=CONFIG.block_tokens)


@pytest.fixture
def calls(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Windows of each forward pass."""
    seen: list[int] = []
    original = model.activations

    def counted(ids: Tensor, hooks: list[str], attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        seen.append(len(ids))
        return original(ids, hooks, attention_mask)

    monkeypatch.setattr(model, "activations", counted)
    return seen


def test_blocks_hold_what_a_plain_forward_pass_gives(model: LanguageModel, corpus: Corpus, storage: Storage) -> None:
    spans = plan(corpus)
    rows = dict(harvester(model, corpus, storage).run([(span, list(HOOKS)) for span in spans]))
    assert set(rows) == set(spans)
    seen: dict[str, Tensor] = {}
    model.model.transformer.h[0].mlp.register_forward_hook(lambda _m, _i, out: seen.update(out=out))
    model.model.transformer.h[1].mlp.c_fc.register_forward_hook(lambda _m, args, _o: seen.update(inp=args[0]))
    for span in spans:
        ids, _doc = corpus.windows(span.start_window, span.stop_window)
        with torch.inference_mode():
            model.model(torch.from_numpy(ids).long())
        for hook, plain in zip(HOOKS, (seen["out"], seen["inp"]), strict=True):
            block = read_block(storage, ID, hook, rows[span][hook])
            usable = block.mask == Mask.USABLE
            expected = plain.flatten(0, 1)
            assert torch.allclose(block.acts[usable].float(), expected[usable], rtol=1e-2, atol=1e-3)
            assert torch.allclose(block.norm[usable], expected[usable].norm(dim=1), rtol=1e-4)
            assert bool((block.mask.view(-1, CONTEXT)[:, 0] != Mask.USABLE).all())
        tokens = read_tokens(storage, ID, committed(storage, ID, "tokens")[span.index])
        assert tokens.token_id.tolist() == ids.flatten().tolist()
        assert tokens.position.tolist() == list(range(CONTEXT)) * len(ids)


def test_a_further_hook_harvests_only_itself_and_a_finished_block_nothing(
    model: LanguageModel, corpus: Corpus, storage: Storage, calls: list[int]
) -> None:
    spans = plan(corpus)
    first, second = HOOKS
    list(harvester(model, corpus, storage).run([(span, [first]) for span in spans]))
    before = {key: storage.read(key) for key in storage.list(f"activations/{ID}")}
    list(harvester(model, corpus, storage).run([(span, [second]) for span in spans]))
    after = {key: storage.read(key) for key in storage.list(f"activations/{ID}")}
    assert before.items() <= after.items()
    assert len(committed(storage, ID, second)) == len(spans)
    assert sum(calls) == 2 * corpus.manifest.n_windows


def test_two_harvests_are_equal_byte_for_byte(model: LanguageModel, tmp_path: Path) -> None:
    stores = [open_store(str(tmp_path / name)) for name in ("one", "two")]
    for storage in stores:
        corpus = tiny_corpus(tmp_path, model, storage)
        list(harvester(model, corpus, storage).run([(span, list(HOOKS)) for span in plan(corpus)]))
    one, two = ({key: s.read(key) for key in s.list("activations")} for s in stores)
    assert one == two


def test_on_a_gpu_threads_take_turns_more_often_while_it_runs(
    model: LanguageModel, corpus: Corpus, storage: Storage
) -> None:
    before, seen = sys.getswitchinterval(), []
    one = harvester(model, corpus, storage)
    one.on_gpu = True
    for _ in one.run([(span, list(HOOKS)) for span in plan(corpus)]):
        seen.append(sys.getswitchinterval())
    assert seen == [pytest.approx(before / 10)] * len(plan(corpus))
    assert sys.getswitchinterval() == before


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("CUDA error: out of memory")]
)
def test_the_batch_is_halved_when_memory_ends(
    model: LanguageModel, corpus: Corpus, storage: Storage, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    original, sizes = model.activations, []

    def limited(ids: Tensor, hooks: list[str], attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        sizes.append(len(ids))
        if len(ids) > 2:
            raise error
        return original(ids, hooks, attention_mask)

    monkeypatch.setattr(model, "activations", limited)
    config = HarvestConfig(hooks=CONFIG.hooks, block_tokens=CONFIG.block_tokens, batch_tokens=8 * CONTEXT)
    spans = plan(corpus)
    list(harvester(model, corpus, storage, config).run([(span, list(HOOKS)) for span in spans]))
    assert max(sizes) > 2  # it did run out of memory
    assert len(committed(storage, ID, CONFIG.hooks[0])) == len(spans)
    monkeypatch.setattr(model, "activations", lambda *_a, **_k: (_ for _ in ()).throw(RuntimeError("another error")))
    with pytest.raises(RuntimeError, match="another error"):
        list(harvester(model, corpus, storage).run([(spans[0], list(HOOKS))]))


def test_what_a_pass_that_was_too_much_held_is_free_when_the_card_gets_it_back(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card that is pretended from the error on, whose traceback holds the pass's activations."""
    held: list[weakref.ref[Tensor]] = []
    freed: list[bool] = []

    def too_much(*_: Any, **__: Any) -> None:
        activations = torch.ones(2)
        held.append(weakref.ref(activations))
        one.device = torch.device("cuda")
        raise torch.OutOfMemoryError("CUDA out of memory")

    one = SimpleNamespace(device=torch.device("cpu"), tokenizer=model.tokenizer, activations=too_much)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(held[-1]() is None))
    reader = reading.Reader(one, HOOKS, CONFIG, CONTEXT)  # type: ignore[arg-type]  # a stand-in
    windows = torch.zeros(2, CONTEXT, dtype=torch.int32)
    assert reader._forward(windows, windows, 0, {}, {}) == 0
    assert reader.batch_windows == 1
    assert freed == [True]


def test_non_finite_activations_end_the_harvest_with_their_place(
    model: LanguageModel, corpus: Corpus, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = model.activations

    def broken(ids: Tensor, hooks: list[str], attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        out = {hook: value.clone() for hook, value in original(ids, hooks, attention_mask).items()}
        with torch.inference_mode():
            for value in out.values():
                value[:, 3] = float("nan")
        return out

    monkeypatch.setattr(model, "activations", broken)
    with pytest.raises(StageError, match=r"transformer\.h\.0\.mlp.* first at position 3 of window 0"):
        list(harvester(model, corpus, storage).run([(plan(corpus)[0], list(HOOKS))]))
    assert committed(storage, ID, CONFIG.hooks[0]) == {}


def test_position_masks_follow_from_the_tokens() -> None:
    ids = torch.tensor([[5, 1, 9, 9], [7, 2, 3, 4]], dtype=torch.int32)
    doc = torch.tensor([[0, 0, -1, -1], [-2, 1, 1, 1]], dtype=torch.int32)
    special = torch.tensor([1], dtype=torch.int32)
    found = position_mask(ids, doc, special, mask_first=True)
    assert found.tolist() == [[1, 1, 2, 2], [1, 0, 0, 0]]
    assert position_mask(ids, doc, special, mask_first=False).tolist() == [[0, 1, 2, 2], [0, 0, 0, 0]]


def test_row_masks_name_outliers_and_non_finite_rows() -> None:
    codes = torch.tensor([0, 0, 0, 0, 0, Mask.SPECIAL, Mask.PADDING], dtype=torch.uint8)
    norm = torch.tensor([1.0, 1.1, 0.9, 50.0, float("nan"), 99.0, float("inf")])
    expected = [Mask.USABLE] * 3 + [Mask.OUTLIER, Mask.NONFINITE, Mask.SPECIAL, Mask.PADDING]
    assert row_mask(codes, norm, 10).tolist() == expected
    assert row_mask(codes, norm, 100).tolist()[3] == Mask.USABLE
    assert row_mask(torch.tensor([2], dtype=torch.uint8), torch.tensor([1.0]), 10).tolist() == [Mask.PADDING]


def test_writers_have_as_many_streams_as_work_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many hooks and spans there are: PyTorch keeps memory for each stream by itself."""
    made: list[Any] = []

    def stream() -> Any:
        made.append(SimpleNamespace(waited=[]))
        made[-1].wait_event = made[-1].waited.append
        return made[-1]

    monkeypatch.setattr(reading, "_idle", [])
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    at_once = threading.Barrier(3)

    def write(span: int) -> None:
        computed: Any = Computed(torch.empty(0), torch.empty(0), {}, {}, span)  # type: ignore[arg-type]  # its event
        with computed.beside():
            at_once.wait(60)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(12)))
    assert len(made) == 3
    assert sorted(span for one in made for span in one.waited) == list(range(12))
