"""Sums of rows and dot products at the places of a pattern; segments by token or by feature."""

# Triton's own typing does not know how kernels are launched, nor its ranges.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

UNROLLED, WIDE, WARPS = 4, 4096, 4
"""Rows that a program adds up at a time, how much of each, and its warps; by measurement, as all these."""
ENTRIES, COLUMNS = 16, 512
"""Rows whose dot products a program takes at a time, and how much of each."""


@triton.jit
def _weighted_rows(which, starts, weights, rows, out, d, N: tl.constexpr, D: tl.constexpr):
    segment = tl.program_id(0)
    at = tl.program_id(1) * D + tl.arange(0, D)
    inside = at < d
    begin = tl.load(starts + segment)
    end = tl.load(starts + segment + 1)
    total = tl.zeros([D], tl.float32)
    for first in range(begin, end, N):
        for i in tl.static_range(N):  # loads that do not wait for one another
            n = first + i
            held = tl.minimum(n, end - 1)
            row = tl.load(which + held).to(tl.int64)
            weight = tl.where(n < end, tl.load(weights + held).to(tl.float32), 0.0)
            total += weight * tl.load(rows + row * d + at, inside, other=0.0).to(tl.float32)
    tl.store(out + segment.to(tl.int64) * d + at, total.to(out.dtype.element_ty), inside)


def weighted_rows(which: Tensor, starts: Tensor, weights: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """[segments, d]: sums of weights[i] * rows[which[i]] for i from starts[s] to starts[s + 1].

    which, weights [n]; starts [segments + 1]; rows [_, d].
    """
    segments, d = len(starts) - 1, rows.shape[1]
    out = torch.empty(segments, d, dtype=dtype, device=rows.device)
    columns = min(WIDE, triton.next_power_of_2(d))
    _weighted_rows[segments, triton.cdiv(d, columns)](
        which, starts, weights, rows.contiguous(), out, d, N=UNROLLED, D=columns, num_warps=WARPS
    )
    return out


@triton.jit
def _row_dots(starts, feature, left, right, out, d, N: tl.constexpr, D: tl.constexpr):
    token = tl.program_id(0)
    begin = tl.load(starts + token)
    end = tl.load(starts + token + 1)
    for first in range(begin, end, N):
        n = first + tl.arange(0, N)
        row = tl.load(feature + n, n < end, other=0).to(tl.int64)
        total = tl.zeros([N, D], tl.float32)
        for start in range(0, d, D):
            at = start + tl.arange(0, D)
            one = tl.load(left + token.to(tl.int64) * d + at, at < d, other=0.0).to(tl.float32)
            tile = tl.load(right + row[:, None] * d + at[None, :], (n < end)[:, None] & (at < d)[None, :], other=0.0)
            total += tile.to(tl.float32) * one[None, :]
        tl.store(out + n, tl.sum(total, 1), n < end)


def row_dots(starts: Tensor, feature: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """[n] float32: dot products of left[t] with right[feature[i]] for i from starts[t] to starts[t + 1].

    starts [tokens + 1]; feature [n]; left [tokens, d]; right [d_sae, d].
    """
    out = torch.empty(len(feature), dtype=torch.float32, device=left.device)
    _row_dots[(len(left),)](
        starts, feature, left.contiguous(), right.contiguous(), out, left.shape[1], N=ENTRIES, D=COLUMNS, num_warps=8
    )
    return out


@triton.jit
def _segment_sums(starts, values, out, N: tl.constexpr):
    segment = tl.program_id(0)
    begin = tl.load(starts + segment)
    end = tl.load(starts + segment + 1)
    total = tl.zeros([N], tl.float32)
    for first in range(begin, end, N):
        n = first + tl.arange(0, N)
        total += tl.load(values + n, n < end, other=0.0).to(tl.float32)
    tl.store(out + segment, tl.sum(total, 0))


def segment_sums(starts: Tensor, values: Tensor) -> Tensor:
    """[segments] float32: sums of values[starts[s] : starts[s + 1]]."""
    out = torch.empty(len(starts) - 1, dtype=torch.float32, device=values.device)
    _segment_sums[(len(out),)](starts, values, out, N=128, num_warps=1)
    return out


@triton.jit
def _scaled_rows(rows, factors, out, d, D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, D)
    value = tl.load(rows + row * d + lane, lane < d, other=0.0).to(tl.float32) * tl.load(factors + row)
    tl.store(out + row * d + lane, value.to(out.dtype.element_ty), lane < d)


def scaled_rows(rows: Tensor, factors: Tensor) -> Tensor:
    """rows [n, d] times factors [n] float32."""
    out = torch.empty_like(rows)
    n, d = rows.shape
    _scaled_rows[(n,)](rows, factors.contiguous(), out, d, D=triton.next_power_of_2(d), num_warps=4)
    return out
