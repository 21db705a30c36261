"""Where an SAE comes from, read from its record: the settings of its model and text, and the model itself.

A record holds the settings under which the activations of its hooks can be had again (`config`), and the digests of
what they were made of (`lineage`), so that a model that merely has the same name is found out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from midiscover.config import RunConfig
from midiscover.configio import build_config
from midiscover.errors import CorruptError, ModelError, UserError
from midiscover.models import ModelIdentity, resolve_model


def run_config(record: Mapping[str, Any]) -> RunConfig:
    """The settings that an SAE's activations were read under: model, corpus, harvest (its hooks only) and evaluate."""
    tree = record.get("config")
    if not isinstance(tree, Mapping):
        raise CorruptError(f"The record of {record.get('id')} lacks 'config', the settings of its model and text.")
    return build_config({"name": "origin", **tree})


def resolve_origin(record: Mapping[str, Any] | None, store: str | None, model: str | None = None) -> ModelIdentity:
    """The language model whose activations an SAE reads, here on this machine.

    `model` replaces where the record says that it lies. UserError for an SAE without a record; ModelError where the
    model is not there, or where it is another one than the SAE was made on.
    """
    if record is None:
        raise UserError("This SAE has no record.json, so its language model is unknown; `midiscover import` makes one.")
    config = run_config(record).model
    if model is not None:
        config = replace(config, id=model, revision=None)
    identity = resolve_model(config, store)
    made_on = record["lineage"]["model"]
    if identity.digest != made_on["digest"]:
        raise ModelError(
            f"{identity.name} is not the model of {record['id']}: its digest is {identity.digest[:12]}, and the SAE "
            f"was made on {made_on['name']} with digest {made_on['digest'][:12]}."
        )
    return identity
