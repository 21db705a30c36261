"""What is said beside a plan: what its rates do not tell, what it leaves out, and what will not go. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from midiscover.memory import USABLE, fit_together, training_bytes
from midiscover.plancosts import Costs, Places
from midiscover.resolve import Crew, Pack, PlannedSae, cut_crew, is_spliced, make_crews
from midiscover.sae.schedule import resampling_steps
from midiscover.saeconfig import LONGEST_WARMUP, UNSTEPPED_CONTROLS, PenaltyConfig

CHECKPOINT_BYTES = 12
"""Of a parameter: itself and Adam's two moments."""
NOTED_WRITING = 0.1
"""Of what a worker writes to the store, from which checkpoints are worth a note."""
ALONE = Places(1, 1.0)


def notes(costs: Costs, packs: Sequence[Pack], *, streamed: bool) -> list[str]:
    """Sentences about what a plan can't tell of a run, what a card does not hold, and what ends in an error."""
    return [
        *_errors(costs),
        *_other_precision(costs),
        *_cut(costs, packs, streamed=streamed),
        *_too_large(costs, streamed=streamed),
        *_left_out(costs, packs),
    ]


def _errors(costs: Costs) -> list[str]:
    """What the sweep will end in."""
    work, found = costs.work, list[str]()
    for sae in costs.resolved.saes:
        size, epochs = sae.point.train.batch_size, sae.point.train.epochs
        if size > work.train * epochs:
            found.append(
                f"the sweep will end in an error: train.batch_size {size} is more than the {work.train} training rows "
                f"of {sae.point.hook} give in {epochs} epochs: lower it, or give more text"
            )
            break
    for wrong in (idle_resampling(costs.resolved.saes, work.train), long_warmup(costs.resolved.saes)):
        if wrong is not None:
            found.append(f"the sweep will end in an error where such SAEs are yet to be trained: {wrong}")
    if work.held_out == 0:
        found.append(
            "the sweep will end in an error: the corpus has no held-out window, so nothing can be measured; raise "
            "corpus.held_out or give more text"
        )
    return found


def idle_resampling(saes: Iterable[PlannedSae], rows: int) -> str | None:
    """Why `train.resample_at` can do nothing in one of some SAEs on so many training rows; None where it may in all.

    Only a `train.dead_window` that is given can be too long; its default is shorter.
    """
    for sae in saes:
        train = sae.point.train
        steps = train.epochs * rows // train.batch_size
        if train.dead_window is None or not train.resample_at or sae.point.sae.control in UNSTEPPED_CONTROLS:
            continue
        before = max(resampling_steps(train, steps)) * train.batch_size
        if 0 <= before < train.dead_window:
            return (
                f"train.dead_window is {train.dead_window}, more than the {before} rows before the last of "
                "train.resample_at, so that no feature could be resampled: lower it, or leave one of the two out"
            )
    return None


def long_warmup(saes: Iterable[PlannedSae]) -> str | None:
    """Why `train.l1_warmup` leaves one of some SAEs too few steps for its `sae.target_l0`; None where it leaves all
    enough."""
    for sae in saes:
        settings, warmup = sae.point.sae, sae.point.train.l1_warmup
        if isinstance(settings, PenaltyConfig) and settings.target_l0 is not None and warmup > LONGEST_WARMUP:
            return (
                f"train.l1_warmup is {warmup:g}, which leaves too few steps for sae.target_l0, steered to after it: "
                f"take {LONGEST_WARMUP:g} at most, or leave one of the two out"
            )
    return None


