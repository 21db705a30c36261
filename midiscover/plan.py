"""What a sweep will take before it runs: FLOPs, bytes, seconds, by the rates of a device. Loads no torch.

A model of the scheduler, stage by stage as `jobs.sweep` goes through them: the harvest by as many language models as
fit, packs in their order on as many slots, then the sites of the evaluation. It says nothing of what is committed
already: a plan is of the whole sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from midiscover.cores import SCALING, packs_at_once, places_on
from midiscover.ids import first_block
from midiscover.memory import fit_together
from midiscover.rates import Rates
from midiscover.resolve import (
    Pack,
    PlannedSae,
    Resolved,
    auto_pack_size,
    by_site,
    is_spliced,
    make_crews,
    make_packs,
)
from midiscover.saeconfig import UNSTEPPED_CONTROLS, PenaltyConfig, TopKConfig
from midiscover.work import Work

AGAIN_SECONDS = 0.5
"""From one pack to the next in a slot that has trained one."""
ROW_BYTES = 2
"""Of a number in a block: bfloat16."""
DENSE_SHARE = 0.1
"""Of the features, on the mean over training, where a kind says nothing of its beginning."""


class Span(NamedTuple):
    """One thing that is done, in seconds since the command was given."""

    stage: str
    what: str
    lane: str
    """Which worker does it."""
    begin: float
    end: float


class Stage(NamedTuple):
    """One stage of the sweep."""

    name: str
    seconds: float
    flops: float
    bytes: float
    bound: str
    """What most of its time goes to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A sweep on a device."""

    rates: Rates
    gpus: int
    """0: on the CPU of one machine."""
    work: Work
    saes: int
    packs: int
    stages: tuple[Stage, ...]
    spans: tuple[Span, ...]
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """From the command to the report."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def bottleneck(self) -> Stage:
        """The stage that takes longest."""
        return max(self.stages, key=lambda stage: stage.seconds)


def plan_sweep(
    resolved: Resolved,
    work: Work,
    rates: Rates,
    *,
    gpus: int = 0,
    cores: int = 1,
    bandwidth: float | None = None,
    streamed: bool = False,
) -> Plan:
    """The stages of a sweep on `gpus` cards of `rates`, or on the cores of a machine.

    bandwidth: bytes/s of the store in all; None: as much as the workers take. streamed: see `ways`.
    """
    return _Planner(resolved, work, rates, gpus, cores, bandwidth, streamed).plan()


