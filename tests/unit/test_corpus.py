"""Whole corpora from small files: the split, copies, limits, shards, and what is said when there is too little text."""

from __future__ import annotations

import io
import json
import pickle
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from midiscover import corpus as corpus_module
from midiscover import mixing
from midiscover.config import CorpusConfig
from midiscover.corpus import Corpus, CorpusManifest, build_corpus, find_corpus, standing_corpus
from midiscover.errors import CorpusError, CorruptError, NotFoundError
from midiscover.mixing import Mixed, mix
from midiscover.packing import Windows
from midiscover.store.local import LocalStorage
from midiscover.store.storage import open_store
from midiscover.texts import SourceIdentity, resolve_source
from midiscover.upkeep import GRACE_SECONDS, garbage, survey

WORDS = 900
RUN = 32
REFRAIN = " ".join(f"w{i}" for i in range(RUN + 4))


def make_tokenizer(*, bos: bool = True, eos: bool = True, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a word: `w17` is id 20; ids 0 to 2 are <unk>, <s> and </s>."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i + 3 for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    named = {"bos_token": "<s>" if bos else None, "eos_token": "</s>" if eos else None}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **named)


def words(ids: np.ndarray) -> str:
    return " ".join(f"w{i}" for i in ids)


def make_texts(count: int, seed: int = 0, longest: int = 200) -> list[str]:
    rng = np.random.default_rng(seed)
    return [words(rng.integers(0, WORDS, rng.integers(20, longest))) for _ in range(count)]


def build(
    folder: Path, texts: list[str], tokenizer: PreTrainedTokenizerFast | None = None, **settings: Any
) -> tuple[Corpus, CorpusManifest]:
    folder.mkdir(exist_ok=True)
    source = folder / "texts.jsonl"
    source.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    cfg = CorpusConfig(**{"source": str(source), "context_size": 48, "held_out": 0.3} | settings)
    storage = open_store(str(folder / "store"))
    lineage = {"tokenizer": "test"}
    manifest = build_corpus(
        cfg, resolve_source(cfg), tokenizer or make_tokenizer(), storage, "c.0123456789", lineage=lineage
    )
    return Corpus.open(storage, "c.0123456789"), manifest


def table(corpus: Corpus) -> list[dict[str, Any]]:
    return pq.read_table(io.BytesIO(corpus.storage.read("corpora/c.0123456789/documents.parquet"))).to_pylist()


def both_splits(corpus: Corpus) -> tuple[Windows, Windows]:
    n_train, total = corpus.manifest.windows["train"], corpus.manifest.n_windows
    return corpus.windows(0, n_train), corpus.windows(n_train, total)


def document_ids(windows: Windows) -> set[int]:
    return set(windows.doc[windows.doc >= 0].tolist())


def test_windows_hold_the_documents_and_the_table_describes_them(tmp_path: Path) -> None:
    texts = make_texts(60)
    corpus, manifest = build(tmp_path, texts)
    rows = table(corpus)
    assert [row["doc"] for row in rows] == list(range(60))
    assert [row["characters"] for row in rows] == [len(text) for text in texts]
    every = corpus.windows(0, manifest.n_windows)
    for row, text in zip(rows, texts, strict=True):
        tokens = every.ids[every.doc == row["doc"]].tolist()
        expected = [int(word[1:]) + 3 for word in text.split()]
        assert tokens in (expected, [*expected, 2]), "the document, and EOS before the next"
        assert row["first_window"] == np.flatnonzero((every.doc == row["doc"]).any(axis=1))[0]
        assert (row["first_window"] < manifest.windows["train"]) == (row["split"] == "train")
    assert (manifest.dropped_held_out_windows, manifest.held_out_runs_in_training) == (0, 0)
    for name, windows in zip(("train", "held_out"), both_splits(corpus), strict=True):
        assert manifest.tokens[name] == (windows.doc >= 0).sum()
        assert manifest.documents[name] == len(document_ids(windows))
        assert (windows.doc[:-1] >= 0).all(), "only the last window is padded"


def test_splits_are_disjoint_and_stay_when_documents_are_added(tmp_path: Path) -> None:
    texts = make_texts(60)
    few, _ = build(tmp_path / "few", texts[:30])
    many, _ = build(tmp_path / "many", [*make_texts(5, seed=9), *texts])
    training, held_out = both_splits(many)
    assert document_ids(training).isdisjoint(document_ids(held_out))
    assert [row["split"] for row in table(few)] == [row["split"] for row in table(many)][5:35]
    assert {row["split"] for row in table(few)} == {"train", "held_out"}


def test_the_share_held_out_is_about_what_was_asked(tmp_path: Path) -> None:
    corpus, _ = build(tmp_path, make_texts(600, longest=40), held_out=0.2)
    assert 0.15 < np.mean([row["split"] == "held_out" for row in table(corpus)]) < 0.25


def test_another_seed_holds_out_other_documents(tmp_path: Path) -> None:
    splits = [
        [row["split"] for row in table(build(tmp_path / str(seed), make_texts(40), seed=seed)[0])] for seed in (0, 1)
    ]
    assert splits[0] != splits[1]


@pytest.mark.parametrize("context_size", [16, 48])
def test_no_run_of_held_out_text_stands_in_training(tmp_path: Path, context_size: int) -> None:
    texts = make_texts(80)
    passage = words(np.random.default_rng(5).integers(0, WORDS, 45))
    texts = [f"{text} {passage} {text[:30]}" if i % 4 == 0 else text for i, text in enumerate(texts)]
    corpus, manifest = build(tmp_path, texts, context_size=context_size)
    training, held_out = both_splits(corpus)

    def runs(stream: np.ndarray) -> set[tuple[int, ...]]:
        return {tuple(stream[i : i + RUN].tolist()) for i in range(len(stream) - RUN + 1)}

    assert manifest.dropped_held_out_windows > 0
    assert manifest.held_out_runs_in_training == 0
    first_tokens = [int(word[1:]) + 3 for word in passage.split()][:RUN]
    assert tuple(first_tokens) in runs(training.content())
    # The kept windows end to end: runs across a gap are no text, but can't be in training either.
    assert runs(training.content()).isdisjoint(runs(held_out.content()))
    places = {row["doc"]: row["first_window"] for row in table(corpus) if row["split"] == "held_out"}
    for doc, place in places.items():
        found = np.flatnonzero((held_out.doc == doc).any(axis=1))
        assert place == (manifest.windows["train"] + found[0] if len(found) else None)


def test_near_copies_are_dropped_and_counted(tmp_path: Path) -> None:
    texts = make_texts(40, longest=400)
    long = max(texts, key=len).split()
    changed = [("w1" if i % 120 == 60 else word) for i, word in enumerate(long)]
    half_new = [*long[: len(long) // 3], *words(np.random.default_rng(3).integers(0, WORDS, len(long))).split()]
    copies = [texts[3], " ".join(changed), " ".join(long[10:])]
    corpus, manifest = build(tmp_path, [*texts, *copies, " ".join(half_new)])
    assert manifest.dropped_near_copies == 3
    assert manifest.documents["read"] == 44
    assert len(table(corpus)) == 41
    assert table(corpus)[-1]["characters"] == len(" ".join(half_new))


def test_max_tokens_is_exact_and_cuts_the_last_document(tmp_path: Path) -> None:
    texts = make_texts(60)
    corpus, manifest = build(tmp_path, texts, max_tokens=3333)
    rows = table(corpus)
    assert sum(row["tokens"] for row in rows) == sum(manifest.parts.values()) == 3333
    lengths = [len(text.split()) for text in texts]
    assert [row["tokens"] for row in rows][:-1] == lengths[: len(rows) - 1]
    assert rows[-1]["tokens"] < lengths[len(rows) - 1]


def test_max_samples_counts_documents_read(tmp_path: Path) -> None:
    texts = make_texts(30)
    corpus, manifest = build(tmp_path, [texts[0], *texts], max_samples=20)
    assert manifest.documents["read"] == 20
    assert len(table(corpus)) == 19


def test_parts_get_equal_shares_of_tokens() -> None:
    parts = {"short": make_texts(400, seed=1, longest=30), "long": make_texts(50, seed=2, longest=900)}
    streams = {name: iter(texts) for name, texts in parts.items()}
    given: dict[str, int] = {"short": 0, "long": 0}
    longest = max(len(text.split()) for texts in parts.values() for text in texts)
    counts = Mixed()
    for document in mix(streams, CorpusConfig(max_tokens=12_000), make_tokenizer(), counts):
        given[document.part] += len(document.ids)
        assert abs(given["short"] - given["long"]) <= longest
    assert counts.parts == given
    assert sum(given.values()) == counts.tokens == 12_000


@pytest.mark.parametrize(
    ("tokenizer", "prepend", "bos_id"),
    [
        (make_tokenizer(), None, None),
        (make_tokenizer(adds_bos=True), None, 1),
        (make_tokenizer(), True, 1),
        (make_tokenizer(adds_bos=True), False, None),
        (make_tokenizer(bos=False, eos=False), None, None),
    ],
    ids=["as the tokenizer", "as the tokenizer, which adds it", "on", "off", "no special tokens"],
)
def test_bos(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, prepend: bool | None, bos_id: int | None) -> None:
    corpus, manifest = build(tmp_path, make_texts(40), tokenizer, prepend_bos=prepend)
    windows = corpus.windows(0, manifest.n_windows)
    assert manifest.bos_id == bos_id
    assert windows.ids.shape[1] == 48
    if bos_id is None:
        assert (windows.doc != -2).all()
        assert (windows.ids != 1).all(), "no special tokens within documents"
    else:
        assert (windows.ids[:, 0] == bos_id).all()
        assert (windows.doc[:, 0] == -2).all()
        assert (windows.doc[:, 1:] != -2).all()
    assert manifest.eos_id == tokenizer.eos_token_id
    assert ((windows.ids == 2) & (windows.doc >= 0)).any() == (manifest.eos_id is not None)


def test_bos_that_the_tokenizer_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="tokenizer has no BOS token"):
        build(tmp_path, make_texts(40), make_tokenizer(bos=False), prepend_bos=True)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_two_builds_give_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "SHARD_TOKENS", 1000)
    for name in ("one", "two"):
        build(tmp_path / name, make_texts(60))
    one, two = files(tmp_path / "one/store"), files(tmp_path / "two/store")
    assert one == two
    assert len(one) > 6


def test_shards_join_to_the_corpus_of_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, manifest = build(tmp_path / "whole", make_texts(60))
    monkeypatch.setattr(corpus_module, "SHARD_TOKENS", 500)
    corpus, sharded = build(tmp_path / "sharded", make_texts(60))
    assert len(sharded.shards) > 6 > len(manifest.shards) == 2
    assert sharded.windows == manifest.windows
    assert [s.start_window for s in sharded.shards] == [0, *[s.stop_window for s in sharded.shards[:-1]]]
    assert sharded.windows["train"] in [shard.stop_window for shard in sharded.shards], "none crosses the split"
    n = manifest.n_windows
    for start, stop in ((0, n), (0, 1), (n - 1, n), (5, 5), (7, n - 3), (9, 12)):
        for ours, theirs in zip(corpus.windows(start, stop), whole.windows(start, stop), strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert ours.dtype == np.int32
            assert ours.shape == (stop - start, 48)
    with pytest.raises(IndexError, match="of a corpus of"):
        corpus.windows(0, n + 1)


def test_only_the_shards_asked_for_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "SHARD_TOKENS", 500)
    corpus, manifest = build(tmp_path, make_texts(60))
    read: list[str] = []
    real = LocalStorage.read
    monkeypatch.setattr(LocalStorage, "read", lambda self, key, *rest: (read.append(key), real(self, key, *rest))[1])
    shard = manifest.shards[2]
    for _ in range(3):
        corpus.windows(shard.start_window, shard.stop_window)
        corpus.windows(shard.start_window + 1, shard.start_window + 2)
    assert read == [f"corpora/c.0123456789/{shard.file}"]
    for other in manifest.shards:
        corpus.windows(other.start_window, other.stop_window)
    assert len(corpus._cache) == Corpus.CACHED_SHARDS
    again = pickle.loads(pickle.dumps(corpus))  # noqa: S301 - our own bytes: Ray sends a Corpus this way
    assert len(again._cache) == 0
    np.testing.assert_array_equal(again.windows(3, 9).ids, corpus.windows(3, 9).ids)


def test_a_finished_corpus_is_found_and_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, manifest = build(tmp_path, make_texts(40))
    monkeypatch.setattr(corpus_module, "documents", lambda *_: pytest.fail("read again"))
    identity = SourceIdentity(name="any", digest="any")
    args = (CorpusConfig(), identity, make_tokenizer(), corpus.storage, "c.0123456789")
    assert build_corpus(*args, lineage={}) == manifest == find_corpus(corpus.storage, "c.0123456789")
    assert CorpusManifest.from_json(manifest.to_json()) == manifest
    assert manifest.lineage == {"tokenizer": "test"}
    assert manifest.source["name"] == "texts.jsonl"


def test_progress_ends_at_all_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "REPORT_TOKENS", 1000)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in make_texts(60)))
    cfg = CorpusConfig(source=str(tmp_path / "a.jsonl"), held_out=0.3)
    seen: list[int] = []
    storage = open_store(str(tmp_path / "store"))
    manifest = build_corpus(
        cfg, resolve_source(cfg), make_tokenizer(), storage, "c.p", lineage={}, progress=seen.append
    )
    assert seen == sorted(seen)
    assert len(seen) > 3
    assert seen[-1] == sum(manifest.parts.values())


