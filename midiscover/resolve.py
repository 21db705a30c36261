"""A config made definite: which model, which text, which SAEs, under which ids. Runs nothing, loads no torch.

Every driver and `midiscover config` begin here, so that what is shown is what runs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple

from midiscover import ids
from midiscover.config import RunConfig, SaePoint
from midiscover.configio import expand_grid, to_tree
from midiscover.errors import ConfigError
from midiscover.memory import Sizes, fit_together
from midiscover.models import HookTable, ModelIdentity, hook_table, resolve_model
from midiscover.saeconfig import (
    SHARES_NO_BATCH,
    UNSTEPPED_CONTROLS,
    PenaltyConfig,
    SkipTranscoderConfig,
    TopKConfig,
    TranscoderConfig,
)
from midiscover.texts import SourceIdentity, resolve_foreign, resolve_source


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSae:
    """One SAE of the grid with everything that is known before it is trained."""

    id: str
    point: SaePoint
    d_in: int
    d_sae: int
    d_out: int
    """Width of the hook that is reconstructed; d_in but for transcoders."""
    output_hook: str
    """The hook that is reconstructed; `point.hook` but for transcoders."""
    harvest_id: str
    """Where its activations lie; another one than the sweep's for `control: random_model`."""

    @property
    def sizes(self) -> Sizes:
        """By which its training's memory is reckoned."""
        skip = self.d_in * self.d_out if isinstance(self.point.sae, SkipTranscoderConfig) else 0
        return Sizes(self.d_in, self.d_sae, self.d_out, self.point.train.batch_size, skip)

    def row(self) -> dict[str, object]:
        """The plain-table entries that need no training."""
        sae = self.point.sae
        return {
            "sae_id": self.id,
            "hook": self.point.hook,
            "output_hook": self.output_hook,
            "layer": ids.hook_layer(self.point.hook),
            "kind": sae.kind,
            **ids.compared_settings(sae),
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "seed": self.point.train.seed,
        }

    def recorded(self) -> dict[str, object]:
        """What its record.json will have of its settings, by which it is named and told from others."""
        place = {"hook": self.point.hook, "output_hook": self.output_hook, "d_sae": self.d_sae}
        return place | {"sae": to_tree(self.point.sae), "train": to_tree(self.point.train)}


class Site(NamedTuple):
    """Where an SAE sits; SAEs of one site are measured together, with one pass of the language model for all."""

    harvest_id: str
    hook: str
    output_hook: str


def by_site(saes: Iterable[PlannedSae]) -> dict[Site, list[PlannedSae]]:
    """SAEs grouped as they are measured."""
    groups: dict[Site, list[PlannedSae]] = {}
    for sae in saes:
        groups.setdefault(Site(sae.harvest_id, sae.point.hook, sae.output_hook), []).append(sae)
    return groups


def is_spliced(sae: PlannedSae) -> bool:
    """Whether its reconstruction is put back into the model. Not that of `random_model`: the language model that it was
    trained on predicts noise, so that its cross-entropy says nothing, and in the real model it has no meaning."""
    return sae.point.sae.control != "random_model"


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """A run with its ids."""

    config: RunConfig
    model: ModelIdentity
    table: HookTable
    source: SourceIdentity
    foreign: SourceIdentity | None = None
    """The text of `evaluate.foreign_source`."""
    corpus_id: str
    harvest_id: str
    evaluation_id: str
    sweep_id: str
    hooks: dict[str, int]
    """Hook path -> width, of all that is harvested: the hooks of the run and those that its transcoders predict."""
    saes: tuple[PlannedSae, ...]

    @property
    def dtypes(self) -> tuple[str, str]:
        """`model.dtype`, and the `train.dtype` of the first SAE."""
        return self.config.model.dtype, self.saes[0].point.train.dtype

    def parts(self) -> tuple[Resolved, ...]:
        """The run by language model, each with a harvest of its own: this one, and that with shuffled weights."""
        shuffled = tuple(sae for sae in self.saes if sae.harvest_id != self.harvest_id)
        own = tuple(sae for sae in self.saes if sae.harvest_id == self.harvest_id)
        parts = [replace(self, saes=own)] if own or not shuffled else []
        if shuffled:
            model = replace(self.config.model, weights="shuffled")
            used = {hook for sae in shuffled for hook in (sae.point.hook, sae.output_hook)}
            hooks = {hook: width for hook, width in self.hooks.items() if hook in used}
            config = replace(self.config, model=model)
            parts.append(replace(self, config=config, harvest_id=shuffled[0].harvest_id, hooks=hooks, saes=shuffled))
        return tuple(parts)

    def part_of(self, sae: PlannedSae) -> Resolved:
        """The part whose language model and harvest an SAE reads."""
        return next(part for part in self.parts() if part.harvest_id == sae.harvest_id)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """SAEs that read the same stream, trained by one process."""

    id: str
    hook: str
    saes: tuple[PlannedSae, ...]
    parents: tuple[str, ...] = ()
    """Ids of the packs that it is a part of, the nearest first; it may go on from a checkpoint of theirs."""

    @property
    def whole(self) -> str:
        """Id of the pack that all of this was cut from; its own where it was not."""
        return [self.id, *self.parents][-1]

    def part(self, saes: Sequence[PlannedSae]) -> Pack:
        """Some of its SAEs by themselves. That changes nothing for them, but that `train.retire_after` compares each
        with those of its part alone."""
        return Pack(
            id=ids.pack_id([sae.id for sae in saes]),
            hook=self.hook,
            saes=tuple(saes),
            parents=(self.id, *self.parents),
        )

    def halves(self) -> tuple[Pack, Pack]:
        """Two packs that need about half of its memory each."""
        middle = len(self.saes) // 2
        return self.part(self.saes[:middle]), self.part(self.saes[middle:])


