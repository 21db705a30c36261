"""The curves and metrics of a sweep's SAEs in Weights & Biases, beside the tracker; off unless asked for.

On by `MIDISCOVER_WANDB_PROJECT=<project>`; wandb's own variables (`WANDB_MODE`, `WANDB_DIR`, `WANDB_ENTITY`,
`WANDB_API_KEY`) are honoured. One run per SAE, its id the SAE's, grouped by sweep: settings as config, the loss curve
under `train/`, the held-out metrics in the summary. Only what is made while it is on is shown there; the store and the
tracker are complete without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from midiscover.configio import to_tree
from midiscover.ids import hook_layer
from midiscover.launch import wandb_online, wandb_project
from midiscover.resolve import PlannedSae

SETTINGS = ("hook", "layer", "kind", "d_in", "d_sae", "sae", "train")
"""Entries of record.json that are known before training."""


class Mirror:
    """The runs of one sweep. Does nothing without a project; the first error is said and ends it, never the sweep."""

    def __init__(self, sweep_id: str, say: Callable[[str], None]) -> None:
        """say: where a sentence for the user goes. ConfigError as for `wandb_project`."""
        self.sweep_id, self.say = sweep_id, say
        self.project = wandb_project()
        self.settings: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, Any] = {}
        self.written: dict[str, int] = {}
        """SAE id -> the last step in its run."""

    def plan(self, saes: Sequence[PlannedSae]) -> None:
        """Keep the settings of SAEs about to be trained, for when their first point comes."""
        for sae in saes:
            values = (sae.point.hook, hook_layer(sae.point.hook), sae.point.sae.kind, sae.d_in, sae.d_sae)
            trees = (to_tree(sae.point.sae), to_tree(sae.point.train))
            self.settings[sae.id] = dict(zip(SETTINGS, (*values, *trees), strict=True))

    def points(self, sae: str, columns: Mapping[str, Sequence[float]]) -> None:
        """Points of a loss curve, by column; those that the run holds already are left out."""
        self._guarded(self._points, sae, columns)

    def final(self, record: Mapping[str, Any], history: Mapping[str, Sequence[float]]) -> None:
        """The record of an SAE that has just been committed: what its curve lacks, its metrics, the end of its run."""
        self._guarded(self._final, record, history)

    def dropped(self, sae: str, status: str, reason: str) -> None:
        """The end of an SAE that will have no record, `failed` or `retired`."""
        self._guarded(self._dropped, sae, status, reason)

    def end(self) -> None:
        """Close the runs that are still open: their SAEs are not done, and a later sweep goes on with them."""
        for sae in list(self.runs):
            self._guarded(self._finish, sae, 1)

    def _guarded(self, write: Callable[..., None], *args: Any) -> None:
        if self.project is None:
            return
        try:
            write(*args)
        except Exception as error:  # a guest in the house: whatever ails it, the sweep goes on
            self.project = None
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            self.say(f"wandb: {reason.rstrip('.')}. The sweep goes on without it.")

    def _points(self, sae: str, columns: Mapping[str, Sequence[float]]) -> None:
        run = self._run(sae)
        for i, step in enumerate(columns["step"]):
            if step > self.written[sae]:
                run.log({f"train/{n}": column[i] for n, column in columns.items() if n != "step"}, step=int(step))
                self.written[sae] = int(step)

    def _final(self, record: Mapping[str, Any], history: Mapping[str, Sequence[float]]) -> None:
        sae = record["id"]
        self.settings.setdefault(sae, {name: record[name] for name in SETTINGS})
        self._points(sae, history)
        metrics = {n: value for n, value in record["metrics"].items() if isinstance(value, (int, float))}
        self._run(sae).summary.update(metrics | {"status": "done"})
        self._finish(sae, 0)

    def _dropped(self, sae: str, status: str, reason: str) -> None:
        self._run(sae).summary.update({"status": status, "reason": reason})
        self._finish(sae, int(status == "failed"))

    def _finish(self, sae: str, exit_code: int) -> None:
        self.runs.pop(sae).finish(exit_code=exit_code)

    def _run(self, sae: str) -> Any:
        """The open run of an SAE; several are open at a time."""
        if sae not in self.runs:
            import wandb

            quiet = wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True)
            run = wandb.init(
                project=self.project,
                id=sae,
                name=sae,
                group=self.sweep_id,
                config=self.settings.get(sae, {}),
                resume="allow" if wandb_online() else None,  # offline each process writes a file of its own
                reinit="create_new",
                settings=quiet,
            )
            self.runs[sae] = run
            self.written[sae] = max(run.step - 1, self.written.get(sae, -1))
        return self.runs[sae]
