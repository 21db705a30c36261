"""The code of a training batch: every entry, or only those that a feature fires in.

After the encoder's product, which is dense, a code has some tens of entries a token that are not 0, and only they bear
on the loss: the reconstruction is a sum of that many decoder rows, and the gradients of both weights are sums over the
same entries. So a step costs one dense product of [tokens, d_in] with [d_in, d_sae] instead of five, and what the
entries cost. The gradients are those of the dense formulas to rounding; above `SPARSE_BELOW` dense products are faster.

To autograd the entries are a plain tensor [n], so a loss is written once, whichever form its code has.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)  # once a process, on stderr

SPARSE_BELOW = 0.12
"""Share of entries that fire below which a sparse code is made. By measurement: tests/bench/step.py."""
SPARSE_FROM = 2**25
"""Multiply-adds of x @ W_enc from which a sparse code is made; below, its many small calls take what they save."""
LOOKED_AT = 64
"""Tokens by which the share is estimated: it needs no pass over the whole, and depends on the batch alone."""
SPARSE_DEVICES = ("cpu",)


class Code(ABC):
    """Non-negative [tokens, d_sae] with what losses do with it."""

    tokens: int
    d_sae: int

    @abstractmethod
    def decode(self, decoder: Tensor, first: int = 0) -> Tensor:
        """features[:, first : first + rows] @ decoder; decoder [rows, d_out]: all of the features', or some."""

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


class SparseCode(Code):
    """As values [n] at the places of a pattern; none is negative, some may be 0."""

    def __init__(self, values: Tensor, pattern: Pattern) -> None:
        self.values, self.pattern = values, pattern
        self.tokens, self.d_sae = pattern.tokens, pattern.d_sae

    def decode(self, decoder: Tensor, first: int = 0) -> Tensor:
        if len(decoder) == self.d_sae:
            return _Decoded.apply(self.values, decoder, self.pattern)
        kept, pattern = self.pattern.part(first, len(decoder))
        return _Decoded.apply(self.values[kept], decoder, pattern)

    def total(self, weights: Tensor | None = None) -> Tensor:
        values = self.values if weights is None else self.values * self.pattern.spread(weights)
        return values.sum() / self.tokens

    def fired(self) -> Tensor:
        found = torch.zeros(self.d_sae, dtype=torch.bool, device=self.values.device)
        found[self.pattern.feature[self.values > 0]] = True
        return found

    def l0(self) -> Tensor:
        return (self.values.detach() > 0).count_nonzero().float() / self.tokens

    def dense(self) -> Tensor:
        return self.pattern.matrix(self.values.detach()).to_dense()


