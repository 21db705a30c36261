"""The products of a training step, with gradients of their own: of whole codes or of their entries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from midiscover.sae.pattern import Pattern, kernels_of


class Decoded(torch.autograd.Function):
    """(values [n], decoder [d_sae, d_out], pattern) -> S @ decoder [tokens, d_out]."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, decoder: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(values, decoder)
        ctx.pattern = pattern
        return pattern.times(values, decoder)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, decoder = ctx.saved_tensors
        grad = grads[0].to(decoder.dtype)
        by_values = ctx.pattern.dots(grad, decoder) if ctx.needs_input_grad[0] else None
        by_decoder = ctx.pattern.transposed_times(values, grad) if ctx.needs_input_grad[1] else None
        return by_values, by_decoder, None


class DecodedWithNorms(torch.autograd.Function):
    """The same, and the norms of decoder's rows [d_sae]; both gradients of the decoder are written in one place."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, decoder: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
        norms = torch.linalg.vector_norm(decoder, dim=1)
        ctx.save_for_backward(values, decoder, norms)
        ctx.pattern = pattern
        return pattern.times(values, decoder), norms

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, decoder, norms = ctx.saved_tensors
        by_values = ctx.pattern.dots(grads[0], decoder) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return by_values, None, None
        by_decoder = ctx.pattern.transposed_times(values, grads[0])
        factors = torch.where(norms > 0, grads[1] / norms, 0)
        return by_values, by_decoder.addcmul_(decoder, factors[:, None]), None


class Product(torch.autograd.Function):
    """(x, W_enc, bias, b_dec, (x - b_dec) @ W_enc + bias, None), or its entries [n] and their pattern -> the fifth.

    x is centred already where W_enc is in bfloat16; what is whole may be in bfloat16 for itself.
    """

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
        (grad,), (x, encoder, b_dec), pattern = grads, ctx.saved_tensors, ctx.pattern
        if pattern is None:
            by_bias = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32))
        else:
            by_bias = pattern.sums(grad)
        if pattern is None and _halved(encoder):
            return *_of_halves(x, encoder, b_dec, grad, by_bias), None, None
        centred = x if b_dec is None or _halved(encoder) else x - b_dec
        if pattern is None:
            by_rows = (grad.T @ centred.to(grad.dtype)).to(encoder.dtype)
        else:
            by_rows = pattern.transposed_times(grad, centred)
        return None, by_rows.T, by_bias, _by_b_dec(encoder, b_dec, by_bias), None, None


class EncodedRelu(torch.autograd.Function):
    """(x - b_dec, W_enc, bias, b_dec, relu((x - b_dec) @ W_enc + bias), its sums) -> the fifth and sixth.

    In one pass over the code, back as well.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        encoder: Tensor,
        bias: Tensor,  # noqa: ARG004
        b_dec: Tensor | None,
        features: Tensor,
        sums: Tensor,
    ) -> tuple[Tensor, Tensor]:
        features = features.view_as(features)
        ctx.save_for_backward(x, encoder, b_dec, features)
        return features, sums.view_as(sums)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, encoder, b_dec, features = ctx.saved_tensors
        kernels = kernels_of(x.device)
        assert kernels is not None, "they made the sums"
        grad, by_bias = kernels.relu_backward(grads[0], grads[1], features)
        return *_of_halves(x, encoder, b_dec, grad, by_bias), None, None


class EncodedJump(torch.autograd.Function):
    """(x - b_dec, W_enc, bias, b_dec, threshold, bandwidth, pre-activations, features, count) -> the last two.

    The gradients are those of `JumpReluStep`, in one pass over the code.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        encoder: Tensor,
        bias: Tensor,  # noqa: ARG004
        b_dec: Tensor | None,
        threshold: Tensor,
        bandwidth: float,
        pre: Tensor,
        features: Tensor,
        count: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, encoder, b_dec, threshold, pre)
        ctx.bandwidth = bandwidth
        return features.view_as(features), count.view_as(count)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, encoder, b_dec, threshold, pre = ctx.saved_tensors
        kernels = kernels_of(x.device)
        assert kernels is not None, "they made the features"
        grad, by_bias, near_grads, nears = kernels.jump_backward(grads[0], pre, threshold, ctx.bandwidth)
        by_threshold = -(threshold * near_grads + nears * (grads[1] / len(x))) / ctx.bandwidth
        return *_of_halves(x, encoder, b_dec, grad, by_bias), by_threshold, None, None, None, None


def _halved(encoder: Tensor) -> bool:
    """Whether W_enc is the copy of `sae.update`; rows are centred then."""
    return encoder.dtype == torch.bfloat16


def _of_halves(
    x: Tensor, encoder: Tensor, b_dec: Tensor | None, grad: Tensor, by_bias: Tensor
) -> tuple[None, Tensor, Tensor, Tensor | None]:
    """Gradients of (x, W_enc, bias, b_dec) from a whole code's `grad` [tokens, d_sae] and its sums over the tokens."""
    return None, (grad.T @ x).T, by_bias, _by_b_dec(encoder, b_dec, by_bias)


def _by_b_dec(encoder: Tensor, b_dec: Tensor | None, by_bias: Tensor) -> Tensor | None:
    """The gradient of b_dec, which acts on every pre-activation as a bias does."""
    return None if b_dec is None else -(encoder @ by_bias.to(encoder.dtype)).to(b_dec.dtype)
