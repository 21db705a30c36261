"""The state of a pack in training as bytes: a safetensors file, nothing that runs code. The store moves the bytes."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from midiscover.errors import CorruptError

VERSION = 2


def pack_state(tensors: dict[str, Tensor], fields: dict[str, Any]) -> bytes:
    """Tensors and JSON fields as one safetensors file; tensors are copied to the CPU."""
    flat = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    return save(flat | {"fields": _as_tensor({"v": VERSION, **fields})})


def unpack_state(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of `pack_state`. CorruptError where the bytes are no such file."""
    try:
        tensors = load(data)
        fields = json.loads(bytes(tensors.pop("fields").tolist()))
    except Exception as error:
        raise CorruptError(f"A checkpoint of a pack can't be read: {error}.") from error
    if fields.pop("v") != VERSION:
        raise CorruptError("A checkpoint of a pack was written by another version of miDiscover.")
    return tensors, fields


def _as_tensor(fields: dict[str, Any]) -> Tensor:
    # safetensors.torch.load drops file metadata, so the JSON travels as a byte tensor.
    return torch.frombuffer(bytearray(json.dumps(fields, allow_nan=True).encode()), dtype=torch.uint8)