class Pattern:
    """Places in [tokens, d_sae], by token: those of token t are `starts[t]` to `starts[t + 1]`."""

    def __init__(self, token: Tensor, feature: Tensor, tokens: int, d_sae: int) -> None:
        """token, feature: [n] int64 of each place, tokens rising."""
        self.token, self.feature, self.tokens, self.d_sae = token, feature, tokens, d_sae

    @classmethod
    def of_places(cls, places: Tensor, tokens: int, d_sae: int) -> Pattern:
        """From [n] token * d_sae + feature, rising."""
        token = places // d_sae
        return cls(token, places - token * d_sae, tokens, d_sae)

    @classmethod
    def of_rows(cls, features: Tensor, d_sae: int) -> Pattern:
        """From the features [tokens, k] of each token."""
        tokens, k = features.shape
        return cls(torch.arange(tokens).repeat_interleave(k), features.flatten(), tokens, d_sae)

    @cached_property
    def starts(self) -> Tensor:
        """[tokens + 1]."""
        return torch.searchsorted(self.token, torch.arange(self.tokens + 1))

    @cached_property
    def by_feature(self) -> tuple[Tensor, Tensor]:
        """[n] the places' numbers by feature, and [d_sae + 1] where each feature's begin."""
        order = self.feature.argsort(stable=True)
        return order, torch.searchsorted(self.feature[order], torch.arange(self.d_sae + 1))

    def times(self, values: Tensor, rows: Tensor) -> Tensor:
        """S @ rows: [tokens, d] from rows [d_sae, d]."""
        return _sums_of_rows(self.feature, self.starts, values, rows)

    def transposed_times(self, values: Tensor, rows: Tensor) -> Tensor:
        """S.T @ rows: [d_sae, d] from rows [tokens, d]."""
        order, starts = self.by_feature
        return _sums_of_rows(self.token[order], starts, values[order], rows)

    def dots(self, left: Tensor, right: Tensor) -> Tensor:
        """[n] dot products of left [tokens, d] with right [d_sae, d] at each place."""
        return torch.sparse.sampled_addmm(
            self.matrix(left.new_zeros(len(self.token))), left, right.T, beta=0.0
        ).values()

    def sums(self, values: Tensor) -> Tensor:
        """[d_sae] sums of values [n] by feature."""
        return values.new_zeros(self.d_sae).index_add_(0, self.feature, values)

    def spread(self, each: Tensor) -> Tensor:
        """[n] for each place what is its feature's of `each` [d_sae]."""
        return _Spread.apply(each, self)

    def part(self, first: int, count: int) -> tuple[Tensor, Pattern]:
        """Numbers of the places in some features, and these places as a pattern of their own."""
        kept = ((self.feature >= first) & (self.feature < first + count)).nonzero()[:, 0]
        return kept, Pattern(self.token[kept], self.feature[kept] - first, self.tokens, count)

    def matrix(self, values: Tensor) -> Tensor:
        """S as PyTorch's compressed rows."""
        size = (self.tokens, self.d_sae)
        return torch.sparse_csr_tensor(self.starts, self.feature, values, size=size, check_invariants=False)


