"""Tensors to safetensors bytes and back without needless copies: one buffer out, views in.

The bytes are those of `safetensors.torch.save` (a test compares them), whose own reader and writer copy each tensor
twice. Knowing the header before a file is read lets the loader read activations straight into its pool.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_DTYPES = {
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "U8": torch.uint8,
}
"""In the order in which the reference implementation lays out their data: all stay aligned to their own size."""
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH = 8  # bytes of the header's length, at the start of the file
_MAX_HEADER = 100_000_000  # as in the reference implementation


class Spec(NamedTuple):
    """What a file says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


def ordered(specs: Mapping[str, Spec]) -> list[str]:
    """Names in the order in which their data lie in the file: by type, then by name."""
    rank = list(_DTYPES)
    return sorted(specs, key=lambda name: (rank.index(_NAMES[specs[name].dtype]), name))


def header(specs: Mapping[str, Spec]) -> bytes:
    """All bytes of a file before its data."""
    fields, end = {}, 0
    for name in ordered(specs):
        dtype, shape = specs[name]
        start, end = end, end + specs[name].bytes
        fields[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH, "little") + text


def encode(tensors: Mapping[str, Tensor]) -> bytearray | memoryview:
    """The file that holds `tensors`, from any device; each is copied once, from a GPU into memory it can write to."""
    specs = {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    head = header(specs)
    size = len(head) + sum(spec.bytes for spec in specs.values())
    data: bytearray | memoryview = bytearray()
    if any(tensor.is_cuda for tensor in tensors.values()):
        data = byte_view(torch.empty(size, dtype=torch.uint8, pin_memory=True))
    else:
        data = bytearray(size)
    data[: len(head)] = head
    start = len(head)
    for name in ordered(specs):
        if specs[name].bytes:
            _view(data, start, specs[name]).copy_(tensors[name])
        start += specs[name].bytes
    return data


def decode(data: bytearray) -> dict[str, Tensor]:
    """Tensors that share the memory of `data`. ValueError where it is not a whole safetensors file of known types."""
    length = int.from_bytes(data[:_LENGTH], "little")
    if len(data) < _LENGTH or length > min(_MAX_HEADER, len(data) - _LENGTH):
        raise ValueError("the file is shorter than its header says")
    tensors, start = {}, _LENGTH + length
    for name, entry in json.loads(data[_LENGTH:start]).items():
        if name == "__metadata__":
            continue
        spec = Spec(_DTYPES[entry["dtype"]], tuple(entry["shape"]))
        first, last = entry["data_offsets"]
        if last - first != spec.bytes or not 0 <= first <= last <= len(data) - start:
            raise ValueError(f"tensor {name!r} does not lie within the file")
        tensors[name] = _view(data, start + first, spec) if spec.bytes else torch.empty(spec.shape, dtype=spec.dtype)
    return tensors


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable where it is."""
    return tensor.view(torch.uint8).numpy().reshape(-1).data


def _view(data: bytearray | memoryview, start: int, spec: Spec) -> Tensor:
    return torch.frombuffer(data, dtype=spec.dtype, count=math.prod(spec.shape), offset=start).view(spec.shape)
