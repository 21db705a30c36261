"""Held-out measurements of trained SAEs: from stored activations, and with the reconstruction spliced into the model.

Everything is measured on text that training did not see, with the folded weights as they are saved. A transcoder reads
one hook and stands in for another: it is judged by what it makes of the second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from midiscover.corpus import Corpus
from midiscover.errors import ModelError
from midiscover.lm import LanguageModel
from midiscover.memory import spliced_windows
from midiscover.prefix import Prefix
from midiscover.reading import position_mask, row_mask
from midiscover.sae.base import Sae
from midiscover.sae.metrics import MetricSums, recovered, recovered_error
from midiscover.store.blocks import Mask
from midiscover.train import Pair


def reconstruction_metrics(
    saes: Mapping[str, Sae], batches: Iterable[Tensor | Pair], mean: Tensor
) -> dict[str, MetricSums]:
    """L0, FVU, explained variances, cosine, MSE, density and dead features of SAEs that read one hook.

    saes: id -> folded SAE; batches: raw activations [tokens, d_in], or for transcoders pairs with what they predict;
    mean: [d_out], about which FVU measures variance.
    """
    sums = {name: MetricSums(sae.d_sae, mean) for name, sae in saes.items()}
    device = next(iter(saes.values())).W_enc.device
    for batch in batches:
        if isinstance(batch, Pair):
            x, y = (part.to(device).float() for part in batch)
        else:
            x = y = batch.to(device).float()
        for name, sae in saes.items():
            with torch.no_grad():
                features = sae.encode(x)
                sums[name].update(y, sae.output(x, features), features)
    return sums


@dataclass(kw_only=True, slots=True)
class SplicedSums:
    """Sums over predicted tokens with one replacement in place."""

    ce: list[float] = field(default_factory=list)
    """Of each window."""
    kl: float = 0.0


@dataclass(kw_only=True, slots=True)
class SpliceResult:
    """Cross-entropy and KL of the model clean, with the hook's output zeroed, and with each SAE's reconstruction."""

    tokens: int = 0
    clean: list[float] = field(default_factory=list)
    """Cross-entropy of each window."""
    zero: SplicedSums = field(default_factory=SplicedSums)
    saes: dict[str, SplicedSums] = field(default_factory=dict)

    def metrics(self, sae_id: str) -> dict[str, float | int | None]:
        """The ce_* and kl_* entries of record.json; in nats per token."""
        n = max(self.tokens, 1)
        spliced = self.saes[sae_id]
        clean, zero, sae = (sum(windows) / n for windows in (self.clean, self.zero.ce, spliced.ce))
        kl_zero, kl_sae = self.zero.kl / n, spliced.kl / n
        return {
            "ce_tokens": self.tokens,
            "ce_clean": clean,
            "ce_zero": zero,
            "ce_sae": sae,
            "ce_recovered": recovered(clean, zero, sae),
            "ce_recovered_error": recovered_error(self.clean, self.zero.ce, spliced.ce),
            "kl_zero": kl_zero,
            "kl_sae": kl_sae,
            "kl_recovered": recovered(0.0, kl_zero, kl_sae),
        }


def splice_metrics(
    model: LanguageModel,
    corpus: Corpus,
    hook: str,
    saes: Mapping[str, Sae],
    *,
    output_hook: str | None = None,
    max_tokens: int,
    mask_first: bool,
    outlier_norm: float,
    on_tokens: Callable[[int], None] = lambda _tokens: None,
) -> SpliceResult:
    """Splice each SAE's reconstruction into the model over held-out windows, up to `max_tokens` tokens: as many
    windows, evenly spread over all, for neighbours are of one document.

    For transcoders, `output_hook` is what they predict: it is replaced by what they make of `hook` in the same pass,
    and zeroed in the zeroed run. Rows that training left out (special tokens, first position, outliers at either hook)
    keep their own activation, in the zeroed run as well: an SAE is judged where it is meant to be used. Predictions of
    padding are not counted. ModelError where `output_hook` runs before `hook`.
    """
    result = SpliceResult(saes={name: SplicedSums() for name in saes})
    first = corpus.manifest.windows["train"]
    held_out = corpus.manifest.windows["held_out"]
    count = min(held_out, max(1, max_tokens // corpus.manifest.context_size))
    places = [first + held_out * i // count for i in range(count)]
    special = torch.tensor(sorted(model.tokenizer.all_special_ids), dtype=torch.int32)
    prefix = Prefix(model.model, {hook, output_hook or hook})
    at_once = spliced_windows(corpus.manifest.context_size, model.vocab_size)
    for start in range(0, count, at_once):
        parts = [corpus.windows(place, place + 1) for place in places[start : start + at_once]]
        ids, doc = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True))
        codes = position_mask(ids, doc, special, mask_first=mask_first)
        splice = _Splice(hook, output_hook or hook, codes, outlier_norm)
        _splice_batch(model, prefix, splice, saes, ids, result, on_tokens)
    return result


def _splice_batch(
    model: LanguageModel,
    prefix: Prefix,
    splice: _Splice,
    saes: Mapping[str, Sae],
    ids: Tensor,
    result: SpliceResult,
    on_tokens: Callable[[int], None],
) -> None:
    device = model.device
    tokens = ids.to(device, torch.long)
    attention = (splice.codes != Mask.PADDING).long().to(device)
    counted = (attention[:, 1:] == 1) & (attention[:, :-1] == 1)
    targets = [row[some] for row, some in zip(tokens[:, 1:], counted, strict=True)]

    def run(replace: dict[str, Callable[[Tensor], Tensor]]) -> Tensor:
        return model.logits(tokens, attention_mask=attention, replace=replace)

    def measure(sums: SplicedSums, function: Callable[[Tensor], Tensor]) -> None:
        with prefix.skipped():
            logits = run(splice.of(function))
        for p, q, wanted in zip(clean, log_probabilities(logits, counted), targets, strict=True):
            sums.ce.append(_cross_entropy(q, wanted))
            sums.kl += divergence_(p, q)
        on_tokens(tokens.numel())

    with prefix.kept():
        logits = run({})
    prefix.check(lambda: run({}), logits)
    clean = list(log_probabilities(logits, counted))
    del logits  # as large as what every replacement makes
    on_tokens(tokens.numel())
    result.tokens += int(counted.sum())
    result.clean += [_cross_entropy(p, wanted) for p, wanted in zip(clean, targets, strict=True)]
    measure(result.zero, _zero)
    for name, sae in saes.items():
        measure(result.saes[name], sae)


def log_probabilities(logits: Tensor, counted: Tensor) -> Iterator[Tensor]:
    """[predictions, vocabulary] float32 of each window: those of its next tokens that count.

    logits [windows, tokens, vocabulary]; counted [windows, tokens - 1] bool. One window's table is small enough that
    a process keeps its memory; where all were made at once, they took as long as half of the model's pass.
    """
    for window, some in zip(logits[:, :-1], counted, strict=True):
        yield log_softmax(window[some].float(), dim=-1)


def divergence_(log_p: Tensor, log_q: Tensor) -> float:
    """KL(p, q), summed over rows [n, vocabulary]; `log_q` is overwritten."""
    return -float(log_p.exp().mul_(log_q.sub_(log_p)).sum(-1).double().sum())


def _zero(x: Tensor) -> Tensor:
    return x.new_zeros(1)


@dataclass(frozen=True, slots=True)
class _Splice:
    """What is replaced in a batch of windows."""

    hook: str
    output_hook: str
    codes: Tensor
    """[windows, context_size], from `position_mask`."""
    outlier_norm: float

    def of(self, function: Callable[[Tensor], Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
        """Replacements for one pass: `output_hook` becomes `function` of `hook`, both [rows, d], but in masked rows."""
        if self.hook == self.output_hook:
            return {self.hook: lambda value: self._put(function, value, value)}
        read: list[Tensor] = []

        def keep(value: Tensor) -> Tensor:
            read.append(value.clone())  # modules may change their input in place later
            return value

        def put(value: Tensor) -> Tensor:
            if not read:
                raise ModelError(
                    f"'{self.output_hook}' runs before '{self.hook}', so nothing that reads the second can stand in "
                    "for the first; choose an output hook further up."
                )
            return self._put(function, read[0], value)

        return {self.hook: keep, self.output_hook: put}

    def _put(self, function: Callable[[Tensor], Tensor], read: Tensor, value: Tensor) -> Tensor:
        x, y = (part.flatten(0, 1).float() for part in (read, value))
        usable = self._usable(x) if read is value else self._usable(x) & self._usable(y)
        with torch.no_grad():
            out = torch.where(usable[:, None], function(x), y)
        return out.to(value.dtype).view_as(value)

    def _usable(self, rows: Tensor) -> Tensor:
        mask = row_mask(self.codes.flatten(), rows.norm(dim=-1).cpu(), self.outlier_norm)
        return (mask == Mask.USABLE).to(rows.device)


def _cross_entropy(log_probabilities: Tensor, targets: Tensor) -> float:
    return -float(log_probabilities.gather(-1, targets[:, None]).double().sum())