class _Planner:
    """Lays one stage after another."""

    def __init__(
        self,
        resolved: Resolved,
        work: Work,
        rates: Rates,
        gpus: int,
        cores: int,
        bandwidth: float | None,
        streamed: bool,
    ) -> None:
        self.resolved, self.work, self.rates, self.gpus, self.cores = resolved, work, rates, gpus, cores
        self.bandwidth, self.streamed = bandwidth or float("inf"), streamed
        self.resources = resolved.config.resources
        self.now = 0.0
        self.stages: list[Stage] = []
        self.spans: list[Span] = []
        self.notes: list[str] = []
        self.packs = self._packs()

    def plan(self) -> Plan:
        """All of it."""
        self._start()
        if self.streamed:
            self._stream()
        else:
            for part in self.resolved.parts():
                self._harvest(part)
            self._train()
        self._evaluate()
        self._finish()
        return Plan(
            rates=self.rates,
            gpus=self.gpus,
            work=self.work,
            saes=len(self.resolved.saes),
            packs=len(self.packs),
            stages=tuple(self.stages),
            spans=tuple(self.spans),
            notes=tuple(self.notes),
        )

    def _start(self) -> None:
        starts, tokens = self.rates.starts, self.work.train + self.work.held_out
        pieces = [("driver", starts["driver"]), ("corpus", tokens / self.rates.tokenise), ("ray", starts["ray"])]
        self._one_by_one("start", pieces, bound="starting, reading the text")

    def _harvest(self, part: Resolved) -> None:
        models = self._models()
        tokens = self.work.train + self.work.held_out
        flops = tokens * max(part.table.require(hook).flops_per_token for hook in part.hooks)
        size = tokens * ROW_BYTES * sum(part.hooks.values())
        computing = flops / (self.rates.model_flops * models)
        writing = size / min(self.rates.write * models, self.bandwidth)
        begin = self.rates.starts["worker"] + self._load()
        seconds = begin + max(computing, writing)
        self._lanes("harvest", [[("load", begin), ("harvest", seconds - begin)]] * models)
        why = "the store" if writing > computing else "the language model"
        self._add("harvest", seconds, flops, size, why if seconds > 2 * begin else "loading the language model")

    def _train(self) -> None:
        slots, slower = self._slots(len(self.packs))
        lanes: list[list[tuple[str, float]]] = [[] for _ in range(slots)]
        flops = size = 0.0
        for pack in self.packs:
            lane = min(lanes, key=lambda one: sum(seconds for _, seconds in one))
            reading = self._epochs(pack) * self.work.train * ROW_BYTES * self._read_width(pack)
            steps = sum(self._seconds_of(sae) for sae in pack.saes) * slower
            arriving = reading / min(self.rates.read, self.bandwidth / slots)
            lane.append(("start", AGAIN_SECONDS if lane else self.rates.starts["trial"]))
            lane.append((pack.hook, max(steps, arriving)))
            flops += sum(self._flops_of(sae) for sae in pack.saes)
            size += reading
        seconds = self._lanes("train", lanes)
        training = max(sum(s for what, s in lane if what != "start") for lane in lanes)
        arriving = size / min(self.rates.read * slots, self.bandwidth)
        why = "the store" if arriving > 0.9 * training else "the SAEs' steps"
        self._add("train", seconds, flops, size, why if training > seconds / 2 else "starting trials")

    def _stream(self) -> None:
        count = self._slots(len(self.packs))[0] if self.gpus else 1
        crews = make_crews(self.packs, count, list(self.resolved.table.hooks))
        slots, slower = self._slots(len(crews))
        lanes: list[list[tuple[str, float]]] = [[] for _ in range(slots)]
        flops = model_seconds = 0.0
        for crew in crews:
            lane = min(lanes, key=lambda one: sum(seconds for _, seconds in one))
            saes = [sae for pack in crew for sae in pack.saes]
            passes = self.work.train * max(self._to_hook(sae) for sae in saes)
            reading = passes / self.rates.model_flops * slower
            lane.append(("start", (AGAIN_SECONDS if lane else self.rates.starts["trial"]) + self._load()))
            lane.append(("language model", reading))
            lane.append((crew[0].hook, sum(self._seconds_of(sae) for sae in saes) * slower))
            flops += passes + sum(self._flops_of(sae) for sae in saes)
            model_seconds += reading / slots
        seconds = self._lanes("train", lanes)
        why = "the language model" if model_seconds > seconds / 2 else "the SAEs' steps"
        self._add("train", seconds, flops, 0.0, why)

    def _to_hook(self, sae: PlannedSae) -> float:
        """FLOPs of the language model for a token, until it has what an SAE needs."""
        return max(self.resolved.table.require(hook).flops_per_token for hook in (sae.point.hook, sae.output_hook))

    def _before(self, sae: PlannedSae) -> float:
        """FLOPs of the language model for a token in the blocks before the first that an SAE's hooks lie in."""
        block = first_block((sae.point.hook, sae.output_hook))
        before = None if block is None else self.resolved.table.hooks.get(f"{block[0]}.{block[1] - 1}")
        return before.flops_per_token if before else 0.0

    def _evaluate(self) -> None:
        settings, sites = self.resolved.config.evaluate, list(by_site(self.resolved.saes).values())
        lanes: list[list[tuple[str, float]]] = [[] for _ in range(min(len(sites), self._models()))]
        held = min(self.work.held_out, settings.max_tokens)
        spliced = min(self.work.held_out, settings.ce_tokens)
        foreign = settings.foreign_tokens if self.resolved.foreign is not None else 0
        flops = loading = 0.0
        for saes in sites:
            lane = min(lanes, key=lambda one: sum(seconds for _, seconds in one))
            weights = sum((sae.d_in + sae.d_out) * sae.d_sae for sae in saes)
            encoding = (held + foreign + spliced) * weights * self.rates.encode
            through = sum(map(is_spliced, saes)) if spliced else 0
            passes = 2 + through if through else 0
            to_the_end = passes * spliced * self.resolved.table.flops_per_token
            again = max(0, passes - 1) * spliced * self._before(saes[0])  # what those after the first do not repeat
            to_the_hook = (foreign + (held if self.streamed else 0)) * self._to_hook(saes[0])
            computing = to_the_end / self.rates.logits_flops + (to_the_hook - again) / self.rates.model_flops
            starting = self._load() + (0 if lane else self.rates.starts["worker"])
            loading = max(loading, starting)
            lane += [("load", starting), (saes[0].point.hook, encoding + computing)]
            flops += to_the_end - again + to_the_hook + 2 * (held + foreign + spliced) * weights
        seconds = self._lanes("evaluate", lanes)
        why = "the spliced language model" if spliced else "encoding"
        self._add("evaluate", seconds, flops, 0.0, why if loading < seconds / 2 else "loading the language model")

    def _finish(self) -> None:
        # Neighbours on the grid, about one for each SAE: every decoder row of one with every one of the other.
        pairs = sum(sae.d_sae**2 * sae.d_out for saes in by_site(self.resolved.saes).values() for sae in saes[1:])
        pieces = [("figures", self.rates.starts["figures"]), ("in common", pairs * self.rates.encode)]
        self._one_by_one("report", pieces, bound="drawing the report", flops=2.0 * pairs)

    # What the device does at once, and how long pieces take

    def _models(self) -> int:
        """Language models at once."""
        if not self.gpus:
            return self.resources.harvest_actors or 1
        share = max(self.resources.gpus_per_model, self.resources.gpus_per_actor)
        return self.resources.harvest_actors or max(1, int(self.gpus / share))

    def _slots(self, packs: int) -> tuple[int, float]:
        """Packs at once, and how many times slower each is than one alone on the whole machine."""
        if self.gpus:
            share = self.resources.gpus_per_pack
            count = max(1, min(packs, places_on(self.gpus, share)))
            return count, float(min(count, max(1, places_on(1, share))))
        threads = self.resources.threads
        most = max(1, self.cores // (threads or 1))
        count = packs_at_once(packs, cores=self.cores, most=most, threads=threads)
        each = threads or max(1, self.cores // count)
        return min(count, packs), (self.rates.threads / each) ** SCALING

    def _packs(self) -> list[Pack]:
        saes = self.resolved.saes
        slots = max(1, places_on(self.gpus, self.resources.gpus_per_pack) // self.resources.workers)
        packs = make_packs(saes, self.resources.pack_size or auto_pack_size(saes, slots), {sae.id for sae in saes})
        if self.gpus and self.rates.memory:
            limit = int(0.95 * self.rates.memory * min(1.0, self.resources.gpus_per_pack))
            for pack in packs:
                parts = len(fit_together([sae.sizes for sae in pack.saes], limit))
                if parts > 1:
                    self.notes.append(f"{len(pack.saes)} SAEs of {pack.hook} are {parts} times what a card holds")
        return packs

    def _load(self) -> float:
        return ROW_BYTES * self.resolved.table.parameters / self.rates.load_bytes

    def _steps(self, sae: PlannedSae) -> int:
        unstepped = sae.point.sae.control in UNSTEPPED_CONTROLS
        train = sae.point.train
        return 0 if unstepped else train.epochs * self.work.train // train.batch_size

    def _seconds_of(self, sae: PlannedSae) -> float:
        cost, train = self.rates.step(sae.point.sae.kind), sae.point.train
        rows = sae.d_in + sae.d_out
        return self._steps(sae) * cost.seconds(rows=rows, d_sae=sae.d_sae, tokens=train.batch_size, l0=active(sae))

    def _flops_of(self, sae: PlannedSae) -> float:
        """Of dense training: five products of W_enc's or W_dec's size for each token."""
        return 5.0 * (sae.d_in + sae.d_out) * sae.d_sae * self._steps(sae) * sae.point.train.batch_size

    def _epochs(self, pack: Pack) -> int:
        return pack.saes[0].point.train.epochs

    def _read_width(self, pack: Pack) -> int:
        first = pack.saes[0]
        return first.d_in + (first.d_out if first.output_hook != first.point.hook else 0)

    # The clock

    def _one_by_one(self, stage: str, pieces: Sequence[tuple[str, float]], *, bound: str, flops: float = 0.0) -> None:
        self._add(stage, self._lanes(stage, [pieces]), flops, 0.0, bound)

    def _lanes(self, stage: str, lanes: Sequence[Sequence[tuple[str, float]]]) -> float:
        """Note what each worker does, from now on; returns the seconds of the longest."""
        longest = 0.0
        for number, lane in enumerate(lanes, start=1):
            at = 0.0
            for what, seconds in lane:
                self.spans.append(Span(stage, what, f"{stage} {number}", self.now + at, self.now + at + seconds))
                at += seconds
            longest = max(longest, at)
        return longest

    def _add(self, name: str, seconds: float, flops: float, size: float, bound: str) -> None:
        self.stages.append(Stage(name, seconds, flops, size, bound))
        self.now += seconds


def active(sae: PlannedSae) -> float:
    """Features per token, on the mean over training."""
    config = sae.point.sae
    if isinstance(config, TopKConfig):
        return float(config.k)
    density = config.initial_density if isinstance(config, PenaltyConfig) else None
    return (DENSE_SHARE if density is None else density) * sae.d_sae
