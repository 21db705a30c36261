"""A foreign text for the evaluation: excerpts of many documents as windows, and the rows of a hook on them.

An SAE that reconstructs the text it was trained on may fail on another (seen: FVU 0.34 held-out, 0.71 on other prose).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from midiscover.config import CorpusConfig
from midiscover.corpus import CorpusManifest
from midiscover.errors import CorpusError
from midiscover.live import usable_rows
from midiscover.mixing import Mixed, mix
from midiscover.packing import Layout, Packer, Windows
from midiscover.reading import Reader
from midiscover.texts import SourceIdentity, documents, refuse_changed
from midiscover.train import Pair

EXCERPTS = 16
"""A text of a few thousand tokens would be one or two long documents; each gives at most about this part of it."""
CHARACTERS_PER_TOKEN = 4
MIN_EXCERPT = 2000
"""Characters of an excerpt where the whole text is small: some windows' worth, so that most tokens have a context."""


def foreign_windows(cfg: CorpusConfig, source: SourceIdentity, tokenizer: object, like: CorpusManifest) -> Windows:
    """Windows, shaped as those of the corpus `like`, of `cfg.max_tokens` tokens of a text, or of less where it ends.

    cfg: of `texts.foreign_config`. The middle of each long document is taken: beginnings are licences and imports.
    CorpusError where there is no token, and where the text changed while it was read.
    """
    assert cfg.max_tokens is not None
    limit = max(MIN_EXCERPT, cfg.max_tokens * CHARACTERS_PER_TOKEN // EXCERPTS)
    parts = {name: _excerpts(texts, limit) for name, texts in zip(source.parts, documents(cfg, source), strict=True)}
    packer = Packer(Layout(context_size=like.context_size, bos_id=like.bos_id, eos_id=like.eos_id, pad_id=like.pad_id))
    for number, document in enumerate(mix(parts, cfg, tokenizer, Mixed())):  # type: ignore[arg-type]
        packer.add(number, document.ids)
    refuse_changed(cfg, source)
    windows = packer.take(rest=True)
    if windows is None:
        raise CorpusError(f"{source.name}, the evaluate.foreign_source, holds no text.")
    return windows


def _excerpts(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        start = max(0, len(text) - limit) // 2
        yield text[start : start + limit]


def foreign_rows(reader: Reader, windows: Windows, hooks: tuple[str, str], batch_size: int) -> Iterator[Tensor | Pair]:
    """Usable rows of a hook, or pairs where the second is another: [at most batch_size, d] bfloat16.

    Masked and rounded as in a harvest: the same windows as a corpus would give the same rows as its blocks.
    """
    step = max(1, reader.config.block_tokens // reader.context_size)  # the median norm is that of a block
    starts = range(0, len(windows.ids), step)
    pieces = ((start, Windows(*(part[start : start + step] for part in windows))) for start in starts)
    return usable_rows(reader, pieces, hooks, batch_size)
