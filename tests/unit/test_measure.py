"""What the tasks of one site write, without a Ray: metrics of a standard SAE, a transcoder and a random-model control,
and the parts of feature records."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from jobs import evaluation, features
from jobs.board import MAX_DEATHS, Event
from jobs.evaluation import FOREIGN, NO_SPLICE, _foreign_text, _parts, measure_site, splice_passes
from jobs.harvest import ModelPlace, commit_manifests, missing_spans, model_place, plan_of
from jobs.runtime import Slots
from midiscover.config import FeaturesConfig
from midiscover.configio import load_config
from midiscover.corpus import Corpus, CorpusManifest, build_corpus
from midiscover.errors import CorpusError, CorruptError, ModelError, StageError
from midiscover.foreign import foreign_rows
from midiscover.harvest import Harvester, HarvestJob
from midiscover.lm import LanguageModel, load_tokenizer
from midiscover.memory import MEASURED_ROWS
from midiscover.reading import Reader
from midiscover.resolve import PlannedSae, Resolved, Site, by_site, resolve
from midiscover.sae.base import Sae
from midiscover.saes import SPARSITY, WEIGHTS, load_trained, write_trained
from midiscover.source import harvested, open_source
from midiscover.store import layout
from midiscover.store.blocks import read_block
from midiscover.store.documents import read_json
from midiscover.store.storage import Storage, open_store
from midiscover.train import Member, Trained, train
from tests.boards import LocalBoard
from tests.runs import write_run
from tests.workers import MemoryWorker

HOOK = "model.layers.0.mlp:in"
GRID = [{"sae.kind": ["standard", "transcoder"]}, {"sae.control": ["random_model"]}]
EVALUATE = {"ce_tokens": 256, "foreign_source": "builtin-code", "foreign_tokens": 700}
SLOTS = Slots(count=1, cpus=1, gpus=0, threads=1)


class Killed(BaseException):
    """The process died."""


def harvest(part: Resolved, manifest: CorpusManifest, storage: Storage) -> None:
    job = HarvestJob(harvest_id=part.harvest_id, hooks=part.hooks, config=part.config.harvest)
    harvester = Harvester(job, model_place(part, SLOTS).load(), Corpus(storage, manifest), storage)
    list(harvester.run([(span, list(part.hooks)) for span in plan_of(part, manifest)]))
    commit_manifests(part, manifest, storage)


def made(folder: Path, evaluate: dict[str, Any], grid: Any = GRID) -> tuple[Resolved, Storage]:
    """Corpus, activations of the language models, and trained SAEs."""
    config = load_config(write_run(folder, harvest={"hooks": [HOOK]}, grid=grid, evaluate=evaluate))
    resolved, storage = resolve(config), open_store(str(folder / "store"))
    tokenizer = load_tokenizer(resolved.model)
    manifest = build_corpus(config.corpus, resolved.source, tokenizer, storage, resolved.corpus_id, lineage={})
    for part in resolved.parts():
        harvest(part, manifest, storage)
    for planned in resolved.saes:
        trained = train_one(planned, storage)
        write_trained(storage, planned, resolved.part_of(planned), trained, prepend_bos=True, run={})
    return resolved, storage


def train_one(planned: PlannedSae, storage: Storage) -> Trained:
    point = planned.point
    source = open_source(storage, planned.harvest_id, point.hook, planned.output_hook, point.train)
    member = Member(id=planned.id, config=point.sae, train=point.train, d_sae=planned.d_sae)
    (trained,) = train([member], source, MemoryWorker())
    assert isinstance(trained, Trained)
    return trained


def small_blocks(folder: Path) -> tuple[Resolved, Storage, CorpusManifest]:
    """A hook whose activations are stored, in several blocks."""
    config = load_config(write_run(folder, harvest={"hooks": [HOOK], "block_tokens": 1024}))
    resolved, storage = resolve(config), open_store(str(folder / "store"))
    manifest = build_corpus(
        config.corpus, resolved.source, load_tokenizer(resolved.model), storage, resolved.corpus_id, lineage={}
    )
    harvest(resolved, manifest, storage)
    return resolved, storage, manifest


def test_tokens_that_a_removal_took_are_written_again_without_the_model(tmp_path: Path) -> None:
    resolved, storage, manifest = small_blocks(tmp_path)
    before = {key: storage.read(key) for key in storage.list("activations")}
    tokens = [layout.block_marker(resolved.harvest_id, "tokens", span.index) for span in plan_of(resolved, manifest)]
    assert len(tokens) > 3
    for key in [layout.hook_manifest(resolved.harvest_id, name) for name in (HOOK, "tokens")] + tokens[1:3]:
        storage.delete(key)
    assert missing_spans(resolved, manifest, storage) == [], "no pass of the model is needed"
    commit_manifests(resolved, manifest, storage)
    assert {key: storage.read(key) for key in storage.list("activations")} == before


def test_a_harvest_whose_blocks_are_gone_is_made_again(tmp_path: Path) -> None:
    """As after a removal that overlapped with a harvest: manifest and markers stand, some of their files don't."""
    resolved, storage, manifest = small_blocks(tmp_path)
    before = {key: storage.read(key) for key in storage.list("activations")}
    assert missing_spans(resolved, manifest, storage) == []
    for hook in (HOOK, "tokens"):
        folder = layout.hook_folder(resolved.harvest_id, hook)
        blocks = [key for key in before if key.startswith(f"{folder}/block") and key.endswith(".safetensors")]
        for key in blocks[1:3]:
            storage.delete(key)
    found = harvested(storage, resolved.harvest_id, HOOK)
    with pytest.raises(CorruptError, match=r"Block 1 is gone.*The next sweep, harvest or features job"):
        read_block(storage, resolved.harvest_id, HOOK, found.blocks[1])
    assert [(span.index, hooks) for span, hooks in missing_spans(resolved, manifest, storage)] == [
        (1, [HOOK]),
        (2, [HOOK]),
    ]
    harvest(resolved, manifest, storage)
    assert {key: storage.read(key) for key in storage.list("activations")} == before