Crew = tuple[Pack, ...]
"""Packs that one process trains: one from the store, several where they share a live language model."""


def resolve(config: RunConfig, store: str | None = None) -> Resolved:
    """Look up model, hooks and text, and name everything. UserError within seconds where one is not there.

    `store` is the address of the run's store, in which `model.id: store:<name>` is looked up.
    """
    if not config.harvest.hooks:
        raise ConfigError(
            "harvest.hooks is empty; name at least one module path (`midiscover inspect MODEL` lists them)."
        )
    model = resolve_model(config.model, store)
    table = hook_table(model, context_size=config.corpus.context_size, wanted=config.harvest.hooks)
    table.require_attention(config.model.attention)
    if table.context_length is not None and config.corpus.context_size > table.context_length:
        raise ConfigError(
            f"corpus.context_size is {config.corpus.context_size}, and {table.model} reads at most "
            f"{table.context_length} tokens; lower it."
        )
    points = expand_grid(config)
    _check_shares(points, config.resources.workers)
    outputs = {point: _output_hook(point) for point in points}
    hooks = {hook: table.require(hook).d_in for hook in (*config.harvest.hooks, *outputs.values())}
    firing = list(table.hooks)
    for point, output in outputs.items():
        if firing.index(output) < firing.index(point.hook):
            raise ConfigError(f"'{output}' fires before '{point.hook}', so no transcoder can predict it from there.")
    source = resolve_source(config.corpus)
    foreign = resolve_foreign(config.corpus, config.evaluate)
    corpus = ids.corpus_id(config.corpus, source_digest=source.digest, tokenizer_digest=model.tokenizer_digest)

    def harvest_id(weights: Literal["trained", "shuffled"]) -> str:
        settings = replace(config.model, weights=weights)
        return ids.harvest_id(settings, config.harvest, model_digest=model.digest, corpus=corpus)

    harvest, shuffled = harvest_id(config.model.weights), harvest_id("shuffled")
    saes = _distinct(
        _planned(point, shuffled if point.sae.control == "random_model" else harvest, hooks, outputs[point])
        for point in points
    )
    evaluation = ids.evaluation_id(config.evaluate, foreign_digest=foreign.digest if foreign else None)
    return Resolved(
        config=config,
        model=model,
        table=table,
        source=source,
        foreign=foreign,
        corpus_id=corpus,
        harvest_id=harvest,
        evaluation_id=evaluation,
        sweep_id=ids.sweep_id(config.name, [sae.id for sae in saes], evaluation),
        hooks=hooks,
        saes=saes,
    )


def _check_shares(points: Iterable[SaePoint], workers: int) -> None:
    """Whether every SAE can be trained by so many processes together."""
    for point in points if workers > 1 else ():
        if point.sae.kind in SHARES_NO_BATCH:
            raise ConfigError(
                f"sae.kind {point.sae.kind} selects its features over the whole batch, which resources.workers "
                f"{workers} would share out; train it with 1 worker."
            )
        if point.train.batch_size % workers:
            raise ConfigError(
                f"train.batch_size {point.train.batch_size} can't be shared out evenly among resources.workers "
                f"{workers}; take a multiple of it."
            )


def auto_pack_size(saes: Sequence[PlannedSae], slots: int) -> int | None:
    """SAEs at most in a pack so that `slots` devices have work; None where whole groups are enough for them.

    No device gets a second pack by it, which would read all rows once more: more devices never take longer.
    """
    groups = [len(pack.saes) for pack in make_packs(saes, None, {sae.id for sae in saes})]
    cuts = (size for size in range(1, max(groups)) if sum(math.ceil(count / size) for count in groups) <= slots)
    return next(cuts, None)


def make_packs(saes: Sequence[PlannedSae], pack_size: int | None, missing: Collection[str]) -> list[Pack]:
    """Group SAEs that can share a stream (same hook, batch, epochs, seed, shuffle), `pack_size` at most together.

    A pack is named by all its SAEs but holds only those that are `missing`, so that it finds its checkpoint again after
    some of them were committed; packs of which nothing is missing are left out.
    """
    groups: dict[tuple[object, ...], list[PlannedSae]] = {}
    for sae in saes:
        train = sae.point.train
        key = (
            sae.harvest_id,
            sae.point.hook,
            sae.output_hook,
            train.batch_size,
            train.epochs,
            train.seed,
            train.shuffle_tokens,
        )
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


