"""The code of a training batch: every entry, or only those that a feature fires in.

After the encoder's product, which is dense, a code has some tens of entries a token that are not 0, and only they bear
on the loss: the reconstruction is a sum of that many decoder rows, and the gradients of both weights are sums over the
same entries. So a step costs one dense product of [tokens, d_in] with [d_in, d_sae] instead of five, and what the
entries cost. The gradients are those of the dense formulas to rounding; above `SPARSE_BELOW` dense products are faster.

To autograd the entries are a plain tensor [n], so a loss is written once, whichever form its code has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from midiscover.cores import SPARSE_BELOW, SPARSE_BELOW_ON_GPU
from midiscover.sae.pattern import Pattern, kernels_of, places_of, positive
from midiscover.sae.products import Decoded, DecodedWithNorms, EncodedJump, EncodedRelu, Product

SPARSE_FROM = 2**25
"""Multiply-adds of x @ W_enc from which a sparse code is made; below, its many small calls take what they save."""
LOOKED_AT = 64
"""Tokens by which the share is estimated: it needs no pass over the whole, and depends on the batch alone."""


class Code(ABC):
    """Non-negative [tokens, d_sae] with what losses do with it."""

    tokens: int
    d_sae: int

    @abstractmethod
    def decode(self, decoder: Tensor, first: int = 0) -> Tensor:
        """features[:, first : first + rows] @ decoder; decoder [rows, d_out]: all of the features', or some."""

    def decode_with_norms(self, decoder: Tensor) -> tuple[Tensor, Tensor]:
        """`decode`, and the norms [d_sae] of the decoder's rows."""
        return self.decode(decoder), row_norms(decoder)

    @abstractmethod
    def total(self, weights: Tensor | None = None) -> Tensor:
        """Scalar: the sum over features, each times its `weights` [d_sae], mean over tokens."""

    @abstractmethod
    def fired(self) -> Tensor:
        """[d_sae] bool: whether a feature fires anywhere."""

    @abstractmethod
    def l0(self) -> Tensor:
        """Scalar: features that fire, mean over tokens."""

    @abstractmethod
    def dense(self) -> Tensor:
        """[tokens, d_sae], detached."""


class DenseCode(Code):
    """As one tensor."""

    def __init__(self, features: Tensor) -> None:
        self.features = features
        self.tokens, self.d_sae = features.shape

    def decode(self, decoder: Tensor, first: int = 0) -> Tensor:
        part = self.features if len(decoder) == self.d_sae else self.features[:, first : first + len(decoder)]
        return part @ decoder

    def total(self, weights: Tensor | None = None) -> Tensor:
        # Outside autocast: a sum over thousands of features, too many for bfloat16's 8 bits.
        with torch.autocast(self.features.device.type, enabled=False):
            if weights is None:
                return self.features.sum(-1, dtype=torch.promote_types(self.features.dtype, torch.float32)).mean()
            # (f @ w) instead of (f * w).sum(): one pass over the code and no [tokens, d_sae] intermediate.
            return (self.features.to(weights.dtype) @ weights).mean()

    def fired(self) -> Tensor:
        return (self.features.detach() > 0).any(0)

    def l0(self) -> Tensor:
        # A sum of bools takes ten times as long.
        return (self.features.detach() > 0).count_nonzero().float() / self.tokens

    def dense(self) -> Tensor:
        return self.features.detach()


class CountedCode(DenseCode):
    """As one tensor, with sums over its tokens that a kernel made on the way."""

    def __init__(self, features: Tensor, counts: Tensor, sums: Tensor | None = None) -> None:
        """counts, sums: [d_sae] of each feature, where it is above 0 and of its values; `sums` with a gradient."""
        super().__init__(features)
        self.counts, self.sums = counts, sums

    def total(self, weights: Tensor | None = None) -> Tensor:
        if self.sums is None:
            return super().total(weights)
        return (self.sums if weights is None else self.sums * weights).sum() / self.tokens

    def fired(self) -> Tensor:
        return self.counts > 0

    def l0(self) -> Tensor:
        return self.counts.sum().float() / self.tokens