def test_absent_and_damaged_corpora(tmp_path: Path) -> None:
    corpus, manifest = build(tmp_path, make_texts(40))
    assert find_corpus(corpus.storage, "c.other") is None
    with pytest.raises(NotFoundError, match=r"no finished corpus c\.other"):
        Corpus.open(corpus.storage, "c.other")
    key = f"corpora/c.0123456789/{manifest.shards[0].file}"
    data = bytearray(corpus.storage.read(key))
    data[-1] ^= 1
    corpus.storage.write(key, data)
    with pytest.raises(CorruptError, match="differs from its manifest"):
        corpus.windows(0, 1)
    corpus.storage.write("corpora/c.0123456789/manifest.json", b"{}")
    with pytest.raises(CorruptError, match="manifest can't be read"):
        find_corpus(corpus.storage, "c.0123456789")


@pytest.mark.parametrize(
    ("texts", "settings", "said"),
    [
        (make_texts(1), {}, "gave 1 documents, of which .* training and held-out text need at least one each. More "),
        (make_texts(30), {"max_tokens": 8}, r"A higher corpus\.max_tokens \(now 8\), another corpus"),
        (make_texts(30), {"max_samples": 1}, r"A higher corpus\.max_samples \(now 1\), another corpus"),
        (make_texts(30), {"held_out": 0.001}, "gave 30 documents, of which none fell to held-out"),
        (make_texts(30), {"held_out": 0.999}, "gave 30 documents, of which all fell to held-out"),
        ([f"{REFRAIN} {text}" for text in make_texts(30)], {"context_size": 8192}, "every held-out window shares"),
    ],
    ids=["one document", "few tokens", "one sample", "none held out", "all held out", "a refrain in the only window"],
)
def test_too_little_text(tmp_path: Path, texts: list[str], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(CorpusError, match=said):
        build(tmp_path, texts, **settings)
    assert LocalStorage(tmp_path / "store").list("") == unfinished(tmp_path / "store")


def unfinished(store: Path) -> list[str]:
    """What `store gc` will remove once it is a day old."""
    return [one.key for one in garbage(survey(LocalStorage(store)), now=time.time() + GRACE_SECONDS + 60)]


def test_a_source_that_breaks_off_leaves_no_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "SHARD_TOKENS", 10_000)
    texts = make_texts(3000, longest=60)
    (tmp_path / "a.jsonl").write_text("\n".join([*(json.dumps({"text": text}) for text in texts), "oops"]))
    cfg = CorpusConfig(source=str(tmp_path / "a.jsonl"))
    storage = open_store(str(tmp_path / "store"))
    with pytest.raises(CorpusError, match=r"a\.jsonl, line 3001 is not JSON"):
        build_corpus(cfg, resolve_source(cfg), make_tokenizer(), storage, "c.bbbbbbbbbb", lineage={})
    assert find_corpus(storage, "c.bbbbbbbbbb") is None
    left = storage.list("")
    assert len(left) > 1, "shards had been written"
    assert left == unfinished(tmp_path / "store")