def _sums_of_rows(which: Tensor, starts: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """[len(starts) - 1, d]: weighted sums of rows[which[starts[i] : starts[i + 1]]]."""
    return embedding_bag(which, rows, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)


class PreActivations:
    """(x - b_dec) @ W_enc + bias of a training batch, of which a loss takes all, or what fires.

    x [tokens, d_in], without a gradient; W_enc [d_in, d_sae]; bias [d_sae]; b_dec [d_in], or None for a transcoder.
    `values` are without a gradient as well; what has one comes from `whole` and `at`.
    """

    def __init__(self, x: Tensor, encoder: Tensor, bias: Tensor, b_dec: Tensor | None) -> None:
        self.x, self.encoder, self.bias, self.b_dec = x, encoder, bias, b_dec
        # Not where products run in half the precision, which the sparse kernels do not know.
        known = x.device.type in SPARSE_DEVICES and not torch.is_autocast_enabled(x.device.type)
        self.may_be_sparse = known and x.numel() * encoder.shape[1] >= SPARSE_FROM
        with torch.set_grad_enabled(not self.may_be_sparse and torch.is_grad_enabled()):
            # Written so, b_dec's gradient needs no product of [tokens, d_sae] with [d_sae, d_in], a sixth of a step,
            # and the bias no pass of its own. On raw activations, whose mean is far from 0, the two terms would cancel.
            self._computed = torch.addmm(bias if b_dec is None else bias - b_dec @ encoder, x, encoder)
        self.values = self._computed.detach()

    def whole(self) -> Tensor:
        """[tokens, d_sae]."""
        if not self.may_be_sparse:
            return self._computed
        return _Product.apply(self.x, self.encoder, self.bias, self.b_dec, self.values, None)

    def at(self, pattern: Pattern) -> Tensor:
        """[n] at the places of a pattern."""
        found = self.values.view(-1)[pattern.token * pattern.d_sae + pattern.feature]
        return _Product.apply(self.x, self.encoder, self.bias, self.b_dec, found, pattern)

    def pattern(self, fires: Callable[[Tensor], Tensor]) -> Pattern | None:
        """The places where `fires`, bool of values [some tokens, d_sae], holds; None where a dense code is faster."""
        tokens, d_sae = self.values.shape
        if not self.may_be_sparse:
            return None
        if _too_many(fires(some_tokens(self.values))):
            return None
        return Pattern.of_places(places_of(fires(self.values)), tokens, d_sae)

    def prefers_sparse(self, k: int) -> bool:
        """Whether a code of k features a token should be sparse."""
        return self.may_be_sparse and k <= SPARSE_BELOW * self.values.shape[1]

    def columns(self, features: Tensor) -> PreActivations:
        """Those of some features, by index [m]."""
        return PreActivations(self.x, self.encoder[:, features], self.bias[features], self.b_dec)


def product(features: Tensor, decoder: Tensor) -> Tensor:
    """features [..., d_sae] @ decoder [d_sae, d_out]; with no gradient to come, of what is not 0 where that pays."""
    gradient = torch.is_grad_enabled() and (features.requires_grad or decoder.requires_grad)
    if gradient or features.device.type not in SPARSE_DEVICES or features.dtype != decoder.dtype:
        return features @ decoder
    if features.numel() * decoder.shape[1] < SPARSE_FROM or torch.is_autocast_enabled("cpu"):
        return features @ decoder
    flat = features.detach().flatten(0, -2)
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


def places_of(mask: Tensor) -> Tensor:
    """[n] token * d_sae + feature of what holds in [tokens, d_sae], rising."""
    if mask.device.type == "cpu":  # torch's own takes twice as long
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero()[:, 0]


def relu_code(pre: PreActivations) -> Code:
    """relu of pre-activations."""
    pattern = pre.pattern(lambda values: values > 0)
    return DenseCode(torch.relu(pre.whole())) if pattern is None else SparseCode(pre.at(pattern), pattern)


class _Spread(torch.autograd.Function):
    """each[feature]; autograd's own backward pass adds up in any order where there are several threads."""

    @staticmethod
    def forward(ctx: Any, each: Tensor, pattern: Pattern) -> Tensor:
        ctx.pattern = pattern
        return each[pattern.feature]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.pattern.sums(grads[0]), None


def row_norms(rows: Tensor) -> Tensor:
    """[n] norms of rows [n, d], with a gradient in one pass over them: autograd's own takes three."""
    return _RowNorms.apply(rows)


class _RowNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        norms = rows.norm(dim=1)
        ctx.save_for_backward(rows, norms)
        return norms

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        rows, norms = ctx.saved_tensors
        return rows * torch.where(norms > 0, grads[0] / norms, 0)[:, None]


class _Decoded(torch.autograd.Function):
    """(values [n], decoder [d_sae, d_out], pattern) -> S @ decoder [tokens, d_out]."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, decoder: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(values, decoder)
        ctx.pattern = pattern
        return pattern.times(values, decoder)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, decoder = ctx.saved_tensors
        by_values = ctx.pattern.dots(grads[0], decoder) if ctx.needs_input_grad[0] else None
        by_decoder = ctx.pattern.transposed_times(values, grads[0]) if ctx.needs_input_grad[1] else None
        return by_values, by_decoder, None


class _Product(torch.autograd.Function):
    """(x, W_enc, bias, b_dec, (x - b_dec) @ W_enc + bias, None), or its entries [n] and their pattern -> the fifth."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        encoder: Tensor,
        bias: Tensor,  # noqa: ARG004
        b_dec: Tensor | None,
        found: Tensor,
        pattern: Pattern | None,
    ) -> Tensor:
        ctx.save_for_backward(x, encoder, b_dec)
        ctx.pattern = pattern
        return found.view_as(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, encoder, b_dec) = grads, ctx.saved_tensors
        by_bias = grad.sum(0) if ctx.pattern is None else ctx.pattern.sums(grad)
        centred = x if b_dec is None else x - b_dec
        by_encoder = centred.T @ grad if ctx.pattern is None else ctx.pattern.transposed_times(grad, centred).T
        return None, by_encoder.contiguous(), by_bias, None if b_dec is None else -(encoder @ by_bias), None, None