def _left_out(costs: Costs, packs: Sequence[Pack]) -> list[str]:
    """What takes time and is not in the plan."""
    found = list[str]()
    if costs.resources.workers > 1:
        found.append(
            f"what the {costs.resources.workers} processes of a pack tell each other in every step is left out of the "
            "time"
        )
    places = costs.slots(len(packs))
    for pack in packs:
        size = CHECKPOINT_BYTES * sum(sae.d_sae * (sae.d_in + sae.d_out) for sae in pack.saes)
        every = pack.saes[0].point.train.checkpoint_every
        if size / every > NOTED_WRITING * costs.rates.write and costs.training(pack, places) > every:
            found.append(
                f"checkpoints are left out of time and bytes: {_gb(size)} of each pack every {every:g} s, by "
                "train.checkpoint_every"
            )
            break
    return found


def _other_precision(costs: Costs) -> list[str]:
    rates, config = costs.rates, costs.resolved.config
    trained = {sae.point.train.dtype for sae in costs.resolved.saes}
    measure = ": `midiscover calibrate` with its settings measures that" if rates.measured else ""
    return [
        f"these rates are those of {name} {known}, and the run has {dtype}, which may be several times as slow or "
        f"as quick{measure}"
        for name, known, dtypes in (
            ("model.dtype", rates.model_dtype, {config.model.dtype}),
            ("train.dtype", rates.train_dtype, trained),
        )
        for dtype in sorted(dtypes - {known})
    ]


def _too_large(costs: Costs, *, streamed: bool) -> list[str]:
    """What no card of these holds, however it is cut."""
    found = list[str]()
    room = costs.room(streamed=streamed)
    if room is None or costs.rates.memory is None:
        return found
    card = costs.rates.memory * costs.card_of_model
    if costs.model_on_card() > card:
        needs = f"the language model needs {_gb(costs.model_on_card())} of a card, and there are {_gb(card)}"
        found.append(f"{needs}; resources.gpus_per_model spreads it over several cards")
    site = [max(costs.resolved.saes, key=lambda sae: costs.evaluating([sae], ALONE, model=True, spliced=False))]
    spliced = is_spliced(site[0]) and costs.resolved.config.evaluate.ce_tokens > 0
    measured, usable = costs.evaluating(site, ALONE, model=True, spliced=spliced).card, USABLE * card
    if measured > usable >= costs.model_on_card():
        found.append(
            f"an SAE of {site[0].d_sae:,} features on {site[0].point.hook} needs {_gb(measured)} of a card where it is "
            f"measured beside the language model, and there are {_gb(usable)}"
        )
    largest = max(costs.resolved.saes, key=lambda sae: training_bytes([costs.sizes(sae)]))
    needed = training_bytes([costs.sizes(largest)])
    if needed > room:
        beside = " beside the language model" if streamed else ""
        found.append(
            f"an SAE of {largest.d_sae:,} features on {largest.point.hook} needs {_gb(needed)} of a card in "
            f"training, and there are {_gb(max(0, room))}{beside}"
        )
    return found


def _cut(costs: Costs, packs: Sequence[Pack], *, streamed: bool) -> list[str]:
    """What is more than a card holds at once."""
    room = costs.room(streamed=streamed)
    if room is None:
        return []
    crews: Sequence[Crew] = [(pack,) for pack in packs]
    if streamed:
        crews = make_crews(packs, costs.crews(packs), list(costs.resolved.table.hooks))
    shared = costs.resources.workers > 1
    parts = [
        len(fit_together([costs.sizes(sae) for sae in crew[0].saes], room) if shared else cut_crew(crew, room))
        for crew in crews
    ]
    cut = sum(number > 1 for number in parts)
    if not cut:
        return []
    most = parts.index(max(parts))
    crew = crews[most]
    where = crew[0].hook if len(crew) == 1 else f"{len(crew)} hooks"
    told = f"{sum(len(pack.saes) for pack in crew)} SAEs of {where} are {parts[most]} times what a card holds"
    if shared:
        told += ", and with resources.workers above 1 they are not trained in parts: give resources.pack_size"
    elif streamed:
        told += ", and for each part the language model reads the text anew"
    return [told + (f"; so it is with {cut - 1} more" if cut > 1 else "")]


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
