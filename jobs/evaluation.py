"""Held-out evaluation on Ray: a task per hook, as many at once as language models fit.

A task writes sparsity.safetensors and evaluations/<id>.json of each SAE and returns nothing else; the driver commits
the records. What is measured already under the same settings is not measured again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ray
import torch
from safetensors.torch import save
from torch import Tensor

from jobs.board import Board
from jobs.harvest import ModelPlace, model_place
from jobs.runtime import Slots, last_line, own_error
from midiscover.corpus import Corpus
from midiscover.errors import StageError
from midiscover.evaluate import reconstruction_metrics, splice_metrics
from midiscover.resolve import PlannedSae, Resolved
from midiscover.saes import SPARSITY, dump, load_trained
from midiscover.store import layout
from midiscover.store.blocks import read_manifest
from midiscover.store.loader import iterate_rows
from midiscover.store.storage import Storage

ROWS_PER_BATCH = 4096
NO_SPLICE = (
    "ce_tokens",
    "ce_clean",
    "ce_zero",
    "ce_sae",
    "ce_recovered",
    "kl_zero",
    "kl_sae",
    "kl_recovered",
)


@ray.remote(max_retries=-1)
def measure_hook(
    place: ModelPlace, resolved: Resolved, storage: Storage, hook: str, planned: Sequence[PlannedSae], board: Board
) -> None:
    """Measure SAEs of one hook and write what was found."""
    torch.set_num_threads(place.threads)
    evaluate, harvest = resolved.config.evaluate, resolved.config.harvest
    saes = {p.id: load_trained(storage, p.id, device="cuda" if place.gpu else "cpu") for p in planned}
    manifest = read_manifest(storage, resolved.harvest_id, hook)
    assert manifest is not None, "SAEs are trained on a committed harvest"
    rows = iterate_rows(storage, manifest, "held_out", batch_size=ROWS_PER_BATCH, max_rows=evaluate.max_tokens)
    sums = reconstruction_metrics(saes, _seen(rows, hook, board), torch.tensor(manifest.mean))
    spliced = None
    if evaluate.ce_tokens:
        spliced = splice_metrics(
            place.load(),
            Corpus.open(storage, resolved.corpus_id),
            hook,
            saes,
            max_tokens=evaluate.ce_tokens,
            mask_first=harvest.mask_first,
            outlier_norm=harvest.outlier_norm,
            on_tokens=lambda tokens: board.post("spliced", hook, tokens),
        )
    for p in planned:
        metrics = sums[p.id].result() | (spliced.metrics(p.id) if spliced else dict.fromkeys(NO_SPLICE))
        storage.create(layout.sae_file(p.id, SPARSITY), save({"sparsity": sums[p.id].log_sparsity()}))
        document = {"v": 1, "id": p.id, "evaluation_id": resolved.evaluation_id, "metrics": metrics}
        storage.create(layout.evaluation(p.id, resolved.evaluation_id), dump(document))


def _seen(batches: Iterable[Tensor], hook: str, board: Board) -> Iterator[Tensor]:
    """The same batches, each a sign of life for the watchdog."""
    for batch in batches:
        board.post("measured", hook)
        yield batch


def evaluate_hooks(
    resolved: Resolved, storage: Storage, groups: dict[str, list[PlannedSae]], slots: Slots, board: Board
) -> None:
    """Measure the SAEs of each hook, `slots.count` hooks at once."""
    place = model_place(resolved, slots)
    task = measure_hook.options(num_cpus=slots.cpus, num_gpus=slots.gpus)  # type: ignore[attr-defined]  # ray adds it
    running: list[Any] = []
    try:
        for hook, planned in groups.items():
            if len(running) >= slots.count:
                done, running = ray.wait(running, num_returns=1)
                ray.get(done)
            running.append(task.remote(place, resolved, storage, hook, planned, board))
        ray.get(running)
    except Exception as error:
        raise own_error(error) or StageError(f"The evaluation failed: {last_line(error)}") from error


def splice_passes(groups: dict[str, list[PlannedSae]]) -> int:
    """Forward passes over the evaluated tokens: clean and zeroed for each hook, one for each SAE."""
    return sum(2 + len(members) for members in groups.values())
