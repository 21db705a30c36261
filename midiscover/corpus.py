"""A text source as token windows: mixed, cleaned of copies, split by document, packed, and committed to the store.

    corpora/<id>/shard-00000-<sha12>.safetensors   ids, doc: int32 [windows, context_size]
    corpora/<id>/documents.parquet                 one row per document
    corpora/<id>/manifest.json                     last; a corpus without it does not exist

Windows are numbered through all shards, training before held-out, and no shard crosses the split. Everything follows
from text, tokenizer and settings: two builds give the same bytes. Where the text comes from is `texts`' business, which
documents are taken `mixing`'s, and how windows are cut `packing`'s.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load, save

from midiscover.config import CorpusConfig
from midiscover.errors import CorpusError, CorruptError, NotFoundError, StageError
from midiscover.ids import canonical_json
from midiscover.mixing import Document, Mixed, Split, mix, prepends_bos
from midiscover.packing import Ints, Layout, Packer, Windows, apart_from_training
from midiscover.store import layout as paths
from midiscover.texts import SourceIdentity, documents, refuse_changed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from midiscover.store.storage import Storage

FORMAT = 1

DOCUMENTS = "documents.parquet"

SHARD_TOKENS = 4_000_000
"""Tokens of a shard, about: 32 MB of ids and document indices."""

REPORT_TOKENS = 1 << 14
"""Tokens between two calls of `progress`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One file of windows [start_window, stop_window)."""

    file: str
    sha256: str
    start_window: int
    stop_window: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusManifest:
    """Everything about a finished corpus but its tokens; manifest.json holds the same."""

    v: int = FORMAT
    id: str
    windows: dict[str, int]
    """`train` and `held_out`; training windows come first."""
    tokens: dict[str, int]
    """`train` and `held_out`: tokens in the windows, EOS tokens between documents included, padding and our BOS not."""
    parts: dict[str, int]
    """Tokens taken from each part of the source, both splits together, before held-out windows are dropped."""
    documents: dict[str, int]
    """`read`, `train` and `held_out`."""
    context_size: int
    bos_id: int | None
    """The token that we put in front of each window; None where we put none."""
    eos_id: int | None
    """The token between two documents."""
    pad_id: int
    """Fills the last window of each split."""
    dropped_near_copies: int
    """Documents left out because more than half of their runs of 32 tokens stood in kept ones."""
    dropped_held_out_windows: int
    """Held-out windows left out because they touched a run of 32 tokens that training holds."""
    held_out_runs_in_training: int
    """The same runs, counted again afterwards."""
    shards: list[Shard]
    documents_sha256: str
    """Of documents.parquet."""
    source: dict[str, Any]
    """The fields of `texts.SourceIdentity`."""
    lineage: dict[str, Any] = field(default_factory=dict)

    @property
    def n_windows(self) -> int:
        """All windows, of both splits."""
        return self.windows["train"] + self.windows["held_out"]

    def to_json(self) -> bytes:
        """Canonical: equal manifests are equal bytes."""
        return canonical_json(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> CorpusManifest:
        """Inverse of `to_json`. CorruptError for anything else."""
        try:
            fields = json.loads(data)
            if fields["v"] != FORMAT:
                raise CorruptError(f"A corpus manifest has version {fields['v']}; this program reads {FORMAT}.")
            return cls(**fields | {"shards": [Shard(**shard) for shard in fields["shards"]]})
        except (ValueError, TypeError, KeyError) as error:
            raise CorruptError(f"A corpus manifest can't be read: {error!r}.") from error


class Corpus:
    """Reads the windows of a finished corpus. Cheap to make and to pickle; keeps the last few shards in memory."""

    CACHED_SHARDS = 2

    def __init__(self, storage: Storage, manifest: CorpusManifest) -> None:
        self.storage = storage
        self.manifest = manifest
        self._cache: OrderedDict[str, Windows] = OrderedDict()

    @classmethod
    def open(cls, storage: Storage, corpus_id: str) -> Corpus:
        """NotFoundError where the store holds no finished corpus of this id."""
        manifest = find_corpus(storage, corpus_id)
        if manifest is None:
            raise NotFoundError(f"{storage.uri} holds no finished corpus {corpus_id}.")
        return cls(storage, manifest)

    def windows(self, start: int, stop: int) -> Windows:
        """Windows [start, stop): ids and doc, int32 [stop - start, context_size].

        Reads only the shards that hold them, and checks their sha256: CorruptError where it differs.
        """
        if not 0 <= start <= stop <= self.manifest.n_windows:
            raise IndexError(f"windows [{start}, {stop}) of a corpus of {self.manifest.n_windows}")
        empty = np.empty((0, self.manifest.context_size), np.int32)
        pieces = [Windows(empty, empty)]
        for shard in self.manifest.shards:
            if shard.start_window < stop and start < shard.stop_window:
                rows = slice(max(start - shard.start_window, 0), stop - shard.start_window)
                whole = self._shard(shard)
                pieces.append(Windows(whole.ids[rows], whole.doc[rows]))
        return Windows(*(np.concatenate(arrays) for arrays in zip(*pieces, strict=True)))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cache": OrderedDict()}

    def _shard(self, shard: Shard) -> Windows:
        if shard.file not in self._cache:
            self._cache[shard.file] = _read_shard(self.storage, self.manifest.id, shard)
            while len(self._cache) > self.CACHED_SHARDS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(shard.file)
        return self._cache[shard.file]


def find_corpus(storage: Storage, corpus_id: str) -> CorpusManifest | None:
    """The manifest of a finished corpus; None where there is none (yet)."""
    try:
        return CorpusManifest.from_json(storage.read(paths.corpus_manifest(corpus_id)))
    except FileNotFoundError:
        return None


def standing_corpus(storage: Storage, corpus_id: str) -> CorpusManifest | None:
    """As `find_corpus`, where the files that the manifest names are there.

    The manifest of files that are gone, as a removal leaves it that overlapped with a build, is taken back, so that
    they are made again.
    """
    found = find_corpus(storage, corpus_id)
    if found is None:
        return None
    named = {paths.corpus_file(corpus_id, name) for name in (DOCUMENTS, *(shard.file for shard in found.shards))}
    if named <= set(storage.list(paths.corpus_folder(corpus_id))):
        return found
    storage.delete(paths.corpus_manifest(corpus_id))
    return None


def build_corpus(
    cfg: CorpusConfig,
    source: SourceIdentity,
    tokenizer: PreTrainedTokenizerBase,
    storage: Storage,
    corpus_id: str,
    *,
    lineage: dict[str, Any],
    progress: Callable[[int], None] = lambda _: None,
) -> CorpusManifest:
    """Make the corpus, or return it where it is finished already.

    `progress` gets the tokens taken so far. Training windows are written as they fill a shard, held-out ones stay in
    memory to the end (about 20 bytes a token). CorpusError where the text is too little for two splits or a file of
    the source is broken or changes meanwhile. Shards that were written by then stay, for they may be another build's as
    well: their names come from their content. `upkeep` counts those of a corpus without a manifest as garbage.
    """
    finished = standing_corpus(storage, corpus_id)
    if finished is not None:
        return finished
    build = _Build(corpus_id, storage, _layout(cfg, tokenizer))
    counts = Mixed()
    parts = dict(zip(source.parts, documents(cfg, source), strict=True))
    reported = 0
    for document in mix(parts, cfg, tokenizer, counts):
        build.add(document)
        if counts.tokens - reported >= REPORT_TOKENS:
            reported = counts.tokens
            progress(reported)
    progress(counts.tokens)
    refuse_changed(cfg, source)
    manifest = build.finish(counts, cfg, source, lineage)
    if storage.create(paths.corpus_manifest(corpus_id), manifest.to_json()):
        return manifest
    return Corpus.open(storage, corpus_id).manifest  # another build was first; its manifest stands


def _layout(cfg: CorpusConfig, tokenizer: PreTrainedTokenizerBase) -> Layout:
    bos: Any = tokenizer.bos_token_id
    eos: Any = tokenizer.eos_token_id
    pad: Any = tokenizer.pad_token_id
    if cfg.prepend_bos and bos is None:
        raise CorpusError("corpus.prepend_bos is true, but the model's tokenizer has no BOS token; say false or null.")
    with_bos = prepends_bos(tokenizer) if cfg.prepend_bos is None else cfg.prepend_bos
    return Layout(
        context_size=cfg.context_size,
        bos_id=bos if with_bos else None,
        eos_id=eos,
        pad_id=next((token for token in (pad, eos) if token is not None), 0),
    )


class _Build:
    """The state of one build: a packer for each split, the shards written so far, and the table of documents."""

    def __init__(self, corpus_id: str, storage: Storage, layout: Layout) -> None:
        self.corpus_id = corpus_id
        self.storage = storage
        self.layout = layout
        self.packers: dict[Split, Packer] = {"train": Packer(layout), "held_out": Packer(layout)}
        self.shard_windows = max(1, SHARD_TOKENS // layout.context_size)
        self.shards: list[Shard] = []
        self.rows: list[dict[str, Any]] = []
        self.tokens = {"train": 0, "held_out": 0}

    def add(self, document: Document) -> None:
        """Append a document to its split; writes a shard where that fills one."""
        packer = self.packers[document.split]
        first_window = packer.add(len(self.rows), document.ids)
        row = document._asdict() | {"tokens": len(document.ids), "first_window": first_window}
        del row["ids"]
        self.rows.append(row)
        if document.split == "train":
            self._write("train", packer.take(multiple_of=self.shard_windows))

    def finish(
        self, counts: Mixed, cfg: CorpusConfig, source: SourceIdentity, lineage: dict[str, Any]
    ) -> CorpusManifest:
        """Write what is left: the last training shard, the held-out windows that may stay, the documents."""
        held_out = self._held_out(counts, cfg, source)
        apart = apart_from_training(held_out, self._training(), self.layout)
        if apart.left:
            raise StageError(
                f"Held-out text of corpus {self.corpus_id} still holds {apart.left} runs of training text."
            )
        if not apart.keep.any():
            raise CorpusError(
                f"{source.name}: every held-out window shares a run of 32 tokens with training text, so nothing is "
                "left to measure on; a text that repeats itself less is needed."
            )
        n_train = self._stop()
        held_out = Windows(held_out.ids[apart.keep], held_out.doc[apart.keep])
        self._write("held_out", held_out)
        table = _documents_table(self.rows, n_train, held_out.doc)
        self.storage.write(paths.corpus_file(self.corpus_id, DOCUMENTS), table)
        splits = [row["split"] for row in self.rows]
        return CorpusManifest(
            id=self.corpus_id,
            windows={"train": n_train, "held_out": self._stop() - n_train},
            tokens=self.tokens,
            parts=counts.parts,
            documents={"read": counts.read, "train": splits.count("train"), "held_out": splits.count("held_out")},
            context_size=self.layout.context_size,
            bos_id=self.layout.bos_id,
            eos_id=self.layout.eos_id,
            pad_id=self.layout.pad_id,
            dropped_near_copies=counts.copies,
            dropped_held_out_windows=int((~apart.keep).sum()),
            held_out_runs_in_training=apart.left,
            shards=self.shards,
            documents_sha256=hashlib.sha256(table).hexdigest(),
            source=asdict(source) | {"parts": list(source.parts)},
            lineage=lineage,
        )

    def _held_out(self, counts: Mixed, cfg: CorpusConfig, source: SourceIdentity) -> Windows:
        """Close both streams: writes the last training windows and returns all held-out ones."""
        training, held_out = (packer.take(rest=True) for packer in self.packers.values())
        splits = {row["split"] for row in self.rows}
        if held_out is None or "train" not in splits:
            read = {"max_samples": counts.read, "max_tokens": counts.tokens}
            stops = [f"a higher corpus.{name} (now {n:,})" for name, n in read.items() if n == getattr(cfg, name)]
            more = ", ".join(stops).capitalize() or "More documents"
            raise CorpusError(
                f"{source.name} gave {len(self.rows)} documents, of which {'all' if held_out else 'none'} fell to "
                f"held-out text; training and held-out text need at least one each. {more}, another "
                f"corpus.held_out (now {cfg.held_out:g}) or another corpus.seed would do."
            )
        self._write("train", training)
        return held_out

    def _training(self) -> Iterator[Ints]:
        """The training content as it stands in the store."""
        for shard in self.shards:
            yield _read_shard(self.storage, self.corpus_id, shard).content()

    def _write(self, split: Split, windows: Windows | None) -> None:
        if windows is None:
            return
        for first in range(0, len(windows.ids), self.shard_windows):
            ids, doc = (array[first : first + self.shard_windows] for array in windows)
            data = save({"ids": np.ascontiguousarray(ids), "doc": np.ascontiguousarray(doc)})
            sha256 = hashlib.sha256(data).hexdigest()
            name = f"shard-{len(self.shards):05d}-{sha256[:12]}.safetensors"
            self.storage.write(paths.corpus_file(self.corpus_id, name), data)
            start = self._stop()
            self.shards.append(Shard(file=name, sha256=sha256, start_window=start, stop_window=start + len(ids)))
            self.tokens[split] += int((doc >= 0).sum())

    def _stop(self) -> int:
        """Windows written so far."""
        return self.shards[-1].stop_window if self.shards else 0


def _read_shard(storage: Storage, corpus_id: str, shard: Shard) -> Windows:
    try:
        data = storage.read(paths.corpus_file(corpus_id, shard.file))
    except FileNotFoundError as error:
        raise CorruptError(
            f"{shard.file} of corpus {corpus_id} is gone. The next sweep, harvest or features job makes it again."
        ) from error
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        raise CorruptError(f"{shard.file} of corpus {corpus_id} differs from its manifest (sha256).")
    tensors = load(data)
    return Windows(tensors["ids"], tensors["doc"])


def _documents_table(rows: list[dict[str, Any]], n_train: int, held_out_doc: Ints) -> bytes:
    """documents.parquet: doc, part, split, characters, tokens, first_window (null where all its windows are gone).

    `held_out_doc` [n, context_size] are the document indices of the held-out windows that stayed.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    last = held_out_doc.max(axis=1)
    first = np.where(held_out_doc >= 0, held_out_doc, last[:, None]).min(axis=1)

    def first_window(doc: int, row: dict[str, Any]) -> int | None:
        if row["split"] == "train":
            return row["first_window"]
        place = int(np.searchsorted(last, doc))
        return n_train + place if place < len(last) and first[place] <= doc else None

    columns = {
        "doc": pa.array(range(len(rows)), pa.int32()),
        "part": pa.array([row["part"] for row in rows], pa.string()),
        "split": pa.array([row["split"] for row in rows], pa.string()),
        "characters": pa.array([row["characters"] for row in rows], pa.int64()),
        "tokens": pa.array([row["tokens"] for row in rows], pa.int64()),
        "first_window": pa.array([first_window(doc, row) for doc, row in enumerate(rows)], pa.int64()),
    }
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, compression="zstd")
    return out.getvalue()
