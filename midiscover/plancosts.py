"""What the pieces of a sweep take on a device: how many run at once, how long, how much memory. Loads no torch.

`plan` lays them one after another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from midiscover.cores import (
    NODE_CARDS,
    SCALING,
    SMALL_BELOW,
    SPARSE_BELOW,
    SPARSE_BELOW_ON_GPU,
    no_room,
    on_nodes,
    packs_at_once,
    places_on,
)
from midiscover.errors import ConfigError
from midiscover.ids import first_block
from midiscover.memory import (
    FIXED_BYTES,
    MEASURED_ROWS,
    MODEL_BYTES,
    USABLE,
    Sizes,
    fit_together,
    measuring_bytes,
    spliced_bytes,
    training_bytes,
)
from midiscover.rates import Rates
from midiscover.resolve import (
    Crew,
    Pack,
    PlannedSae,
    Resolved,
    auto_pack_size,
    cut_crew,
    is_spliced,
    make_packs,
    pool_tokens,
)
from midiscover.saeconfig import UNSTEPPED_CONTROLS, PenaltyConfig, TopKConfig
from midiscover.work import Work

AGAIN_SECONDS = 0.5
"""From one pack to the next in a slot whose process goes on."""
ROW_BYTES = 2
"""Of a number in a block: bfloat16."""
DENSE_SHARE = 0.1
"""Of the features, on the mean over training, where a kind says nothing of its beginning."""
WEIGHT_BYTES = 4
"""Of a parameter of an SAE that is kept, or evaluated."""
MEASURED_TABLES = 3.25
"""Float32 tables [MEASURED_ROWS, d_sae] that measuring an SAE holds at once, of the kind that holds most: 2 to 3.25."""


class Places(NamedTuple):
    """Where the pieces of a stage run."""

    at_once: int
    """How many."""
    slower: float
    """How many times slower each is than one alone on what the rates were measured on."""
    threads: int = 1
    """Of each, where there are no cards."""
    sharing: int = 1
    """How many share a card, or the machine where there are none."""


class Held(NamedTuple):
    """Memory in bytes."""

    card: float
    """Of a card; 0 where there are none."""
    host: float
    """Main memory for rows, weights and tables, for each card, or for the machine where there are none."""


NOTHING = Held(0.0, 0.0)


class Costs:
    """Of the pieces of a run on `gpus` cards of `rates`, or on the cores of a machine where there are none."""

    def __init__(self, resolved: Resolved, work: Work, rates: Rates, gpus: int, cores: int) -> None:
        self.resolved, self.work, self.rates, self.gpus, self.cores = resolved, work, rates, gpus, cores
        self.resources = resolved.config.resources

    # How many at once

    def models(self, pieces: int | None = None) -> Places:
        """Language models, where there are so many pieces of work for them; see `jobs.runtime.model_slots`.

        ConfigError where that refuses them.
        """
        resources = self.resources
        if self.gpus:
            share = resources.gpus_per_model if resources.gpus_per_model > 1 else resources.gpus_per_actor
            count = resources.harvest_actors or max(1, on_nodes(self.gpus, share))
            self._check("harvest", count, share)
            sharing = min(count, pieces or count, max(1, places_on(1, share)))
            return Places(min(count, pieces or count), float(sharing), sharing=sharing)
        count = resources.harvest_actors or 1
        threads = resources.threads or max(1, self.cores // count)
        used = min(count, pieces or count)
        cores = min(threads, self.cores / used)  # more threads than cores take turns
        return Places(used, (self.rates.threads / cores) ** SCALING, threads, used)

    def slots(self, packs: int) -> Places:
        """Packs; see `jobs.runtime.pack_slots`. ConfigError where that refuses them."""
        resources, workers = self.resources, self.resources.workers
        if self.gpus:
            share = resources.pack_share()
            count = max(1, min(packs, on_nodes(self.gpus, share) // workers))
            self._check("sweep", count * workers, share)
            sharing = min(count * workers, max(1, places_on(1, share)))
            return Places(count, float(sharing), sharing=sharing)
        if workers > 1:
            threads = resources.threads or max(1, self.cores // workers)
            cores = min(threads, self.cores / workers)
            return Places(1, (self.rates.threads / cores) ** SCALING, threads, workers)
        most = max(1, self.cores // (resources.threads or 1))
        count = packs_at_once(packs, cores=self.cores, most=most, threads=resources.threads)
        threads = resources.threads or max(1, self.cores // count)
        return Places(min(count, packs), (self.rates.threads / threads) ** SCALING, threads, min(count, packs))

    def _check(self, stage: str, workers: int, share: float) -> None:
        """ConfigError for what a sweep would refuse to start on these cards."""
        if workers > on_nodes(self.gpus, share):
            have = f"a plan on {self.gpus} GPUs has nodes of {min(self.gpus, NODE_CARDS)} at most"
            raise ConfigError(no_room(stage, workers, 1, share, have))

    def packs(self) -> list[Pack]:
        """As a sweep makes them."""
        saes = self.resolved.saes
        resources = self.resources
        slots = max(1, on_nodes(self.gpus, resources.pack_share()) // resources.workers) if self.gpus else 1
        return make_packs(saes, self.resources.pack_size or auto_pack_size(saes, slots), {sae.id for sae in saes})

    def crews(self, packs: Sequence[Pack]) -> int:
        """About how many crews share packs where activations are streamed: one for each card, or for the machine."""
        return self.slots(len(packs)).at_once if self.gpus else 1

    def parts(self, crew: Crew, *, streamed: bool) -> list[Crew]:
        """The crew, or parts of it that fit a card; packs of several workers are not cut. See `jobs.crews`."""
        limit = self.room(streamed=streamed)
        return [crew] if limit is None or self.resources.workers > 1 else cut_crew(crew, limit)

    def room(self, *, streamed: bool) -> int | None:
        """Bytes of a card for the SAEs of one process; None where there is no card, or nothing is known of it."""
        if not self.gpus or not self.rates.memory:
            return None
        whole = int(USABLE * self.rates.memory * min(1.0, self.resources.gpus_per_pack))
        return whole - (self.model_bytes if streamed else 0)

    def measured(self, saes: Sequence[PlannedSae]) -> list[list[PlannedSae]]:
        """The SAEs of a site in parts that fit a card, measured one after another; see `jobs.evaluation`."""
        if not self.gpus or not self.rates.memory:
            return [[*saes]]
        splices = self.resolved.config.evaluate.ce_tokens and any(map(is_spliced, saes))
        tables = self._spliced_bytes if splices else 0
        room = int(USABLE * self.rates.memory * self.card_of_model - self.model_on_card() - tables)
        return [[saes[i] for i in part] for part in fit_together([sae.sizes for sae in saes], room, measuring_bytes)]

    @property
    def card_of_model(self) -> float:
        """The share of a card that a process with a language model has; 1 where it has several."""
        return 1.0 if self.resources.gpus_per_model > 1 else min(1.0, self.resources.gpus_per_actor)

    # Seconds and FLOPs

    def again(self) -> float:
        """Seconds from one crew to the next in a slot: a TorchTrainer starts a process for each."""
        inline = self.resources.trainer_on(gpus=bool(self.gpus)) == "inline"
        return AGAIN_SECONDS if inline else self.rates.starts["trial"]

    def load(self) -> float:
        """Seconds in which a language model is loaded."""
        return ROW_BYTES * self.resolved.table.parameters / self.rates.load_bytes

    def to_hook(self, sae: PlannedSae) -> float:
        """FLOPs of the language model for a token, until it has what an SAE needs."""
        return max(self.resolved.table.require(hook).flops_per_token for hook in (sae.point.hook, sae.output_hook))

    def before(self, sae: PlannedSae) -> float:
        """FLOPs of the language model for a token in the blocks before the first that an SAE's hooks lie in."""
        block = first_block((sae.point.hook, sae.output_hook))
        before = None if block is None else self.resolved.table.hooks.get(f"{block[0]}.{block[1] - 1}")
        return before.flops_per_token if before else 0.0

    def rows(self, saes: Sequence[PlannedSae]) -> int:
        """Rows of each hook that a process reads for SAEs: all in each epoch, or once where a pool holds all of them;
        a pool where no SAE takes a step."""
        pool = pool_tokens(saes[0])
        if self.work.train <= pool or not any(map(_is_stepped, saes)):
            return min(self.work.train, pool)
        return self.work.train * max(sae.point.train.epochs for sae in saes if _is_stepped(sae))

    def passed(self, saes: Sequence[PlannedSae]) -> int:
        """Rows for which a process runs the language model once, of all epochs."""
        return min(self.work.train, self.rows(saes))

    def steps(self, sae: PlannedSae) -> int:
        """How many an SAE takes."""
        train = sae.point.train
        return train.epochs * self.work.train // train.batch_size if _is_stepped(sae) else 0

    def training(self, pack: Pack, places: Places) -> float:
        """Seconds of the steps of a pack. Small SAEs have a core each, so that few of them leave cores idle."""
        cores = self._cores(pack, places)
        # More features cost no more: products are dense. Rates of a CPU may stand for a GPU's, but have no memory.
        sparse = SPARSE_BELOW_ON_GPU if self.rates.memory else SPARSE_BELOW
        seconds = 0.0
        for sae in pack.saes:
            slower = (self.rates.threads / cores) ** SCALING if cores and _is_small(sae) else places.slower
            tokens = sae.point.train.batch_size // self.resources.workers
            cost, rows = self.rates.step(sae.point.sae.kind), sae.d_in + sae.d_out
            step = cost.seconds(rows=rows, d_sae=sae.d_sae, tokens=tokens, l0=min(active(sae), sparse * sae.d_sae))
            seconds += slower * self.steps(sae) * step
        return seconds

    def _cores(self, pack: Pack, places: Places) -> int:
        """Cores that take steps of small SAEs of a pack side by side; 0 where there are none."""
        small = [sae for sae in pack.saes if _is_stepped(sae) and _is_small(sae)]
        return 0 if self.gpus else min(places.threads, len(small))

    @property
    def trained_bytes(self) -> float:
        """To the store: the weights of all SAEs."""
        return _weight_bytes(self.resolved.saes)

    def training_flops(self, saes: Iterable[PlannedSae]) -> float:
        """Of dense steps: five products of W_enc's or W_dec's size for each token."""
        return sum(
            5.0 * (sae.d_in + sae.d_out) * sae.d_sae * self.steps(sae) * sae.point.train.batch_size for sae in saes
        )

    # Memory

    @property
    def model_bytes(self) -> int:
        """Of a language model's weights."""
        return MODEL_BYTES[self.resolved.config.model.dtype] * self.resolved.table.parameters

    def harvesting(self, part: Resolved, places: Places) -> Held:
        """Memory of language models and of the blocks that they fill."""
        block = ROW_BYTES * part.config.harvest.block_tokens * sum(part.hooks.values())
        if self.gpus:
            return Held(places.sharing * self.model_on_card(), places.sharing * block)
        return Held(0.0, places.sharing * (self.model_bytes + block))

    def pools(self, crew: Crew) -> int:
        """Bytes of the rows that a process shuffles: two pools of each hook, or one that is everything."""
        widths: dict[tuple[str, str], int] = {}
        for sae in (pack.saes[0] for pack in crew):
            widths |= {(sae.harvest_id, sae.output_hook): sae.d_out, (sae.harvest_id, sae.point.hook): sae.d_in}
        return ROW_BYTES * min(self.work.train, 2 * pool_tokens(crew[0].saes[0])) * sum(widths.values())

    def holding(self, crew: Crew, places: Places, *, streamed: bool) -> Held:
        """Memory of processes that train such a crew, which may have a language model beside it."""
        saes = training_bytes([self.sizes(sae) for pack in crew for sae in pack.saes])
        device = saes + (self.model_bytes if streamed else 0)
        if self.gpus:
            return Held(places.sharing * device, places.sharing * self.pools(crew))
        beside = max(max(0, self._cores(pack, places) - 1) * max(map(_step_bytes, pack.saes)) for pack in crew)
        return Held(0.0, places.sharing * (device - FIXED_BYTES + beside + self.pools(crew)))

    def evaluating(self, saes: Sequence[PlannedSae], places: Places, *, model: bool, spliced: bool) -> Held:
        """Memory of processes that measure such SAEs of a site together."""
        device = _weight_bytes(saes)
        device += 4 * MEASURED_TABLES * MEASURED_ROWS * max(sae.d_sae for sae in saes)
        device += self._spliced_bytes if spliced else 0
        if self.gpus:
            return Held(places.sharing * (device + (self.model_on_card() if model else FIXED_BYTES)), 0.0)
        return Held(0.0, places.sharing * (device + (self.model_bytes if model else 0)))

    @property
    def _spliced_bytes(self) -> int:
        return spliced_bytes(self.resolved.config.corpus.context_size, self.resolved.table.vocab_size)

    def sizes(self, sae: PlannedSae) -> Sizes:
        """Of one process of those that share its batches."""
        return sae.sizes._replace(batch_size=sae.point.train.batch_size // self.resources.workers)

    def model_on_card(self) -> float:
        """Bytes of a card that a language model takes, or its share of one where it is spread over several."""
        return FIXED_BYTES + self.model_bytes / self.resources.gpus_per_model


def _is_stepped(sae: PlannedSae) -> bool:
    return sae.point.sae.control not in UNSTEPPED_CONTROLS


def _is_small(sae: PlannedSae) -> bool:
    return sae.point.train.batch_size * sae.d_in * sae.d_sae < SMALL_BELOW


def _weight_bytes(saes: Sequence[PlannedSae]) -> float:
    return WEIGHT_BYTES * sum(sae.d_sae * (sae.d_in + sae.d_out) for sae in saes)


def _step_bytes(sae: PlannedSae) -> int:
    return sae.sizes.step_bytes


def active(sae: PlannedSae) -> float:
    """Features per token, on the mean over training."""
    config = sae.point.sae
    if isinstance(config, TopKConfig):
        return float(config.k)
    density = config.initial_density if isinstance(config, PenaltyConfig) else None
    return (DENSE_SHARE if density is None else density) * sae.d_sae
