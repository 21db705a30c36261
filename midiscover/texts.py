"""Text sources: what `corpus.source` names, its identity, and its documents one after another.

A source is `builtin` or `builtin-code`, a file (.parquet, .jsonl, .jsonl.gz, .json.gz, .txt), a folder or s3:// prefix
of such files (all below it, in sorted order), or else a hub data set, which is streamed. A .json.gz file holds one JSON
object a line, like .jsonl. Among several files a .txt file is one document; a .txt file that stands alone is cut at
blank lines into documents of at least 2,000 characters. Rows without text are left out. Nothing is tokenised here.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from midiscover import builtin_text, text_files
from midiscover.config import CorpusConfig, EvaluateConfig
from midiscover.errors import CorpusError
from midiscover.store.storage import open_store

HUB_SECONDS = 3.0
"""How long the hub may take to name a commit; a name look-up that hangs is given up a second later."""

CHOICES = (
    "`builtin`, `builtin-code`, a .parquet, .jsonl, .jsonl.gz, .json.gz or .txt file, a folder or s3:// prefix of such "
    "files, or the id of a hub data set"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceIdentity:
    """Which text it is, wherever it lies."""

    name: str
    """`builtin` or `builtin-code`, the name of the file or folder, the s3:// address, or the hub id."""
    digest: str
    """Hex digest that changes with the text: a sha256, or the commit of a hub data set."""
    licence: str | None = None
    revision: str | None = None
    """Commit of a hub data set."""
    parts: tuple[str, ...] = ("text",)
    """Names of the parts that `documents` returns."""


def is_local(source: str) -> bool:
    """Whether a source lies on this machine alone: neither comes with Python, nor is in a bucket or on the hub."""
    return source not in builtin_text.PARTS and "://" not in source and text_files.find(source) is not None


def push_text(source: str, store: str | None) -> tuple[str, int, bool]:
    """Put a local source into a store; see `text_files.put`. CorpusError where it holds none, or what is no text."""
    return text_files.put(source, open_store(store))


def resolve_source(cfg: CorpusConfig) -> SourceIdentity:
    """Find the source and identify its text.

    Reads the first document, so that a wrong column or an empty file is known here. CorpusError in under 5 seconds
    where the source is not there, holds no text, or is given settings of a hub data set and is none; hashing large
    files for the first time takes longer than that.
    """
    if cfg.source in builtin_text.PARTS:
        _refuse_hub_settings(cfg)
        return SourceIdentity(
            name=cfg.source,
            digest=builtin_text.digest(cfg.source),
            licence=builtin_text.LICENCES[cfg.source],
            parts=builtin_text.PARTS[cfg.source],
        )
    files = text_files.find(cfg.source)
    if files is None:
        return _resolve_hub(cfg)
    _refuse_hub_settings(cfg)
    with closing(text_files.read(files, cfg.text_field)) as texts:
        if next(texts, None) is None:
            raise CorpusError(f"{cfg.source} holds no text: every document in it is empty.")
    return SourceIdentity(name=text_files.name_of(cfg.source), digest=text_files.digest(files))


def _refuse_hub_settings(cfg: CorpusConfig) -> None:
    """They would choose nothing, and another split would yet be another corpus of the same text."""
    for name in ("subset", "split", "revision"):
        if getattr(cfg, name) != getattr(CorpusConfig(), name):
            raise CorpusError(
                f"corpus.{name} is {getattr(cfg, name)}, but {cfg.source} is no hub data set, and no other source has "
                f"a {name}: leave corpus.{name} out."
            )


def foreign_config(corpus: CorpusConfig, evaluate: EvaluateConfig) -> CorpusConfig | None:
    """The corpus settings of the text in `evaluate.foreign_source`: those of the run but for what names its text."""
    if evaluate.foreign_source is None:
        return None
    return replace(
        corpus,
        source=evaluate.foreign_source,
        subset=evaluate.foreign_subset,
        split=evaluate.foreign_split,
        revision=None,
        text_field=evaluate.foreign_text_field or corpus.text_field,
        max_samples=None,
        max_tokens=evaluate.foreign_tokens,
    )


