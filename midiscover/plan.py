"""What a sweep will take before it runs: FLOPs, bytes, seconds, by the rates of a device. Loads no torch.

A model of the scheduler, stage by stage as `jobs.sweep` goes through them: the harvest by as many language models as
fit, packs in their order on as many slots, then the sites of the evaluation. It says nothing of what is committed
already: a plan is of the whole sweep.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from midiscover.ids import variants
from midiscover.neighbours import MOST_PAIRS, chosen, neighbours
from midiscover.plancosts import NOTHING, ROW_BYTES, Costs, Held
from midiscover.plannotes import notes
from midiscover.rates import Rates
from midiscover.resolve import Pack, Resolved, by_site, is_spliced, make_crews
from midiscover.work import Work

NOTED_SHARE = 0.01
"""Of a sweep, from which features in common are worth a note."""


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
    written: float
    """Bytes to the store: activations and SAEs."""
    read: float
    """Bytes from it, of training: an epoch after another, or once where all rows fit one pool."""
    card: float
    """Bytes of the fullest card; 0 where there are none."""
    host: float
    """Bytes of main memory for rows, weights and tables, for each card, or for the machine where there are none; beside
    2 to 3 GB of Ray and Python themselves."""
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
    def gpu_hours(self) -> float:
        """Hours of cards, whether they are used or wait; 0 on a CPU."""
        return self.gpus * self.seconds / 3600

    @property
    def host(self) -> float:
        """Bytes of RAM in the stage that takes most, for each card, or for the machine where there are none."""
        return max(stage.host for stage in self.stages)

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

    bandwidth: bytes/s of the store in all; None: as much as the workers take. streamed: see `ways`. ConfigError where
    `resources` asks for more workers than the cards have room for.
    """
    return _Planner(Costs(resolved, work, rates, gpus, cores), bandwidth, streamed).plan()