def test_a_second_writer_of_an_sae_never_changes_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ends later, one that looked before the first was done, and one after a writer that was killed."""
    resolved, storage = made(tmp_path, {"ce_tokens": 256})
    planned = resolved.saes[0]
    weights, training = layout.sae_file(planned.id, WEIGHTS), layout.training(planned.id)
    trained = train_one(planned, storage)
    trained = dataclasses.replace(trained, weights={name: w + 1e-4 for name, w in trained.weights.items()})

    def write() -> None:
        write_trained(storage, planned, resolved.part_of(planned), trained, prepend_bos=True, run={})

    before = {key: storage.read(key) for key in storage.list(layout.sae_folder(planned.id))}
    assert before.keys() >= {weights, training}
    write()
    with monkeypatch.context() as patch:
        patch.setattr(type(storage), "exists", lambda *_: False)
        write()
    assert {key: storage.read(key) for key in storage.list(layout.sae_folder(planned.id))} == before
    storage.delete(training)
    write()
    assert storage.read(weights) == before[weights]
    named = read_json(storage, training)
    assert named is not None
    assert named["weights_sha256"] == hashlib.sha256(before[weights]).hexdigest()


def measured(resolved: Resolved, storage: Storage, planned: PlannedSae) -> dict[str, Any]:
    document = read_json(storage, layout.evaluation(planned.id, resolved.evaluation_id))
    assert document is not None
    return document["metrics"]


def test_each_kind_of_sae_gets_its_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved, storage = made(tmp_path, EVALUATE)
    groups, board = by_site(resolved.saes), LocalBoard()
    assert {site.output_hook for site in groups} == {HOOK, "model.layers.0.mlp"}
    assert len({site.harvest_id for site in groups}) == 2
    assert len(groups) == 3
    assert splice_passes(groups) == 2 * 3, "clean, zero and one SAE; none for the random model"
    loaded: list[str] = []
    load = ModelPlace.load

    def counted(place: ModelPlace) -> LanguageModel:
        loaded.append(place.weights)
        return load(place)

    monkeypatch.setattr(ModelPlace, "load", counted)
    windows = _foreign_text(resolved, storage)
    assert windows is not None
    for site, planned in groups.items():
        part = resolved.part_of(planned[0])
        measure_site._function(SLOTS, part, storage, site, planned, windows, board)
    assert sorted(loaded) == ["shuffled", "trained", "trained"]
    assert {"loaded", "spliced", "measured"} == {kind for kind, _, _ in board.told}
    for site, (planned,) in groups.items():
        metrics = measured(resolved, storage, planned)
        control = planned.point.sae.control == "random_model"
        assert [metrics[name] is None for name in NO_SPLICE] == [control] * len(NO_SPLICE)
        assert 0 < metrics["fvu"] < 1
        assert_foreign_metrics(resolved, storage, site, planned, metrics)


def documents(resolved: Resolved, storage: Storage) -> dict[str, bytes]:
    """What the evaluation wrote, as it stands."""
    keys = [layout.evaluation(sae.id, resolved.evaluation_id) for sae in resolved.saes]
    keys += [layout.sae_file(sae.id, SPARSITY) for sae in resolved.saes]
    return {key: storage.read(key) for key in keys}


def test_saes_that_a_card_does_not_hold_together_are_measured_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory ends where four or two are measured together; then the process dies, and starts again."""
    resolved, storage = made(tmp_path, EVALUATE, {"sae.l1_coefficient": [0.5, 1, 2, 4]})
    ((site, planned),) = by_site(resolved.saes).items()
    windows = _foreign_text(resolved, storage)
    measure_site._function(SLOTS, resolved, storage, site, planned, windows, LocalBoard())
    whole = documents(resolved, storage)
    for key in whole:
        storage.delete(key)
    splice, load = evaluation.splice_metrics, ModelPlace.load
    together: list[int] = []
    loaded: list[ModelPlace] = []

    def short(model: LanguageModel, corpus: Corpus, hook: str, saes: dict[str, Any], **how: Any) -> Any:
        together.append(len(saes))
        if len(saes) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if len(together) == 6:
            raise Killed
        return splice(model, corpus, hook, saes, **how)

    monkeypatch.setattr(evaluation, "splice_metrics", short)
    monkeypatch.setattr(ModelPlace, "load", lambda place: loaded.append(place) or load(place))
    board = LocalBoard()
    with pytest.raises(Killed):
        measure_site._function(SLOTS, resolved, storage, site, planned, windows, board)
    assert together == [4, 2, 1, 1, 2, 1]
    assert len(loaded) == 1, "one language model for all parts"
    assert board.data("retry") == [
        f"{n} SAEs are too many for the memory here; half of them at a time" for n in (4, 2, 2)
    ]
    together.clear()
    measure_site._function(SLOTS, resolved, storage, site, planned, windows, board)
    assert together == [2, 1, 1], "those that were measured are not measured again"
    assert documents(resolved, storage) == whole