class SparseCode(Code):
    """As values [n] at the places of a pattern; none is negative, some may be 0."""

    def __init__(self, values: Tensor, pattern: Pattern) -> None:
        self.values, self.pattern = values, pattern
        self.tokens, self.d_sae = pattern.tokens, pattern.d_sae

    def decode(self, decoder: Tensor, first: int = 0) -> Tensor:
        if len(decoder) == self.d_sae:
            return Decoded.apply(self.values, decoder, self.pattern)
        kept, pattern = self.pattern.part(first, len(decoder))
        return Decoded.apply(self.values[kept], decoder, pattern)

    def decode_with_norms(self, decoder: Tensor) -> tuple[Tensor, Tensor]:
        if self.pattern.kernels:
            return super().decode_with_norms(decoder)
        return DecodedWithNorms.apply(self.values, decoder, self.pattern)

    def total(self, weights: Tensor | None = None) -> Tensor:
        values = self.values if weights is None else self.values * self.pattern.spread(weights)
        return values.sum() / self.tokens

    def fired(self) -> Tensor:
        # Counted, for which no GPU has to be waited for; whole numbers add up to the same in any order.
        counts = torch.zeros(self.d_sae, dtype=torch.int32, device=self.values.device)
        return counts.index_add_(0, self.pattern.feature, (self.values.detach() > 0).int()) > 0

    def l0(self) -> Tensor:
        return (self.values.detach() > 0).count_nonzero().float() / self.tokens

    def dense(self) -> Tensor:
        return self.pattern.matrix(self.values.detach()).to_dense()


class PreActivations:
    """(x - b_dec) @ W_enc + bias of a training batch, of which a loss takes all, or what fires.

    x [tokens, d_in], without a gradient; W_enc [d_in, d_sae]; bias [d_sae]; b_dec [d_in], or None for a transcoder.
    `values` are without a gradient as well; what has one comes from `whole` and `at`.
    """

    def __init__(self, x: Tensor, encoder: Tensor, bias: Tensor, b_dec: Tensor | None) -> None:
        self.x, self.encoder, self.bias, self.b_dec = x, encoder, bias, b_dec
        # A W_enc in bfloat16 is the copy that `sae.update` keeps on a GPU.
        self.kernels = kernels_of(x.device) if encoder.dtype == torch.bfloat16 else None
        known = x.device.type == "cpu" or self.kernels is not None
        self.may_be_sparse = known and x.numel() * encoder.shape[1] >= SPARSE_FROM
        # Of a CPU's products only this one is in bfloat16, and says where entries are; these are computed anew.
        self.finds_places = self.may_be_sparse and x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        self.apart = self.may_be_sparse or self.kernels is not None
        with torch.set_grad_enabled(not self.apart and torch.is_grad_enabled()):
            if self.kernels:
                centred = x if b_dec is None else x - b_dec
                self.rows = centred.to(encoder.dtype)  # centred first: bfloat16 has 8 bits
                self._computed = torch.addmm(bias.to(encoder.dtype), self.rows, encoder)
            elif self.finds_places:
                self.rows = x
                self._computed = torch.addmm(bias, self._centred(), encoder)
            else:
                # Written so, b_dec's gradient needs no product of [tokens, d_sae] with [d_sae, d_in], a sixth of a
                # step, and the bias no pass of its own. On raw activations, whose mean is far from 0, the two terms
                # would cancel.
                self.rows = x
                self._computed = torch.addmm(bias if b_dec is None else bias - b_dec @ encoder, x, encoder)
        self.values = self._computed.detach()

    def whole(self) -> Tensor:
        """[tokens, d_sae]."""
        if not self.apart:
            return self._computed
        return Product.apply(self.rows, self.encoder, self.bias, self.b_dec, self.values, None)

    def _centred(self) -> Tensor:
        return self.x if self.b_dec is None else self.x - self.b_dec.detach()

    def at(self, pattern: Pattern) -> Tensor:
        """[n] at the places of a pattern; in float32 though `values` may be in bfloat16."""
        if self.finds_places:
            with torch.autocast("cpu", enabled=False):
                found = pattern.dots(self._centred(), self.encoder.detach().T) + self.bias.detach()[pattern.feature]
        else:
            found = self.values.view(-1)[pattern.token * pattern.d_sae + pattern.feature]
            found = found.float() if self.kernels else found
        return Product.apply(self.rows, self.encoder, self.bias, self.b_dec, found, pattern)

    def relu_at(self, pattern: Pattern) -> Tensor:
        """[tokens, d_sae]: relu of `whole` at the places of a pattern, zero elsewhere."""
        kept = torch.zeros_like(self.values, dtype=torch.bool)
        kept.view(-1).scatter_(0, pattern.token * pattern.d_sae + pattern.feature, True)
        return torch.where(kept, torch.relu(self.whole()), 0)

    def relu(self) -> Code:
        """relu of `whole`; where kernels are used, `values` is not to be read any more."""
        if not self.kernels:
            return DenseCode(torch.relu(self.whole()))
        sums, counts = self.kernels.relu_with_sums_(self.values)
        features, sums = EncodedRelu.apply(self.rows, self.encoder, self.bias, self.b_dec, self.values, sums)
        return CountedCode(features, counts, sums)

    def jump(self, threshold: Tensor, bandwidth: float) -> tuple[Code, Tensor]:
        """`whole` where it is above threshold [d_sae], and the mean count, as `JumpReluStep`; by a kernel."""
        assert self.kernels is not None, "elsewhere the step is JumpReluStep's"
        features, counts = self.kernels.jump(self.values, threshold.detach())
        count = counts.sum().float() / len(self.values)
        rest = (threshold, bandwidth, self.values, features, count)
        features, count = EncodedJump.apply(self.rows, self.encoder, self.bias, self.b_dec, *rest)
        return CountedCode(features, counts), count

    def top(self, k: int) -> Pattern:
        """The places of the k largest of each token."""
        tokens, d_sae = self.values.shape
        if self.kernels and d_sae <= self.kernels.WIDEST:
            token, feature, starts = self.kernels.top_of_tokens(self.values, k)
            return Pattern(token, feature, tokens, d_sae, starts)
        return Pattern.of_rows(self.values.topk(k, dim=-1, sorted=False).indices, d_sae)

    def top_of_batch(self, k: int) -> Pattern:
        """The places of the k * tokens largest of the batch, by a kernel."""
        assert self.kernels is not None, "on a CPU they are selected with their values"
        tokens, d_sae = self.values.shape
        token, feature, starts = self.kernels.top_of_batch(self.values, k * tokens)
        return Pattern(token, feature, tokens, d_sae, starts)

    def pattern(self, fires: Callable[[Tensor], Tensor]) -> Pattern | None:
        """The places where `fires`, bool of values [some tokens, d_sae], holds; None where a dense code is faster.

        None on a GPU as well: their number is not known before, and a step that waits for it costs what it saves.
        """
        tokens, d_sae = self.values.shape
        if not self.may_be_sparse or self.kernels:
            return None
        if _too_many(fires(some_tokens(self.values))):
            return None
        return Pattern.of_places(places_of(fires(self.values)), tokens, d_sae)

    def prefers_sparse(self, k: int) -> bool:
        """Whether a code of k features a token should be sparse."""
        below = SPARSE_BELOW_ON_GPU if self.kernels else SPARSE_BELOW
        return self.may_be_sparse and k <= below * self.values.shape[1]

    def columns(self, features: Tensor, firing: Tensor) -> PreActivations:
        """Those of some features, by index [m], no two the same; those not `firing` [m] bool fire nowhere."""
        bias = torch.where(firing, self.bias.index_select(0, features), -torch.inf)
        return PreActivations(self.x, self.encoder.T.index_select(0, features).T, bias, self.b_dec)


