"""Held-out text in passages, and which features fire nowhere in each of them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from midiscover.corpus import Corpus
from midiscover.errors import CorpusError
from midiscover.features.explain import Passage, Reader
from midiscover.interpret import ENCODED_TOKENS, batches, hook_of, require_width
from midiscover.lm import LanguageModel
from midiscover.saes import LoadedSae

PASSAGES = 512
_BATCH_TOKENS = 4096


class Quiet(NamedTuple):
    """Passages of held-out text."""

    passages: list[Passage]
    fires: Tensor
    """bool [passages, d_sae]: whether the feature is above 0 at one of its tokens."""

    def of(self, feature: int) -> list[Passage]:
        """Those in which the feature is 0 everywhere."""
        return [self.passages[place] for place in (~self.fires[:, feature]).nonzero().flatten().tolist()]


def held_out_passages(
    lm: LanguageModel, name: str, sae: LoadedSae, corpus: Corpus, length: int, most: int = PASSAGES
) -> Quiet:
    """Up to `most` passages of `length` tokens, from windows spread evenly over the held-out text.

    name: of the SAE, for errors. Left out are the first token of a window, which training masks as well, and passages
    that hold padding or a special token. CorpusError where none is left.
    """
    size, train = corpus.manifest.context_size, corpus.manifest.windows["train"]
    length = min(length, size - 1)
    held_out = corpus.manifest.windows["held_out"]
    count = min(held_out, math.ceil(most / ((size - 1) // length)))
    windows = [corpus.windows(at, at + 1) for at in (train + held_out * i // count for i in range(count))]
    special = torch.tensor(_special_ids(lm), dtype=torch.long)
    reader, hook = Reader(lm.tokenizer), hook_of(name, sae)
    passages: list[Passage] = []
    fires: list[Tensor] = []
    for batch in batches([size] * count, _BATCH_TOKENS):
        ids = torch.cat([torch.from_numpy(windows[i].ids).long() for i in batch])
        real = torch.cat([torch.from_numpy(windows[i].doc) >= 0 for i in batch]) & ~torch.isin(ids, special)
        rows = lm.activations(ids, [hook])[hook].flatten(0, 1)
        require_width(lm, name, sae, hook, rows.shape[-1])
        fired = torch.cat([(sae.encode(part.float()) > 0).cpu() for part in rows.split(ENCODED_TOKENS)])
        for row, (text, usable) in enumerate(zip(ids, real, strict=True)):
            for start in range(1, size - length + 1, length):
                stretch = slice(start, start + length)
                if bool(usable[stretch].all()):
                    passages.append(reader.passage(text[stretch].tolist(), [0.0] * length))
                    fires.append(fired[row * size + start : row * size + start + length].any(0))
    if not fires:
        raise CorpusError(f"The held-out text of corpus {corpus.manifest.id} has no passage of {length} tokens.")
    return Quiet(passages[:most], torch.stack(fires[:most]))


def _special_ids(lm: LanguageModel) -> list[int]:
    tokenizer: Any = lm.tokenizer
    return list(tokenizer.all_special_ids)