def resolve_foreign(corpus: CorpusConfig, evaluate: EvaluateConfig) -> SourceIdentity | None:
    """`resolve_source` of the foreign text; None where none is set."""
    cfg = foreign_config(corpus, evaluate)
    if cfg is None:
        return None
    try:
        return resolve_source(cfg)
    except CorpusError as error:
        named = re.sub(r"\bcorpus\.(source|subset|split|text_field)\b", r"evaluate.foreign_\1", str(error))
        raise CorpusError(named) from error


def documents(cfg: CorpusConfig, identity: SourceIdentity) -> list[Iterator[str]]:
    """The documents of each part named in `identity.parts`, in an order that only text and settings decide.

    Texts are never empty and can be encoded as UTF-8. CorpusError where a file turns out to be broken, or the files are
    not those any more that `resolve_source` saw.
    """
    if cfg.source in builtin_text.PARTS:
        return [iter(part) for part in builtin_text.shuffled(cfg.source, cfg.seed)]
    files = _unchanged(cfg, identity)
    return [_hub_documents(cfg, identity) if files is None else text_files.read(files, cfg.text_field)]


def refuse_changed(cfg: CorpusConfig, identity: SourceIdentity) -> None:
    """CorpusError where the files are not those any more that `resolve_source` saw: what was read may be of both."""
    if cfg.source not in builtin_text.PARTS:
        _unchanged(cfg, identity)


def _unchanged(cfg: CorpusConfig, identity: SourceIdentity) -> list[text_files.TextFile] | None:
    """The files of the source; None for a hub data set, whose commits never change."""
    files = text_files.find(cfg.source)
    if files is not None and text_files.digest(files) != identity.digest:
        raise CorpusError(f"{cfg.source} has changed since it was looked at; run the same command again.")
    return files


def _resolve_hub(cfg: CorpusConfig) -> SourceIdentity:
    name = cfg.source
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise CorpusError(f"{name} does not exist. corpus.source is {CHOICES}.")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    def ask() -> Any:
        return HfApi().dataset_info(name, revision=cfg.revision, timeout=HUB_SECONDS)

    try:
        info = _within(HUB_SECONDS + 1, ask)
    except GatedRepoError as error:
        raise CorpusError(f"The hub shows data set {name} only to those it has let in: set HF_TOKEN.") from error
    except RevisionNotFoundError as error:
        raise CorpusError(f"The hub's data set {name} has no revision {cfg.revision}.") from error
    except RepositoryNotFoundError as error:
        raise CorpusError(
            f"{name} is no file or folder here, and the hub has no data set of this id (a private one needs HF_TOKEN). "
            f"corpus.source is {CHOICES}."
        ) from error
    except Exception as error:  # the hub client lets through what its HTTP library of the day raises
        raise CorpusError(
            f"{name} is no file or folder here, and the hub, which may have a data set of this id, did not answer "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}). "
            f"corpus.source is {CHOICES}."
        ) from error
    licence = info.card_data.get("license") if info.card_data else None
    licence = ", ".join(licence) if isinstance(licence, list) else licence
    return SourceIdentity(name=name, digest=info.sha, revision=info.sha, licence=licence)


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """`call()`, or TimeoutError: a name look-up without a network obeys no timeout of the HTTP library's."""
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["value"] = call()
        except BaseException as error:  # raised again below, in the caller's thread
            outcome["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if "error" in outcome:
        raise outcome["error"]
    if "value" not in outcome:
        raise TimeoutError(f"no answer in {seconds:g} s")
    return outcome["value"]


def _hub_documents(cfg: CorpusConfig, identity: SourceIdentity) -> Iterator[str]:
    import datasets

    where = f"{cfg.source}, split {cfg.split}" + (f", subset {cfg.subset}" if cfg.subset else "")

    def rows() -> Iterator[Any]:
        try:
            stream = datasets.load_dataset(
                cfg.source, name=cfg.subset, split=cfg.split, revision=identity.revision, streaming=True
            )
            if cfg.text_field in (getattr(stream, "features", None) or ()):  # images and sound would be decoded
                stream = stream.select_columns([cfg.text_field])
            yield from stream
        except Exception as error:  # of `datasets`, of the HTTP library of the day, or of the files' formats
            raise CorpusError(f"Data set {where} can't be read: {str(error) or type(error).__name__}") from error

    for number, row in enumerate(rows(), 1):
        text = text_files.text_of(row, cfg.text_field, f"{where}, row {number}")
        if text:
            yield text