def test_saes_that_leave_a_language_model_no_room_are_measured_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card, pretended here, that holds it beside two SAEs and not beside three."""
    resolved, storage = made(tmp_path, EVALUATE, {"sae.l1_coefficient": [0.5, 1, 2, 4]})
    ((site, planned),) = by_site(resolved.saes).items()
    load, to = evaluation.load_trained, transformers.PreTrainedModel.to
    held: list[weakref.ref[Sae]] = []
    beside: list[int] = []

    def load_trained(*args: Any, **given: Any) -> Sae:
        sae = load(*args, **given)
        held.append(weakref.ref(sae))
        return sae

    def moved(model: Any, *args: Any, **given: Any) -> Any:
        beside.append(sum(sae() is not None for sae in held))
        if beside[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return to(model, *args, **given)

    monkeypatch.setattr(evaluation, "load_trained", load_trained)
    monkeypatch.setattr(transformers.PreTrainedModel, "to", moved)
    most, board = 0, LocalBoard()
    with pytest.raises(ModelError, match="does not fit into the memory"):
        measure_site._function(SLOTS, resolved, storage, site, planned, None, board)
    assert beside == [4, 2, 1], "one that it does not fit beside is the end"
    beside.clear()
    most, board = 2, LocalBoard()
    measure_site._function(SLOTS, resolved, storage, site, planned, None, board)
    assert beside == [4, 2]
    assert board.data("retry") == ["4 SAEs are too many for the memory here; half of them at a time"]
    assert len(documents(resolved, storage)) == 8


def test_parts_that_fit_a_card_are_reckoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card, which is pretended here, that has room for three of four SAEs beside the language model."""
    grid = {"sae.l1_coefficient": [0.5, 1, 2, 4]}
    config = load_config(write_run(tmp_path, harvest={"hooks": [HOOK]}, grid=grid))
    resolved = resolve(config)
    sae = resolved.saes[0]
    weights = 4 * (sae.d_sae * sae.d_in + sae.d_sae * sae.d_out)
    tables = 4 * (2 * 8 + 2) * config.corpus.context_size * resolved.table.vocab_size
    beside = tables + 4 * resolved.table.parameters + sae.sizes._replace(batch_size=MEASURED_ROWS).step_bytes
    room = int((3 * weights + beside) / 0.95) + 1000
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * room, 2 * room))
    half = Slots(count=2, cpus=1, gpus=0.5, threads=1)
    assert [len(part) for part in _parts(resolved.saes, resolved, half)] == [3, 1]
    plain = resolve(dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, ce_tokens=0)))
    assert tables > weights
    assert [len(part) for part in _parts(plain.saes, plain, half)] == [4], "where nothing is spliced"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (weights, 2 * room))
    assert [len(part) for part in _parts(resolved.saes, resolved, half)] == [1, 1, 1, 1]
    assert [len(part) for part in _parts(resolved.saes, resolved, SLOTS)] == [4]


def test_an_evaluation_that_dies_again_and_again_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the language model does not fit into the node's memory: after its stored rows, each time."""
    resolved, storage = made(tmp_path, {"ce_tokens": 256}, {"sae.l1_coefficient": [0.5]})
    ((site, planned),) = by_site(resolved.saes).items()
    board = LocalBoard()

    def killed(_place: ModelPlace) -> LanguageModel:
        raise Killed

    monkeypatch.setattr(ModelPlace, "load", killed)
    for _ in range(MAX_DEATHS):
        with pytest.raises(Killed):
            measure_site._function(SLOTS, resolved, storage, site, planned, None, board)
    with pytest.raises(StageError, match=f"measures the SAEs of '{HOOK}' died 10 times before any more were measured"):
        measure_site._function(SLOTS, resolved, storage, site, planned, None, board)
    assert board.data("measured"), "it had come so far"
    assert board.data("retry")[-1] == "its process died, and this is start 10 of 10"


