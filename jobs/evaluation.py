"""Held-out evaluation on Ray: a task per site (harvest, hook, hook that is reconstructed), as many at once as language
models fit.

A task writes sparsity.safetensors and evaluations/<id>.json of each SAE and returns nothing else; the driver commits
the records. What is measured already under the same settings is not measured again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import ray
import torch
from safetensors.torch import save
from torch import Tensor

from jobs.board import MAX_DEATHS, Board, Event, watched
from jobs.halving import in_parts, room_of_card
from jobs.harvest import ModelPlace, model_place
from jobs.progress import Bars
from jobs.runtime import Slots, last_line, own_error
from midiscover.cores import compute_on
from midiscover.corpus import Corpus
from midiscover.errors import StageError
from midiscover.evaluate import SpliceResult, reconstruction_metrics, splice_metrics
from midiscover.foreign import foreign_rows, foreign_windows
from midiscover.live import held_out_windows, usable_rows
from midiscover.lm import LanguageModel, load_tokenizer
from midiscover.memory import MEASURED_ROWS, MODEL_BYTES, fit_together, measuring_bytes, spliced_bytes
from midiscover.packing import Windows
from midiscover.reading import Reader
from midiscover.resolve import PlannedSae, Resolved, Site, is_spliced
from midiscover.sae.base import Sae
from midiscover.sae.metrics import FOREIGN, MetricSums
from midiscover.saes import SPARSITY, load_trained
from midiscover.source import iterate_pairs
from midiscover.store import layout
from midiscover.store.blocks import read_manifest
from midiscover.store.documents import dump, read_json
from midiscover.store.loader import iterate_rows
from midiscover.store.storage import Storage
from midiscover.texts import foreign_config
from midiscover.train import Pair

NO_SPLICE = (
    "ce_tokens",
    "ce_clean",
    "ce_zero",
    "ce_sae",
    "ce_recovered",
    "ce_recovered_error",
    "kl_zero",
    "kl_sae",
    "kl_recovered",
)


Groups = Mapping[Site, Sequence[PlannedSae]]


@ray.remote(max_retries=-1)
def measure_site(
    slots: Slots,
    resolved: Resolved,
    storage: Storage,
    site: Site,
    planned: Sequence[PlannedSae],
    foreign: Windows | None,
    board: Board,
) -> None:
    """Measure SAEs of one site and write what was found; `resolved` is the part of the run that they belong to.

    As many at once as fit a card by reckoning; where fewer fit, half of them. StageError where the process died again
    and again: Ray starts it anew without limit, for a lost node is nobody's mistake.
    """
    work = " ".join(site)
    starts = board.start(work)
    if starts > MAX_DEATHS:
        raise StageError(
            f"The process that measures the SAEs of '{site.hook}' died {MAX_DEATHS} times before any more were "
            "measured; its node may have too little memory."
        )
    if starts > 1:
        board.post("retry", site.hook, f"its process died, and this is start {starts} of {MAX_DEATHS}")
    place = model_place(resolved, slots)
    compute_on(place.threads)
    load = cache(place.load)  # once, for all parts

    def measure_part(part: Sequence[PlannedSae]) -> None:
        found = _measured(load, place, resolved, storage, site, part, foreign, board)
        for sae, (sums, metrics) in found.items():
            storage.create(layout.sae_file(sae, SPARSITY), save({"sparsity": sums.log_sparsity()}))
            document = {"v": 1, "id": sae, "evaluation_id": resolved.evaluation_id, "metrics": metrics}
            storage.create(layout.evaluation(sae, resolved.evaluation_id), dump(document))
            board.reach(work, sae, 0)

    def say(part: Sequence[PlannedSae]) -> None:
        board.post("retry", site.hook, f"{len(part)} SAEs are too many for the memory here; half of them at a time")

    todo = [p for p in planned if not storage.exists(layout.evaluation(p.id, resolved.evaluation_id))]
    in_parts(_parts(todo, resolved, slots), measure_part, say)


def _parts(planned: Sequence[PlannedSae], resolved: Resolved, slots: Slots) -> list[list[PlannedSae]]:
    """SAEs, in their order, in as few parts as fit this card beside the language model by reckoning."""
    if not slots.gpus:
        return [[*planned]] if planned else []
    model = MODEL_BYTES[resolved.config.model.dtype] * resolved.table.parameters // max(1, int(slots.gpus))
    splices = resolved.config.evaluate.ce_tokens and any(map(is_spliced, planned))
    tables = spliced_bytes(resolved.config.corpus.context_size, resolved.table.vocab_size) if splices else 0
    parts = fit_together([p.sizes for p in planned], room_of_card(slots.gpus) - model - tables, measuring_bytes)
    return [[planned[i] for i in part] for part in parts]


def _measured(
    load: Callable[[], LanguageModel],
    place: ModelPlace,
    resolved: Resolved,
    storage: Storage,
    site: Site,
    planned: Sequence[PlannedSae],
    foreign: Windows | None,
    board: Board,
) -> dict[str, tuple[MetricSums, dict[str, Any]]]:
    """Id -> what was summed up over the held-out rows, and all metrics, of SAEs that are in memory together."""
    saes: dict[str, Sae] = {}
    for p in planned:
        saes[p.id] = load_trained(storage, p.id, device="cuda" if place.gpu else "cpu")
        board.post("loaded", site.hook)  # a sign of life: a store may be slow, and they may be many
    spliced = {p.id: saes[p.id] for p in planned if is_spliced(p)} if resolved.config.evaluate.ce_tokens else {}
    sums = _stored(resolved, storage, site, saes, board)
    reader = None
    if spliced or foreign is not None or sums is None:
        config = resolved.config
        reader = Reader(load(), resolved.hooks, config.harvest, config.corpus.context_size)
        sums = sums or _held_out(reader, resolved, storage, site, saes, board)
    assert sums is not None, "from the store, or else from the reader"
    splice = _spliced(reader.model, resolved, storage, site, spliced, board) if reader and spliced else None
    abroad = _foreign(reader, site, saes, foreign, board) if reader and foreign is not None else {}
    found: dict[str, tuple[MetricSums, dict[str, Any]]] = {}
    for p in planned:
        metrics = sums[p.id].result()
        metrics |= splice.metrics(p.id) if splice and p.id in spliced else dict.fromkeys(NO_SPLICE)
        metrics |= abroad[p.id].foreign() if p.id in abroad else dict.fromkeys(FOREIGN)
        found[p.id] = sums[p.id], metrics
    return found


def _stored(
    resolved: Resolved, storage: Storage, site: Site, saes: Mapping[str, Sae], board: Board
) -> dict[str, MetricSums] | None:
    """From the stored held-out rows; None where there are none."""
    limit = resolved.config.evaluate.max_tokens
    rows: Iterable[Tensor | Pair]
    inputs, outputs = (read_manifest(storage, site.harvest_id, hook) for hook in (site.hook, site.output_hook))
    if inputs is None or outputs is None:
        return None
    if site.hook == site.output_hook:
        rows = iterate_rows(storage, inputs, "held_out", MEASURED_ROWS, limit)
    else:
        rows = iterate_pairs(storage, inputs, outputs, "held_out", MEASURED_ROWS, limit)
    return reconstruction_metrics(saes, _seen(rows, site, board), torch.tensor(outputs.mean))


def _held_out(
    reader: Reader, resolved: Resolved, storage: Storage, site: Site, saes: Mapping[str, Sae], board: Board
) -> dict[str, MetricSums]:
    """From the held-out rows that the language model gives now."""
    windows = held_out_windows(Corpus.open(storage, resolved.corpus_id), resolved.config.harvest.block_tokens)
    limit = resolved.config.evaluate.max_tokens
    rows = usable_rows(reader, windows, (site.hook, site.output_hook), MEASURED_ROWS, limit)
    return reconstruction_metrics(saes, _seen(rows, site, board), _training_mean(storage, next(iter(saes))))


def _training_mean(storage: Storage, sae_id: str) -> Tensor:
    """[d_out], of the rows that a streamed SAE was trained on."""
    return torch.tensor((read_json(storage, layout.training(sae_id)) or {})["output_mean"])


def _spliced(
    model: LanguageModel, resolved: Resolved, storage: Storage, site: Site, saes: Mapping[str, Sae], board: Board
) -> SpliceResult:
    """With the reconstructions in the place of what they reconstruct."""
    return splice_metrics(
        model,
        Corpus.open(storage, resolved.corpus_id),
        site.hook,
        saes,
        output_hook=site.output_hook,
        max_tokens=resolved.config.evaluate.ce_tokens,
        mask_first=resolved.config.harvest.mask_first,
        outlier_norm=resolved.config.harvest.outlier_norm,
        on_tokens=lambda tokens: board.post("spliced", site.hook, tokens),
    )


def _foreign(
    reader: Reader, site: Site, saes: Mapping[str, Sae], windows: Windows, board: Board
) -> dict[str, MetricSums]:
    """On the foreign text; one pass of the language model for all SAEs."""
    rows = foreign_rows(reader, windows, (site.hook, site.output_hook), MEASURED_ROWS)
    d_out = reader.hooks[site.output_hook]
    return reconstruction_metrics(saes, _seen(rows, site, board), torch.zeros(d_out))


def _seen(batches: Iterable[Tensor | Pair], site: Site, board: Board) -> Iterator[Tensor | Pair]:
    """The same batches, each a sign of life for the watchdog."""
    for batch in batches:
        board.post("measured", site.hook)
        yield batch


def evaluate_hooks(resolved: Resolved, storage: Storage, groups: Groups, slots: Slots, board: Board) -> None:
    """Measure the SAEs of each site, `slots.count` sites at once."""
    foreign = ray.put(_foreign_text(resolved, storage))
    task = measure_site.options(num_cpus=slots.cpus, num_gpus=slots.gpus)  # type: ignore[attr-defined]  # ray adds it
    running: list[Any] = []
    try:
        for site, planned in groups.items():
            if len(running) >= slots.count:
                done, running = ray.wait(running, num_returns=1)
                ray.get(done)
            part = resolved.part_of(planned[0])
            running.append(task.remote(slots, part, storage, site, planned, foreign, board))
        ray.get(running)
    except Exception as error:
        raise own_error(error) or StageError(f"The evaluation failed: {last_line(error)}") from error


def _foreign_text(resolved: Resolved, storage: Storage) -> Windows | None:
    """The foreign text as windows, made where the driver runs: its file may lie nowhere else."""
    config = foreign_config(resolved.config.corpus, resolved.config.evaluate)
    if config is None or resolved.foreign is None:
        return None
    like = Corpus.open(storage, resolved.corpus_id).manifest
    return foreign_windows(config, resolved.foreign, load_tokenizer(resolved.model), like)


def measure(resolved: Resolved, storage: Storage, groups: Groups, slots: Slots, bars: Bars) -> None:
    """`evaluate_hooks` with its progress shown, and a watch on it."""
    done, total = 0, splice_passes(groups) * resolved.config.evaluate.ce_tokens

    def on_event(event: Event) -> bool:
        nonlocal done
        if event.kind == "spliced":
            done += event.data
            bars.update("evaluate", min(done, total), total, f"{done:,} tokens through the spliced model")
        elif event.kind == "retry":
            bars.say(f"evaluation of {event.key}: {event.data}")
        return True  # what comes to nothing ends where tasks are started, which counts their deaths

    with watched("evaluation", on_event, stall_seconds=resolved.config.resources.stall_seconds) as board:
        evaluate_hooks(resolved, storage, groups, slots, board)


def splice_passes(groups: Groups) -> int:
    """Forward passes over the evaluated tokens: clean and zeroed for each site, one for each SAE."""
    spliced = [sum(map(is_spliced, members)) for members in groups.values()]
    return sum(2 + count for count in spliced if count)
