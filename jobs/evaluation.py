"""Held-out evaluation on Ray: one actor per device with the language model, one hook at a time.

An actor writes sparsity.safetensors and evaluations/<id>.json of each SAE and returns nothing else; the driver commits
the records. What is measured already under the same settings is not measured again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
import torch
from ray.util import ActorPool
from safetensors.torch import save

from jobs.board import Board
from jobs.harvest import ModelPlace, model_place
from jobs.runtime import Slots, own_error
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


@ray.remote(max_restarts=-1, max_task_retries=-1)
class Evaluator:
    """A device that measures SAEs; loads the language model when the first hook is spliced."""

    def __init__(self, place: ModelPlace, resolved: Resolved, storage: Storage, board: Board) -> None:
        torch.set_num_threads(place.threads)
        self.place, self.resolved, self.storage, self.board = place, resolved, storage, board
        self.model: Any = None

    def measure(self, hook: str, planned: Sequence[PlannedSae]) -> None:
        """Measure SAEs of one hook and write what was found."""
        evaluate, harvest = self.resolved.config.evaluate, self.resolved.config.harvest
        device = "cuda" if self.place.gpu else "cpu"
        saes = {p.id: load_trained(self.storage, p.id, device=device) for p in planned}
        manifest = read_manifest(self.storage, self.resolved.harvest_id, hook)
        assert manifest is not None, "SAEs are trained on a committed harvest"
        rows = iterate_rows(self.storage, manifest, "held_out", batch_size=ROWS_PER_BATCH, max_rows=evaluate.max_tokens)
        sums = reconstruction_metrics(saes, rows, torch.tensor(manifest.mean))
        spliced = None
        if evaluate.ce_tokens:
            self.model = self.model or self.place.load()
            spliced = splice_metrics(
                self.model,
                Corpus.open(self.storage, self.resolved.corpus_id),
                hook,
                saes,
                max_tokens=evaluate.ce_tokens,
                mask_first=harvest.mask_first,
                outlier_norm=harvest.outlier_norm,
                on_tokens=lambda tokens: self.board.post("spliced", hook, tokens),
            )
        for p in planned:
            extra = spliced.metrics(p.id) if spliced else dict.fromkeys(NO_SPLICE)
            metrics = sums[p.id].result() | extra
            sparsity = save({"sparsity": sums[p.id].log_sparsity()})
            self.storage.create(layout.sae_file(p.id, SPARSITY), sparsity)
            document = {"v": 1, "id": p.id, "evaluation_id": self.resolved.evaluation_id, "metrics": metrics}
            self.storage.create(layout.evaluation(p.id, self.resolved.evaluation_id), dump(document))


def evaluate_hooks(
    resolved: Resolved, storage: Storage, groups: dict[str, list[PlannedSae]], slots: Slots, board: Board
) -> None:
    """Measure the SAEs of each hook, `slots.count` hooks at once."""
    options = {"num_cpus": slots.cpus, "num_gpus": slots.gpus}
    actors = [
        Evaluator.options(**options).remote(model_place(resolved, slots), resolved, storage, board)  # type: ignore[attr-defined]  # ray adds it
        for _ in range(min(slots.count, len(groups)))
    ]
    try:
        pool = ActorPool(actors)
        for _ in pool.map_unordered(lambda actor, item: actor.measure.remote(*item), list(groups.items())):
            pass
    except Exception as error:
        last = str(error).strip().splitlines()[-1]
        raise own_error(error) or StageError(f"The evaluation failed: {last}") from error
    finally:
        for actor in actors:
            ray.kill(actor)


def splice_passes(groups: dict[str, list[PlannedSae]]) -> int:
    """Forward passes over the evaluated tokens: clean and zeroed for each hook, one for each SAE."""
    return sum(2 + len(members) for members in groups.values())
