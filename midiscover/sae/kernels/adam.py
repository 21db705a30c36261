"""Adam, clipping, unit rows and the copy in half the precision, in one pass over a parameter."""

# Triton's own typing does not know how kernels are launched, nor its ranges.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _adam(weight, half, grad, first, second, scale, knobs, beta1, rest1, beta2, rest2, eps, d, size, HALVED: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr):  # noqa: E501  # fmt: skip
    lane = tl.arange(0, D)
    at = tl.program_id(0).to(tl.int64) * d + lane
    inside = (lane < d) & (at < size)
    w = tl.load(weight + at, inside, other=0.0)
    g = tl.load(grad + at, inside, other=0.0).to(tl.float32) * tl.load(scale)
    if UNIT:  # a unit row only turns: what points along it is taken off
        g -= tl.sum(g * w, 0) * w
    m = tl.load(first + at, inside, other=0.0) * beta1 + g * rest1
    v = tl.load(second + at, inside, other=0.0) * beta2 + g * g * rest2
    w -= tl.load(knobs) * m / (tl.sqrt(v) * tl.load(knobs + 1) + eps)
    if UNIT:
        w /= tl.maximum(tl.sqrt(tl.sum(w * w, 0)), 1e-8)
    tl.store(first + at, m, inside)
    tl.store(second + at, v, inside)
    tl.store(weight + at, w, inside)
    if HALVED:
        tl.store(half + at, w.to(half.dtype.element_ty), inside)


def adam_(
    weight: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    half: Tensor | None = None,
    scale: Tensor,
    knobs: Tensor,
    betas: tuple[float, float],
    unit: bool = False,
    eps: float = 1e-8,
) -> None:
    """One step of Adam on `weight` float32 in one pass over memory; `half` gets its new value in bfloat16.

    All are contiguous and have its shape, [rows, d] or a vector's. grad is multiplied by the scalar tensor `scale`
    first; first and second are the moments; knobs [2]: the learning rate over 1 - beta1^t, and (1 - beta2^t)^-1/2.
    With `unit` the rows keep norm 1: gradients are projected before, rows divided after.
    """
    d = weight.shape[-1] if weight.ndim > 1 else min(1024, weight.numel())
    beta1, beta2 = betas
    _adam[(triton.cdiv(weight.numel(), d),)](
        weight, weight if half is None else half, grad, first, second, scale, knobs,
        beta1, 1 - beta1, beta2, 1 - beta2, eps, d, weight.numel(),
        HALVED=half is not None, UNIT=unit, D=triton.next_power_of_2(d), num_warps=8 if d > 1024 else 4,
    )  # fmt: skip