def test_what_is_measured_again_after_a_lost_node_is_movement(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often: how often a process may die is counted where it starts."""
    told, said = [], []

    @contextmanager
    def watched(_stage: str, on_event: Any, *, stall_seconds: float) -> Iterator[None]:
        told.extend(on_event(Event("spliced", HOOK, 1000)) for _ in range(20))
        assert on_event(Event("retry", HOOK, "its process died"))
        yield

    monkeypatch.setattr(evaluation, "watched", watched)
    monkeypatch.setattr(evaluation, "evaluate_hooks", lambda *_: None)
    config = SimpleNamespace(evaluate=SimpleNamespace(ce_tokens=1000), resources=SimpleNamespace(stall_seconds=1))
    bars = SimpleNamespace(update=lambda *_: None, say=said.append)
    evaluation.measure(SimpleNamespace(config=config), None, {}, None, bars)  # type: ignore[arg-type]
    assert all(told)
    assert said == [f"evaluation of {HOOK}: its process died"]


def test_features_of_saes_that_a_card_does_not_hold_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved, storage = made(tmp_path, {"ce_tokens": 0}, {"sae.l1_coefficient": [0.5, 1, 2]})
    run, site = (
        features.Run(storage=storage, settings=FeaturesConfig()),
        (resolved.harvest_id, resolved.corpus_id, HOOK),
    )
    item = {"site": site, "chunk": 0, "chunks": 1, "saes": [sae.id for sae in resolved.saes]}
    keys = [run.part_key(sae.id, 0, 1) for sae in resolved.saes]
    collect = features.collect_chunk
    together: list[int] = []

    def short(most: int, storage: Storage, saes: dict[str, Any], *rest: Any, **how: Any) -> Any:
        together.append(len(saes))
        if len(saes) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return collect(storage, saes, *rest, **how)

    found = []
    for most in (3, 1):
        monkeypatch.setattr(features, "collect_chunk", partial(short, most))
        board = LocalBoard()
        (told,) = features.FeatureActor(run, 1, False, board)({"chunk": [json.dumps(item)]})
        assert sum(board.data("tokens")) == pytest.approx(told["rows"][0]), "each row counted once"
        found.append([storage.read(key) for key in keys])
        for key in keys:
            storage.delete(key)
    assert together == [3, 3, 1, 2, 1, 1]
    assert found[0] == found[1]


def assert_foreign_metrics(
    resolved: Resolved, storage: Storage, site: Site, planned: PlannedSae, metrics: dict[str, Any]
) -> None:
    """Against all rows at once, in float64."""
    part = resolved.part_of(planned)
    model, windows = model_place(part, SLOTS).load(), _foreign_text(resolved, storage)
    assert windows is not None
    reader = Reader(model, part.hooks, part.config.harvest, windows.ids.shape[1])
    (rows,) = foreign_rows(reader, windows, (site.hook, site.output_hook), 10**6)
    x, y = (part.float() for part in ((rows, rows) if isinstance(rows, torch.Tensor) else rows))
    sae = load_trained(storage, planned.id)
    with torch.no_grad():
        features, error = sae.encode(x), (sae(x) - y).double()
    variance = (y.double() - y.double().mean(0)).pow(2).sum()
    assert metrics["tokens_foreign"] == len(x)
    assert metrics["fvu_foreign"] == pytest.approx(float(error.pow(2).sum() / variance), rel=1e-5)
    assert metrics["l0_foreign"] == pytest.approx(float((features > 0).sum()) / len(x), rel=1e-5)


def test_without_a_foreign_text_its_metrics_are_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved, storage = made(tmp_path, {"ce_tokens": 0})
    assert _foreign_text(resolved, storage) is None
    monkeypatch.setattr(ModelPlace, "load", lambda place: pytest.fail("nothing asks for the language model"))
    site, (planned,) = next(iter(by_site(resolved.saes).items()))
    measure_site._function(SLOTS, resolved, storage, site, [planned], None, LocalBoard())
    metrics = measured(resolved, storage, planned)
    assert {name for name, value in metrics.items() if value is None} == {*NO_SPLICE, *FOREIGN}


def test_a_foreign_text_that_is_not_there_is_known_before_anything_runs(tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path, evaluate={"foreign_source": "./nowhere"}))
    with pytest.raises(CorpusError, match=r"nowhere does not exist; evaluate\.foreign_source"):
        resolve(config)
