"""A foreign text for the evaluation: excerpts of many documents as windows, and the rows of a hook on them.

An SAE that reconstructs the text it was trained on may fail on another (seen: FVU 0.34 held-out, 0.71 on other prose).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from midiscover.config import CorpusConfig, HarvestConfig
from midiscover.corpus import CorpusManifest
from midiscover.errors import CorpusError
from midiscover.harvest import position_mask, row_mask
from midiscover.lm import LanguageModel
from midiscover.mixing import Mixed, mix
from midiscover.packing import Layout, Packer, Windows
from midiscover.store.blocks import Mask
from midiscover.texts import SourceIdentity, documents
from midiscover.train import Pair

EXCERPTS = 16
"""A text of a few thousand tokens would be one or two long documents; each gives at most about this part of it."""
CHARACTERS_PER_TOKEN = 4
MIN_EXCERPT = 2000
"""Characters of an excerpt where the whole text is small: some windows' worth, so that most tokens have a context."""
BATCH_TOKENS = 4096
"""Tokens of a forward pass."""


def foreign_windows(cfg: CorpusConfig, source: SourceIdentity, tokenizer: object, like: CorpusManifest) -> Windows:
    """Windows, shaped as those of the corpus `like`, of `cfg.max_tokens` tokens of a text, or of less where it ends.

    cfg: of `texts.foreign_config`. The middle of each long document is taken: beginnings are licences and imports.
    CorpusError where there is no token.
    """
    assert cfg.max_tokens is not None
    limit = max(MIN_EXCERPT, cfg.max_tokens * CHARACTERS_PER_TOKEN // EXCERPTS)
    parts = {name: _excerpts(texts, limit) for name, texts in zip(source.parts, documents(cfg, source), strict=True)}
    packer = Packer(Layout(context_size=like.context_size, bos_id=like.bos_id, eos_id=like.eos_id, pad_id=like.pad_id))
    for number, document in enumerate(mix(parts, cfg, tokenizer, Mixed())):  # type: ignore[arg-type]
        packer.add(number, document.ids)
    windows = packer.take(rest=True)
    if windows is None:
        raise CorpusError(f"{source.name}, the evaluate.foreign_source, holds no text.")
    return windows


def _excerpts(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        start = max(0, len(text) - limit) // 2
        yield text[start : start + limit]


def foreign_rows(
    model: LanguageModel,
    windows: Windows,
    hook: str,
    output_hook: str,
    *,
    harvest: HarvestConfig,
    batch_size: int,
) -> Iterator[Tensor | Pair]:
    """Usable rows of a hook, or pairs where `output_hook` is another: [at most batch_size, d] bfloat16.

    Masked and rounded as in a harvest: the same windows as a corpus would give the same rows as its blocks.
    """
    special = torch.tensor(sorted(model.tokenizer.all_special_ids), dtype=torch.int32)
    hooks = dict.fromkeys((hook, output_hook))
    step = max(1, harvest.block_tokens // windows.ids.shape[1])  # the median norm is that of a block
    for start in range(0, len(windows.ids), step):
        ids, doc = (torch.from_numpy(part[start : start + step]) for part in windows)
        codes = position_mask(ids, doc, special, mask_first=harvest.mask_first).flatten()
        acts = _activations(model, ids, doc, list(hooks))
        usable = torch.ones(len(codes), dtype=torch.bool)
        for value in acts.values():
            usable &= row_mask(codes, value.float().norm(dim=-1).cpu(), harvest.outlier_norm) == Mask.USABLE
        rows = {name: value[usable.to(value.device)].bfloat16().split(batch_size) for name, value in acts.items()}
        for x, y in zip(rows[hook], rows[output_hook], strict=True):
            if len(x):
                yield x if output_hook == hook else Pair(x, y)


def _activations(model: LanguageModel, ids: Tensor, doc: Tensor, hooks: list[str]) -> dict[str, Tensor]:
    """{hook: [rows, d]} of windows [n, context_size]."""
    size = max(1, BATCH_TOKENS // ids.shape[1])
    found: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
    for part, padding in zip(ids.split(size), (doc == -1).split(size), strict=True):
        attention = (~padding).long() if bool(padding.any()) else None
        for hook, value in model.activations(part.long(), hooks, attention_mask=attention).items():
            found[hook].append(value.flatten(0, 1))
    return {hook: torch.cat(values) for hook, values in found.items()}
