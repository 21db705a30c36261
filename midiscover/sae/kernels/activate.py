"""Activation functions and their gradients, with the sums over tokens that a loss asks for, in one pass."""

# Triton's own typing does not know how kernels are launched, nor its ranges.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_ROWS, TILE_COLUMNS, TILES = 8, 256, 16
"""A program reads TILES times a tile of the code."""
_LAUNCH = {"R": TILE_ROWS, "C": TILE_COLUMNS, "TILES": TILES, "num_warps": 4}


@triton.jit
def _relu(pre, features, sums, counts, tokens, d_sae, R: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr):
    block = tl.program_id(0)
    column = tl.program_id(1) * C + tl.arange(0, C)
    total = tl.zeros([R, C], tl.float32)
    count = tl.zeros([R, C], tl.int32)
    for tile in range(TILES):
        row = (block * TILES + tile) * R + tl.arange(0, R)
        inside = (row < tokens)[:, None] & (column < d_sae)[None, :]
        at = row.to(tl.int64)[:, None] * d_sae + column[None, :]
        value = tl.maximum(tl.load(pre + at, inside, other=0.0).to(tl.float32), 0.0)
        total += value
        count += (value > 0).to(tl.int32)
        tl.store(features + at, value.to(features.dtype.element_ty), inside)
    tl.store(sums + block.to(tl.int64) * d_sae + column, tl.sum(total, 0), column < d_sae)
    tl.store(counts + block.to(tl.int64) * d_sae + column, tl.sum(count, 0), column < d_sae)


def relu_with_sums_(pre: Tensor) -> tuple[Tensor, Tensor]:
    """relu of pre [tokens, d_sae] in its place; returns sums over the tokens [d_sae], and how many are above 0."""
    blocks, grid = _grid(pre)
    sums = torch.empty(blocks, pre.shape[1], dtype=torch.float32, device=pre.device)
    counts = torch.empty(blocks, pre.shape[1], dtype=torch.int32, device=pre.device)
    _relu[grid](pre, pre, sums, counts, *pre.shape, **_LAUNCH)
    return sums.sum(0), counts.sum(0)


@triton.jit
def _relu_backward(grad, column_grad, features, out, sums, tokens, d_sae, R: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr):  # noqa: E501  # fmt: skip
    block = tl.program_id(0)
    column = tl.program_id(1) * C + tl.arange(0, C)
    added = tl.load(column_grad + column, column < d_sae, other=0.0)
    total = tl.zeros([R, C], tl.float32)
    for tile in range(TILES):
        row = (block * TILES + tile) * R + tl.arange(0, R)
        inside = (row < tokens)[:, None] & (column < d_sae)[None, :]
        at = row.to(tl.int64)[:, None] * d_sae + column[None, :]
        value = tl.load(grad + at, inside, other=0.0).to(tl.float32) + added[None, :]
        value = tl.where(tl.load(features + at, inside, other=0.0).to(tl.float32) > 0, value, 0.0)
        total += value
        tl.store(out + at, value.to(out.dtype.element_ty), inside)
    tl.store(sums + block.to(tl.int64) * d_sae + column, tl.sum(total, 0), column < d_sae)