def pool_tokens(sae: PlannedSae) -> int:
    """Rows of each hook that its loader shuffles together: transcoders read two, so half as many of each."""
    return sae.point.train.pool_tokens(len({sae.point.hook, sae.output_hook}))


def make_crews(packs: Sequence[Pack], count: int, hooks: Sequence[str]) -> list[Crew]:
    """Packs by the language model and the pools that they can share, in about `count` crews.

    hooks: all of the model, in the order in which they fire; neighbours stay together, so that some crews can stop
    early in the model.
    """
    groups: dict[tuple[object, ...], list[Pack]] = {}
    for pack in sorted(packs, key=lambda pack: hooks.index(pack.saes[0].output_hook)):
        sae = pack.saes[0]
        groups.setdefault((sae.harvest_id, sae.point.train.seed, pool_tokens(sae)), []).append(pack)
    crews: list[Crew] = []
    for members in groups.values():
        parts = min(len(members), max(1, count // len(groups)))
        ends = [len(members) * i // parts for i in range(parts + 1)]
        crews += [tuple(members[start:stop]) for start, stop in pairwise(ends)]
    return crews


def cut_crew(crew: Crew, limit: int) -> list[Crew]:
    """The crew, or parts of it whose SAEs fit `limit` bytes of a card; an SAE that is too large stands alone."""
    parts = fit_together([planned.sizes for pack in crew for planned in pack.saes], limit)
    if len(parts) < 2:
        return [crew]
    if len(crew) == 1:
        return [(crew[0].part([crew[0].saes[i] for i in part]),) for part in parts]
    return [part for half in halves(crew) for part in cut_crew(half, limit)]


def halves(crew: Crew) -> tuple[Crew, Crew]:
    """Two crews that need about half of its memory each."""
    if len(crew) == 1:
        first, second = crew[0].halves()
        return (first,), (second,)
    return crew[: len(crew) // 2], crew[len(crew) // 2 :]


def _output_hook(point: SaePoint) -> str:
    """The hook that an SAE reconstructs: its own, or the one that a transcoder predicts."""
    sae, hook = point.sae, point.hook
    if not isinstance(sae, TranscoderConfig):
        return hook
    if sae.output_hook is not None:
        layer = ids.hook_layer(hook)
        return sae.output_hook.replace("{layer}", "{layer}" if layer is None else str(layer))
    path, _, side = hook.partition(":")
    if side != "in":
        raise ConfigError(
            f"A {sae.kind} on '{hook}' needs sae.output_hook, the hook that it predicts; only a hook that ends in "
            "':in' has one by itself, the output of the same module."
        )
    return path


def _distinct(saes: Iterable[PlannedSae]) -> tuple[PlannedSae, ...]:
    """The SAEs of a grid. Neurons are the same at every width, so they stand once; else no SAE may stand twice."""
    found: dict[str, PlannedSae] = {}
    for sae in saes:
        if sae.id in found and sae.point.sae.control != "neurons":
            raise ConfigError(
                f"The grid names {sae.id} twice: what two of its points differ in makes no other SAE, such as a width "
                "in two spellings or train.retire_after."
            )
        found.setdefault(sae.id, sae)
    return tuple(found.values())


def _planned(point: SaePoint, harvest: str, hooks: Mapping[str, int], output_hook: str) -> PlannedSae:
    if isinstance(point.sae, TranscoderConfig):
        # The hook itself, however it was given: what is counted in the id, and what the record says.
        point = replace(point, sae=replace(point.sae, output_hook=output_hook))
    sae, d_in = point.sae, hooks[point.hook]
    d_sae = sae.width(d_in)
    if sae.control in UNSTEPPED_CONTROLS and isinstance(sae, PenaltyConfig) and sae.target_l0 is not None:
        raise ConfigError(
            f"sae.target_l0 has no meaning for sae.control '{sae.control}', which is not trained; give that control a "
            "grid of its own."
        )
    if isinstance(sae, TopKConfig) and sae.k > d_sae:
        raise ConfigError(f"sae.k is {sae.k}, more than the {d_sae} features of the SAE; choose a smaller k.")
    if isinstance(sae, PenaltyConfig) and sae.target_l0 is not None and sae.target_l0 > d_sae / 2:
        raise ConfigError(
            f"sae.target_l0 is {sae.target_l0:g}, more than half of the {d_sae} features of the SAE; lower it."
        )
    if sae.control == "neurons" and isinstance(sae, TranscoderConfig):
        raise ConfigError(
            f"sae.control 'neurons' has no meaning for a {sae.kind}, whose input is another hook than its output; "
            "leave it out of the grid of transcoders."
        )
    return PlannedSae(
        id=ids.sae_id(point, harvest=harvest, d_in=d_in),
        point=point,
        d_in=d_in,
        d_sae=d_sae,
        d_out=hooks[output_hook],
        output_hook=output_hook,
        harvest_id=harvest,
    )