def product(features: Tensor, decoder: Tensor) -> Tensor:
    """features [..., d_sae] @ decoder [d_sae, d_out]; with no gradient to come, of what is not 0 where that pays."""
    gradient = torch.is_grad_enabled() and (features.requires_grad or decoder.requires_grad)
    if gradient or features.device.type != "cpu" or features.dtype != decoder.dtype:
        return features @ decoder
    if features.numel() * decoder.shape[1] < SPARSE_FROM or torch.is_autocast_enabled("cpu"):
        return features @ decoder
    flat = features.detach().reshape(-1, features.shape[-1])
    if _too_many(some_tokens(flat)):
        return features @ decoder
    places = places_of(flat != 0)
    found = Pattern.of_places(places, *flat.shape).times(flat.flatten()[places], decoder.detach())
    return found.view(*features.shape[:-1], -1)


def some_tokens(rows: Tensor) -> Tensor:
    """About `LOOKED_AT` of rows [tokens, d_sae], evenly spread, or all."""
    return rows[:: max(1, len(rows) // LOOKED_AT)]


def _too_many(sample: Tensor) -> bool:
    """Whether so much of a sample is not 0 that dense products are faster."""
    return int(sample.count_nonzero()) > SPARSE_BELOW * sample.numel()


def relu_code(pre: PreActivations) -> Code:
    """relu of pre-activations."""
    pattern = pre.pattern(positive)
    if pattern is None:
        return pre.relu()
    found = pre.at(pattern)
    return SparseCode(torch.relu(found) if pre.finds_places else found, pattern)


def row_norms(rows: Tensor) -> Tensor:
    """[n] norms of rows [n, d], with a gradient in one pass over them: autograd's own takes three."""
    return _RowNorms.apply(rows)


class _RowNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))
        ctx.save_for_backward(rows, norms)
        return norms

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        rows, norms = ctx.saved_tensors
        factors = torch.where(norms > 0, grads[0] / norms, 0)
        kernels = kernels_of(rows.device) if rows.dtype == torch.bfloat16 else None
        return kernels.scaled_rows(rows, factors) if kernels else rows * factors[:, None]
