"""The largest entries of a code, of each token or of the whole batch."""

# Triton's own typing does not know how kernels are launched, nor its ranges.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false, reportAttributeAccessIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COUNTED = 8192
"""Entries that a program counts by their digits."""
WIDEST = 65536
"""Entries of a row that one program holds at most."""


@triton.jit
def _keys(values, inside):
    """bfloat16 as integers of the same order, 0 to 65535; -1 for what lies outside."""
    bits = tl.load(values, inside, other=0).to(tl.int32) & 0xFFFF
    return tl.where(inside, tl.where(bits >= 0x8000, 0xFFFF - bits, bits + 0x8000), -1)


@triton.jit
def _top_key(values, least, free, d_sae, k, F: tl.constexpr, G: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, F)
    key = _keys(values + token * d_sae + at, at < d_sae)
    if G:
        at = F + tl.arange(0, G)
        rest = _keys(values + token * d_sae + at, at < d_sae)
    reached = 0  # the largest key that at least k entries reach
    for i in tl.static_range(16):
        tried = reached | (1 << (15 - i))
        count = tl.sum((key >= tried).to(tl.int32), 0)
        if G:
            count += tl.sum((rest >= tried).to(tl.int32), 0)
        reached = tl.where(count >= k, tried, reached)
    above = tl.sum((key > reached).to(tl.int32), 0)
    if G:
        above += tl.sum((rest > reached).to(tl.int32), 0)
    tl.store(least + token, reached)
    tl.store(free + token, k - above)


@triton.jit
def _key_counts(values, prefix, counts, size, SHIFT: tl.constexpr, N: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    at = block * N + tl.arange(0, N)
    key = _keys(values + at, at < size)
    least = tl.load(prefix)
    digit = tl.arange(0, 16)
    found = tl.zeros([16], tl.int32)
    for i in tl.static_range(1, 16):
        found = tl.where(digit == i, tl.sum((key >= (least | (i << SHIFT))).to(tl.int32), 0), found)
    tl.store(counts + block * 16 + digit, found)


@triton.jit
def _row_counts(values, cut, above, equal, d_sae, C: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    least = tl.load(cut)
    more = tl.zeros([C], tl.int32)
    same = tl.zeros([C], tl.int32)
    for start in range(0, d_sae, C):
        at = start + tl.arange(0, C)
        key = _keys(values + token * d_sae + at, at < d_sae)
        more += (key > least).to(tl.int32)
        same += (key == least).to(tl.int32)
    tl.store(above + token, tl.sum(more, 0))
    tl.store(equal + token, tl.sum(same, 0))


@triton.jit
def _places(values, least, free, starts, tokens, features, d_sae, C: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    cut = tl.load(least + token)
    equals = tl.load(free + token)  # of the entries with just that key, so many are taken
    place = tl.load(starts + token)
    for start in range(0, d_sae, C):
        at = start + tl.arange(0, C)
        key = _keys(values + token * d_sae + at, at < d_sae)
        equal = (key == cut).to(tl.int32)
        kept = ((key > cut) | ((key == cut) & (tl.cumsum(equal, 0) <= equals))).to(tl.int32)
        number = place + tl.cumsum(kept, 0) - 1
        tl.store(features + number, at.to(tl.int64), kept > 0)
        tl.store(tokens + number, at.to(tl.int64) * 0 + token, kept > 0)
        equals -= tl.sum(equal, 0)
        place += tl.sum(kept, 0)


def top_of_tokens(values: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest entries of each token of values [tokens, d_sae] bfloat16; of equal ones the first.

    Returns token and feature of each [tokens * k] int64, rising, and where each token's begin [tokens + 1].
    """
    tokens, d_sae = values.shape
    least, free = (torch.empty(tokens, dtype=torch.int32, device=values.device) for _ in range(2))
    bits = values.view(torch.int16)
    # A row in two parts, each a power of 2: 20,480 are 16,384 and 4,096, and not 32,768.
    first = 1 << (d_sae.bit_length() - 1)
    rest = triton.next_power_of_2(d_sae - first) if d_sae > first else 0
    _top_key[(tokens,)](bits, least, free, d_sae, k, F=first, G=rest, num_warps=max(4, min(16, first // 1024)))
    starts = torch.arange(0, (tokens + 1) * k, k, device=values.device)
    return *_written(bits, least, free, starts, tokens * k), starts


def top_of_batch(values: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` largest entries of values [tokens, d_sae] bfloat16; of equal ones the first. As `top_of_tokens`.

    Their least key is found digit by digit, four bits at a time; nothing waits for the device.
    """
    bits, device = values.view(torch.int16), values.device
    tokens, d_sae = values.shape
    cut = torch.zeros((), dtype=torch.int32, device=device)
    blocks = triton.cdiv(bits.numel(), COUNTED)
    counts = torch.empty(blocks, 16, dtype=torch.int32, device=device)
    for shift in (12, 8, 4, 0):
        _key_counts[(blocks,)](bits, cut, counts, bits.numel(), SHIFT=shift, N=COUNTED, num_warps=8)
        digit = (counts.sum(0)[1:] >= count).sum()  # how many of the fifteen still reach enough
        cut = cut | (digit.int() << shift)
    above, equal = (torch.empty(tokens, dtype=torch.int32, device=device) for _ in range(2))
    _row_counts[(tokens,)](bits, cut, above, equal, d_sae, C=min(1024, triton.next_power_of_2(d_sae)), num_warps=4)
    before = equal.cumsum(0) - equal
    free = torch.minimum((count - above.sum() - before).clamp(min=0), equal).int()
    starts = torch.cat([torch.zeros(1, dtype=torch.int64, device=device), (above + free).cumsum(0)])
    return *_written(bits, cut.expand(tokens).contiguous(), free, starts, count), starts


def _written(bits: Tensor, least: Tensor, free: Tensor, starts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    token, feature = (torch.empty(count, dtype=torch.int64, device=bits.device) for _ in range(2))
    d_sae = bits.shape[1]
    width = min(1024, triton.next_power_of_2(d_sae))
    _places[(len(bits),)](bits, least, free, starts, token, feature, d_sae, C=width, num_warps=4)
    return token, feature
