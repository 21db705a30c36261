"""The seed project's files: written by it, or by our export as a bundle."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from midiscover.errors import CorruptError
from midiscover.publish.checks import Failed, Skipped, Subject, check, expect, fail_for
from midiscover.publish.checks_exports import place
from midiscover.publish.checks_weights import fitting
from midiscover.publish.importers import SEED_MODEL, read_checkpoint

KINDS = ("sae", "bundle")
ANALYSIS, METADATA = "feature_analysis.json", "neuronpedia_metadata.json"
DECODER, TOP = "decoder_weights.npy", "top_100_features.json"
SEED_FILES = (SEED_MODEL, ANALYSIS, METADATA, DECODER, TOP)
_TOLERANCE = 1e-6
_PNG = b"\x89PNG\r\n\x1a\n"


def _name(subject: Subject, name: str) -> str:
    return place(subject, "bundle") + name


def _checkpoint(subject: Subject) -> dict[str, Any]:
    name = _name(subject, SEED_MODEL)
    return subject.part(name, lambda: read_checkpoint(subject.read(name), name))


def _weights(subject: Subject) -> dict[str, Tensor]:
    """The tensors of sae_model.pt under SAELens' names."""
    state = _checkpoint(subject)["state"]
    if "encoder.weight" not in state:
        return state
    named = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight", "b_dec": "decoder.bias"}
    return {ours: state[theirs].T if ours.startswith("W") else state[theirs] for ours, theirs in named.items()}


def _decoder(subject: Subject) -> np.ndarray[Any, Any]:
    name = _name(subject, DECODER)
    return subject.part(name, lambda: _array(name, subject.read(name)))


def _array(name: str, data: bytes) -> np.ndarray[Any, Any]:
    try:
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise Failed(f"{name} can't be read: {error}") from None


def _features(subject: Subject, name: str, *, in_charge: bool = False) -> list[dict[str, Any]]:
    """The rows of feature_analysis.json or top_100_features.json; in_charge: by the rules of `require`."""
    path = _name(subject, name)
    return (subject.require if in_charge else subject.part)(path, lambda: _rows(path, subject.read(path)))


def _rows(path: str, data: bytes) -> list[dict[str, Any]]:
    """A list of objects, or the `features` of an object."""
    try:
        found = json.loads(data)
    except ValueError as error:
        raise Failed(f"{path} is not readable as JSON: {error}") from None
    found = found.get("features") if isinstance(found, dict) else found
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise Failed(f"{path} holds no list of features")
    return found


def _number(row: dict[str, Any]) -> Any:
    return row.get("feature_idx", row.get("index"))


@check("bundle", KINDS)
def seed_files_are_there(subject: Subject) -> None:
    """Each file of the seed project is there."""
    where = place(subject, "bundle")
    fail_for([f"there is no {where}{name}" for name in SEED_FILES if not subject.has(where + name)])


@check("bundle", KINDS)
def seed_model_loads(subject: Subject) -> str:
    """sae_model.pt loads with weights_only=True and holds tensors and a config."""
    name = _name(subject, SEED_MODEL)
    found = subject.require(name, lambda: _loaded(subject, name))
    return f"{len(found['state'])} tensors"


def _loaded(subject: Subject, name: str) -> dict[str, Any]:
    try:
        return read_checkpoint(subject.read(name), name)
    except CorruptError as error:
        raise Failed(str(error)) from None


@check("bundle", KINDS)
def seed_model_is_sound(subject: Subject) -> str:
    """Its tensors are finite, and W_enc and W_dec fit each other."""
    weights = _weights(subject)
    fail_for([f"{name} holds numbers that are not finite" for name, v in weights.items() if not v.isfinite().all()])
    enc, dec = weights["W_enc"], weights["W_dec"]
    expect(enc.shape[1] == dec.shape[0], f"W_enc is {list(enc.shape)} and W_dec {list(dec.shape)}")
    return f"{enc.shape[0]} to {enc.shape[1]}"


@check("bundle", KINDS)
def seed_model_is_this_sae(subject: Subject) -> None:
    """sae_model.pt holds the weights of this SAE."""
    found, ours = _checkpoint(subject)["state"], fitting(subject)
    if "encoder.weight" in found:
        found = _weights(subject)
        # x @ W + b there, (x - b_dec) @ W + b here.
        ours = {**ours, "b_enc": ours["b_enc"] - ours["b_dec"] @ ours["W_enc"]}
    fail_for([f"{name} is missing" for name in ours if name not in found])
    apart = [n for n, v in ours.items() if v.shape != found[n].shape or (v - found[n]).abs().max() > _scale(v)]
    fail_for([f"{name} differs" for name in apart])