class _Planner:
    """Lays one stage after another."""

    def __init__(self, costs: Costs, bandwidth: float | None, streamed: bool) -> None:
        self.costs, self.resolved, self.work, self.rates = costs, costs.resolved, costs.work, costs.rates
        self.bandwidth, self.streamed = bandwidth or float("inf"), streamed
        self.now = 0.0
        self.stages: list[Stage] = []
        self.spans: list[Span] = []
        self.packs = costs.packs()
        self.notes = notes(costs, self.packs, streamed=streamed)

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
            gpus=self.costs.gpus,
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
        self._add("start", self._lanes("start", [pieces]), bound="starting, reading the text")

    def _harvest(self, part: Resolved) -> None:
        places = self.costs.models()
        tokens = self.work.train + self.work.held_out
        flops = tokens * max(part.table.require(hook).flops_per_token for hook in part.hooks)
        size = tokens * ROW_BYTES * sum(part.hooks.values())
        computing = flops / (self.rates.model_flops * places.at_once) * places.slower
        writing = size / min(self.rates.write * places.at_once, self.bandwidth)
        begin = self.rates.starts["worker"] + self.costs.load()
        seconds = begin + max(computing, writing)
        self._lanes("harvest", [[("load", begin), ("harvest", seconds - begin)]] * places.at_once)
        why = "the store" if writing > computing else "the language model"
        why = why if seconds > 2 * begin else "loading the language model"
        held = self.costs.harvesting(part, places)
        self._add("harvest", seconds, flops=flops, written=size, held=held, bound=why)

    def _train(self) -> None:
        places, workers = self.costs.slots(len(self.packs)), self.resolved.config.resources.workers
        lanes: list[list[tuple[str, float]]] = [[] for _ in range(places.at_once)]
        parts = {pack.id: self.costs.parts((pack,), streamed=False) for pack in self.packs}
        reading, stepping = ([0.0] * places.at_once for _ in range(2))
        size = 0.0
        for pack in self.packs:
            number = _shortest(lanes)
            lane = lanes[number]
            # Every worker reads all rows and takes its share of each batch; every part reads them anew.
            rows = len(parts[pack.id]) * self.costs.rows(pack.saes) * ROW_BYTES * _read_width(pack)
            arriving = rows / min(self.rates.read, self.bandwidth / (places.at_once * workers))
            training = self.costs.training(pack, places)
            lane.append(("start", self.costs.again() if lane else self.rates.starts["trial"]))
            lane.append((pack.hook, max(training, arriving)))
            reading[number] += arriving
            stepping[number] += training
            size += workers * rows
        seconds = self._lanes("train", lanes)
        longest = max(range(places.at_once), key=lambda number: _seconds(lanes[number]))
        why = "the store" if reading[longest] > stepping[longest] else "the SAEs' steps"
        working = sum(s for what, s in lanes[longest] if what != "start")
        why = why if working > seconds / 2 else "starting trials"
        held = _most(self.costs.holding(part, places, streamed=False) for cut in parts.values() for part in cut)
        flops = self.costs.training_flops(self.resolved.saes)
        written = self.costs.trained_bytes
        self._add("train", seconds, flops=flops, written=written, read=size, held=held, bound=why)

    def _stream(self) -> None:
        costs = self.costs
        crews = make_crews(self.packs, costs.crews(self.packs), list(self.resolved.table.hooks))
        places = costs.slots(len(crews))
        lanes: list[list[tuple[str, float]]] = [[] for _ in range(places.at_once)]
        flops = model_seconds = 0.0
        held: list[Held] = []
        for crew in crews:
            lane = lanes[_shortest(lanes)]
            starting = costs.again() if lane else self.rates.starts["trial"]
            for part in costs.parts(crew, streamed=True):
                saes = [sae for pack in part for sae in pack.saes]
                passes = costs.passed(saes) * max(costs.to_hook(sae) for sae in saes)
                reading = passes / self.rates.model_flops * places.slower
                lane.append(("start", starting + costs.load()))
                lane.append(("language model", reading))
                lane.append((part[0].hook, sum(costs.training(pack, places) for pack in part)))
                starting = 0.0
                flops += passes
                model_seconds += reading / places.at_once
                held.append(costs.holding(part, places, streamed=True))
        seconds = self._lanes("train", lanes)
        why = "the language model" if model_seconds > seconds / 2 else "the SAEs' steps"
        starting = min(sum(s for what, s in lane if what == "start") for lane in lanes)
        why = why if starting < seconds / 2 else "loading the language model"
        flops += costs.training_flops(self.resolved.saes)
        self._add("train", seconds, flops=flops, written=costs.trained_bytes, held=_most(held), bound=why)

    def _evaluate(self) -> None:
        costs, settings = self.costs, self.resolved.config.evaluate
        sites = list(by_site(self.resolved.saes).values())
        places = costs.models(len(sites))
        lanes: list[list[tuple[str, float]]] = [[] for _ in range(places.at_once)]
        held = min(self.work.held_out, settings.max_tokens)
        spliced = min(self.work.held_out, settings.ce_tokens)
        foreign = settings.foreign_tokens if self.resolved.foreign is not None else 0
        flops = loading = 0.0
        memory: list[Held] = []
        spent = Counter[str]()
        for saes in sites:
            lane, parts = lanes[_shortest(lanes)], costs.measured(saes)
            weights = sum((sae.d_in + sae.d_out) * sae.d_sae for sae in saes)
            encoding = (held + foreign + spliced) * weights * self.rates.encode
            # Each part has passes of its own.
            through = [count for count in (sum(map(is_spliced, part)) for part in parts) if count and spliced]
            passes = sum(2 + count for count in through)
            to_the_end = passes * spliced * self.resolved.table.flops_per_token
            # What passes of a part after its first do not repeat.
            again = (passes - len(through)) * spliced * costs.before(saes[0])
            to_the_hook = len(parts) * (foreign + (held if self.streamed else 0)) * costs.to_hook(saes[0])
            computing = {
                "the spliced language model": to_the_end / self.rates.logits_flops - again / self.rates.model_flops,
                "the language model": to_the_hook / self.rates.model_flops,
                "encoding": encoding,
            }
            spent.update(computing)
            model = bool(passes or foreign or self.streamed)
            starting = (costs.load() if model else 0) + (0 if lane else self.rates.starts["worker"])
            loading = max(loading, starting)
            lane += [("load", starting), (saes[0].point.hook, sum(computing.values()) * places.slower)]
            flops += to_the_end - again + to_the_hook + 2 * (held + foreign + spliced) * weights
            memory += [costs.evaluating(part, places, model=model, spliced=passes > 0) for part in parts]
        seconds = self._lanes("evaluate", lanes)
        ((why, _),) = spent.most_common(1)
        why = why if loading < seconds / 2 else "loading the language model"
        self._add("evaluate", seconds, flops=flops, held=_most(memory), bound=why)

    def _finish(self) -> None:
        saes = {sae.id: sae for sae in self.resolved.saes}
        told = variants([sae.recorded() for sae in saes.values()])
        rows = [sae.row() | {"variant": variant} for sae, variant in zip(saes.values(), told, strict=True)]
        pairs = chosen(neighbours(rows), MOST_PAIRS)
        # Every decoder row of one with every one of the other.
        products = sum(pair.a["d_sae"] * pair.b["d_sae"] * saes[pair.a["sae_id"]].d_out for pair in pairs)
        comparing = products * self.rates.encode
        pieces = [("figures", self.rates.starts["figures"]), ("in common", comparing)]
        why = "drawing the report" if comparing < self.rates.starts["figures"] else "features in common"
        self._add("report", self._lanes("report", [pieces]), flops=2.0 * products, bound=why)
        if self.costs.gpus and comparing > NOTED_SHARE * self.now:
            self.notes.append("features in common are reckoned on a GPU; where the driver has none, they take longer")

    # The clock

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

    def _add(
        self,
        name: str,
        seconds: float,
        *,
        bound: str,
        flops: float = 0.0,
        written: float = 0.0,
        read: float = 0.0,
        held: Held = NOTHING,
    ) -> None:
        self.stages.append(Stage(name, seconds, flops, written, read, held.card, held.host, bound))
        self.now += seconds


def _shortest(lanes: Sequence[Sequence[tuple[str, float]]]) -> int:
    """The number of the worker that is free first."""
    return min(range(len(lanes)), key=lambda number: _seconds(lanes[number]))


def _seconds(lane: Sequence[tuple[str, float]]) -> float:
    return sum(seconds for _, seconds in lane)


def _read_width(pack: Pack) -> int:
    """Numbers of a row: of the hook that is read, and of another one that is predicted."""
    first = pack.saes[0]
    return first.d_in + (first.d_out if first.output_hook != first.point.hook else 0)


def _most(held: Iterable[Held]) -> Held:
    """Of pieces that run at different times, or beside others that are no larger."""
    pieces = list(held)
    return Held(max(one.card for one in pieces), max(one.host for one in pieces))
