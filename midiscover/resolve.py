"""A config made definite: which model, which text, which SAEs, under which ids. Runs nothing, loads no torch.

Every driver and `midiscover config` begin here, so that what is shown is what runs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from midiscover import ids
from midiscover.config import RunConfig, SaePoint
from midiscover.configio import expand_grid
from midiscover.errors import ConfigError
from midiscover.models import HookTable, ModelIdentity, hook_table, resolve_model
from midiscover.texts import SourceIdentity, resolve_source


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSae:
    """One SAE of the grid with everything that is known before it is trained."""

    id: str
    point: SaePoint
    d_in: int
    d_sae: int

    def row(self) -> dict[str, object]:
        """The plain-table entries that need no training."""
        sae = self.point.sae
        return {
            "sae_id": self.id,
            "hook": self.point.hook,
            "layer": ids.hook_layer(self.point.hook),
            "kind": sae.kind,
            "l1": sae.l1_coefficient if sae.kind == "standard" else None,
            "k": sae.k if sae.kind == "topk" else None,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "seed": self.point.train.seed,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """A run with its ids."""

    config: RunConfig
    model: ModelIdentity
    table: HookTable
    source: SourceIdentity
    corpus_id: str
    harvest_id: str
    evaluation_id: str
    sweep_id: str
    hooks: dict[str, int]
    """Hook path -> d_in."""
    saes: tuple[PlannedSae, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """SAEs that read the same stream, trained by one process."""

    id: str
    hook: str
    saes: tuple[PlannedSae, ...]


def resolve(config: RunConfig) -> Resolved:
    """Look up model, hooks and text, and name everything. UserError within seconds where one is not there."""
    if not config.harvest.hooks:
        raise ConfigError(
            "harvest.hooks is empty; name at least one module path (`midiscover inspect MODEL` lists them)."
        )
    model = resolve_model(config.model)
    table = hook_table(model, context_size=config.corpus.context_size)
    table.require_attention(config.model.attention)
    if table.context_length is not None and config.corpus.context_size > table.context_length:
        raise ConfigError(
            f"corpus.context_size is {config.corpus.context_size}, and {table.model} reads at most "
            f"{table.context_length} tokens; lower it."
        )
    hooks = {hook: table.require(hook).d_in for hook in config.harvest.hooks}
    source = resolve_source(config.corpus)
    corpus = ids.corpus_id(config.corpus, source_digest=source.digest, tokenizer_digest=model.tokenizer_digest)
    harvest = ids.harvest_id(config.model, config.harvest, model_digest=model.digest, corpus=corpus)
    saes = tuple(_planned(point, harvest, hooks[point.hook]) for point in expand_grid(config))
    evaluation = ids.evaluation_id(config.evaluate)
    return Resolved(
        config=config,
        model=model,
        table=table,
        source=source,
        corpus_id=corpus,
        harvest_id=harvest,
        evaluation_id=evaluation,
        sweep_id=ids.sweep_id(config.name, [sae.id for sae in saes], evaluation),
        hooks=hooks,
        saes=saes,
    )


def auto_pack_size(saes: Sequence[PlannedSae], slots: int) -> int | None:
    """SAEs at most in a pack so that `slots` devices have work; None where whole groups are enough for them."""
    groups = make_packs(saes, None, {sae.id for sae in saes})
    if len(groups) >= slots:
        return None
    parts = math.ceil(slots / len(groups))
    return math.ceil(max(len(pack.saes) for pack in groups) / parts)


def make_packs(saes: Sequence[PlannedSae], pack_size: int | None, missing: Collection[str]) -> list[Pack]:
    """Group SAEs that can share a stream (same hook, batch, epochs, seed, shuffle), `pack_size` at most together.

    A pack is named by all its SAEs but holds only those that are `missing`, so that it finds its checkpoint again after
    some of them were committed; packs of which nothing is missing are left out.
    """
    groups: dict[tuple[object, ...], list[PlannedSae]] = {}
    for sae in saes:
        train = sae.point.train
        key = (sae.point.hook, train.batch_size, train.epochs, train.seed, train.shuffle_tokens)
        groups.setdefault(key, []).append(sae)
    packs: list[Pack] = []
    for members in groups.values():
        size = pack_size or len(members)
        for start in range(0, len(members), size):
            part = members[start : start + size]
            todo = tuple(sae for sae in part if sae.id in missing)
            if todo:
                packs.append(Pack(id=ids.pack_id([sae.id for sae in part]), hook=todo[0].point.hook, saes=todo))
    return packs


def _planned(point: SaePoint, harvest: str, d_in: int) -> PlannedSae:
    d_sae = point.sae.width(d_in)
    if point.sae.kind == "topk" and point.sae.k > d_sae:
        raise ConfigError(f"sae.k is {point.sae.k}, more than the {d_sae} features of the SAE; choose a smaller k.")
    return PlannedSae(id=ids.sae_id(point, harvest=harvest, d_in=d_in), point=point, d_in=d_in, d_sae=d_sae)