def _scale(values: Tensor) -> float:
    return _TOLERANCE * max(1.0, float(values.abs().max()))


@check("bundle", KINDS)
def decoder_array_is_the_decoder(subject: Subject) -> str:
    """decoder_weights.npy is the decoder of sae_model.pt."""
    name = _name(subject, DECODER)
    found = torch.from_numpy(np.array(subject.require(name, lambda: _array(name, subject.read(name)))))
    decoder = _weights(subject)["W_dec"]
    fits = [form for form in (decoder, decoder.T) if form.shape == found.shape]  # the seed's own is transposed
    expect(bool(fits), f"it is {list(found.shape)}, and the decoder {list(decoder.shape)}")
    apart = min(float((found.double() - form.double()).abs().max()) for form in fits)
    expect(apart <= _scale(decoder), f"it is {apart:.2g} apart")
    return f"{list(found.shape)}"


@check("bundle", KINDS)
def analysis_has_every_feature(subject: Subject) -> str:
    """feature_analysis.json has every feature once."""
    rows, d_sae = _features(subject, ANALYSIS, in_charge=True), len(_weights(subject)["W_dec"])
    indices = [_number(row) for row in rows]
    if not all(isinstance(index, int) for index in indices):
        raise Failed("a feature has no feature_idx")
    expect(sorted(indices) == list(range(d_sae)), f"it has {len(set(indices))} of {d_sae} features in {len(rows)} rows")
    return f"{d_sae:,} features"


@check("bundle", KINDS)
def top_features_are_features(subject: Subject) -> str:
    """top_100_features.json has at most 100 features, all of them in feature_analysis.json."""
    top, rows = _features(subject, TOP, in_charge=True), _features(subject, ANALYSIS)
    alive = any(row.get("activation_frequency") for row in rows)
    expect(alive <= len(top) <= 100, f"it has {len(top)}")
    known = {_number(row) for row in rows}
    fail_for([f"{_number(row)!r} is none of them" for row in top if _number(row) not in known])
    return f"{len(top)} features"


@check("bundle", KINDS)
def seed_metadata_fits(subject: Subject) -> str:
    """neuronpedia_metadata.json names the model and the hook, and the widths of the weights."""
    found, encoder = subject.require_json(_name(subject, METADATA)), _weights(subject)["W_enc"]
    fail_for([f"{name} is missing" for name in ("model_name", "layer") if found.get(name) in (None, "")])
    told = found.get("d_model"), found.get("d_sae")
    expect(
        told == tuple(encoder.shape),
        f"it says {told[0]} and {told[1]}, and the encoder has {list(encoder.shape)}",
    )
    return f"{found['model_name']} {found['layer']}"


@check("bundle", KINDS)
def pictures_are_whole(subject: Subject) -> str:
    """Every picture is a whole PNG."""
    folder = f"{place(subject, 'bundle')}visualizations"
    pictures = [name for name in subject.names(folder) if name.endswith(".png")]
    if not pictures:
        raise Skipped("there are no pictures")
    problems = [f"{Path(name).name} {problem}" for name in pictures if (problem := png_problem(subject.read(name)))]
    fail_for(problems)
    return f"{len(pictures)} pictures"


def png_problem(data: bytes) -> str | None:
    """What keeps bytes from being a PNG: every chunk's checksum, and that all pixels are there."""
    if not data.startswith(_PNG):
        return "is no PNG"
    at, kinds, pixels = len(_PNG), [], b""
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 4 : at + 8 + length]
        checksum = data[at + 8 + length : at + 12 + length]
        if len(checksum) < 4 or zlib.crc32(body) != struct.unpack(">I", checksum)[0]:
            return "is damaged"
        kinds.append(body[:4])
        pixels += body[4:] if body[:4] == b"IDAT" else b""
        at += 12 + length
    if not kinds or kinds[-1] != b"IEND":
        return "is cut short"
    try:
        zlib.decompress(pixels)
    except zlib.error:
        return "is damaged"
    return None