def relu_backward(grad: Tensor, column_grad: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """(grad + column_grad) where features > 0, else 0: [tokens, d_sae] in grad's type; and its sums over the tokens.

    grad, features [tokens, d_sae]; column_grad [d_sae] float32: what every token's entry of a feature gets.
    """
    blocks, grid = _grid(features)
    out = torch.empty_like(features)
    sums = torch.empty(blocks, features.shape[1], dtype=torch.float32, device=features.device)
    _relu_backward[grid](grad.contiguous(), column_grad.contiguous(), features, out, sums, *features.shape, **_LAUNCH)
    return out, sums.sum(0)


@triton.jit
def _jump(pre, threshold, features, counts, tokens, d_sae, R: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr):
    block = tl.program_id(0)
    column = tl.program_id(1) * C + tl.arange(0, C)
    cut = tl.load(threshold + column, column < d_sae, other=0.0)
    count = tl.zeros([R, C], tl.int32)
    for tile in range(TILES):
        row = (block * TILES + tile) * R + tl.arange(0, R)
        inside = (row < tokens)[:, None] & (column < d_sae)[None, :]
        at = row.to(tl.int64)[:, None] * d_sae + column[None, :]
        value = tl.load(pre + at, inside, other=float("-inf")).to(tl.float32)
        fires = value > cut[None, :]
        count += fires.to(tl.int32)
        tl.store(features + at, tl.where(fires, value, 0.0).to(features.dtype.element_ty), inside)
    tl.store(counts + block.to(tl.int64) * d_sae + column, tl.sum(count, 0), column < d_sae)


def jump(pre: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """pre [tokens, d_sae] where it is above threshold [d_sae], else 0; and on how many tokens each feature is."""
    blocks, grid = _grid(pre)
    features = torch.empty_like(pre)
    counts = torch.empty(blocks, pre.shape[1], dtype=torch.int32, device=pre.device)
    _jump[grid](pre, threshold, features, counts, *pre.shape, **_LAUNCH)
    return features, counts.sum(0)


@triton.jit
def _jump_backward(grad, pre, threshold, half_width, out, sums, near_grads, nears, tokens, d_sae, R: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr):  # noqa: E501  # fmt: skip
    block = tl.program_id(0)
    column = tl.program_id(1) * C + tl.arange(0, C)
    cut = tl.load(threshold + column, column < d_sae, other=0.0)
    total = tl.zeros([R, C], tl.float32)
    near_grad = tl.zeros([R, C], tl.float32)
    near_count = tl.zeros([R, C], tl.int32)
    for tile in range(TILES):
        row = (block * TILES + tile) * R + tl.arange(0, R)
        inside = (row < tokens)[:, None] & (column < d_sae)[None, :]
        at = row.to(tl.int64)[:, None] * d_sae + column[None, :]
        value = tl.load(pre + at, inside, other=float("-inf")).to(tl.float32)
        given = tl.load(grad + at, inside, other=0.0).to(tl.float32)
        near = tl.abs(value - cut[None, :]) < half_width
        near_grad += tl.where(near, given, 0.0)
        near_count += near.to(tl.int32)
        passed = tl.where(value > cut[None, :], given, 0.0)
        total += passed
        tl.store(out + at, passed.to(out.dtype.element_ty), inside)
    at = block.to(tl.int64) * d_sae + column
    tl.store(sums + at, tl.sum(total, 0), column < d_sae)
    tl.store(near_grads + at, tl.sum(near_grad, 0), column < d_sae)
    tl.store(nears + at, tl.sum(near_count, 0), column < d_sae)


def jump_backward(
    grad: Tensor, pre: Tensor, threshold: Tensor, bandwidth: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad where pre is above the threshold, else 0: [tokens, d_sae]; and three sums over the tokens, [d_sae].

    Of that; of grad where |pre - threshold| < bandwidth / 2; and on how many tokens that is so.
    """
    blocks, grid = _grid(pre)
    out = torch.empty_like(pre)
    sums, near_grads = (torch.empty(blocks, pre.shape[1], device=pre.device) for _ in range(2))
    nears = torch.empty(blocks, pre.shape[1], dtype=torch.int32, device=pre.device)
    given = (grad.contiguous(), pre, threshold, bandwidth / 2)
    _jump_backward[grid](*given, out, sums, near_grads, nears, *pre.shape, **_LAUNCH)
    return out, sums.sum(0), near_grads.sum(0), nears.sum(0)


def _grid(code: Tensor) -> tuple[int, tuple[int, int]]:
    blocks = triton.cdiv(code.shape[0], TILE_ROWS * TILES)
    return blocks, (blocks, triton.cdiv(code.shape[1], TILE_COLUMNS))