@pytest.mark.parametrize("broken", ["outer", "inner"])
def test_a_build_that_breaks_off_takes_nothing_from_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Both write the same shards; one of them runs while the other is half done."""
    monkeypatch.setattr(corpus_module, "SHARD_TOKENS", 500)
    monkeypatch.setattr(mixing, "BATCH_CHARACTERS", 1)
    texts = make_texts(60)
    whole, manifest = build(tmp_path, texts)
    storage = open_store(str(tmp_path / "raced"))
    args = (CorpusConfig(context_size=48, held_out=0.3), SourceIdentity(name="any", digest="any"), make_tokenizer())

    def read(name: str) -> Iterator[str]:
        for number, text in enumerate(texts):
            if name == broken and number == 45:
                raise CorpusError(f"the text of the {name} build can't be read")
            if name == "outer" and number == 30:
                assert len(storage.list("")) > 3
                make("inner")
            yield text

    def make(name: str) -> None:
        monkeypatch.setattr(corpus_module, "documents", lambda *_: [read(name)])
        with pytest.raises(CorpusError, match=broken) if name == broken else nullcontext():
            build_corpus(*args, storage, "c.r", lineage={})

    make("outer")
    corpus = Corpus.open(storage, "c.r")
    np.testing.assert_array_equal(corpus.windows(0, manifest.n_windows).ids, whole.windows(0, manifest.n_windows).ids)


def test_a_corpus_whose_files_are_gone_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "SHARD_TOKENS", 1000)
    corpus, manifest = build(tmp_path, make_texts(60))
    whole = files(tmp_path / "store")
    gone = f"corpora/c.0123456789/{manifest.shards[1].file}"
    for key in (gone, "corpora/c.0123456789/documents.parquet"):
        corpus.storage.delete(key)
        if key == gone:
            with pytest.raises(CorruptError, match=r"shard-00001-\w+\.safetensors of corpus c\.0123456789 is gone"):
                corpus.windows(0, manifest.n_windows)
        assert find_corpus(corpus.storage, "c.0123456789") == manifest
        assert standing_corpus(corpus.storage, "c.0123456789") is None
        assert find_corpus(corpus.storage, "c.0123456789") is None
        build(tmp_path, make_texts(60))
        assert files(tmp_path / "store") == whole
        assert standing_corpus(corpus.storage, "c.0123456789") == manifest
