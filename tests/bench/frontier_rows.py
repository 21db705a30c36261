"""The activations of the frontier bench: one harvest, one file of training batches in order, one of held-out rows.

Also what needs the language model again: cross-entropy with a reconstruction in its place.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from safetensors.torch import load_file, save_file

from midiscover.configio import load_config
from midiscover.corpus import Corpus
from midiscover.evaluate import reconstruction_metrics, splice_metrics
from midiscover.lm import LanguageModel
from midiscover.resolve import Resolved, resolve
from midiscover.sae.base import Sae
from midiscover.sae.registry import folded_sae
from midiscover.store.blocks import read_manifest
from midiscover.store.loader import ActivationStream, iterate_rows
from midiscover.store.storage import Storage, open_store

ROOT = Path(__file__).parents[2]
ROWS_PER_BATCH = 4096
TOKENS_PER_ROW = 1.2
"""Tokens of text for each training row: a tenth is held out, first positions and outliers are masked."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is harvested."""

    folder: Path
    model: str
    text: str
    hook: str
    steps: int
    batch_size: int
    held_out: int
    threads: int


class Scales(NamedTuple):
    """What one unit of raw activations is in each side's inputs."""

    ours: float
    """Centred, mean norm sqrt(d_in)."""
    mean_norm: float
    """Mean norm sqrt(d_in), not centred."""
    unit: float
    """Unit mean squared norm, not centred."""


class Rows:
    """The harvest of one hook as files that every side reads."""

    def __init__(self, wanted: Wanted) -> None:
        """Harvest and write the files, unless they are there."""
        self.wanted, self.folder = wanted, wanted.folder
        self.config, self.store = self.folder / "run.yaml", str(self.folder / "store")
        self.harvest_seconds = 0.0
        if not (self.folder / "train.safetensors").exists():
            self._harvest()
            self._write()
        self.train = load_file(self.folder / "train.safetensors")["rows"]
        self.held_out = load_file(self.folder / "held_out.safetensors")["rows"]
        self.mean = sum((part.double().sum(0) for part in self.train.split(ROWS_PER_BATCH)), torch.zeros(1)) / len(
            self.train
        )

    @property
    def resolved(self) -> Resolved:
        return resolve(load_config(self.config))

    @property
    def storage(self) -> Storage:
        return open_store(self.store)

    def scales(self) -> Scales:
        root = math.sqrt(self.train.shape[1])
        centred = norms = squares = 0.0
        for part in self.train.split(ROWS_PER_BATCH):
            rows = part.double()
            squared = rows.pow(2).sum(1)
            centred += float((rows - self.mean).norm(dim=1).sum())
            norms, squares = norms + float(squared.sqrt().sum()), squares + float(squared.sum())
        count = len(self.train)
        return Scales(root * count / centred, root * count / norms, math.sqrt(count / squares))

    def metrics(self, sae: Sae) -> dict[str, float]:
        """Our held-out metrics; FVU is about the mean of the training rows."""
        sums = reconstruction_metrics({"sae": sae}, self.held_out.split(ROWS_PER_BATCH), self.mean)
        return sums["sae"].result()

    def spread_ratio(self) -> float:
        """FVU about the held-out rows' own mean, as the sides give it, over FVU about that of the training rows."""
        rows = self.held_out.double()
        return float((rows - self.mean).pow(2).sum() / (rows - rows.mean(0)).pow(2).sum())

    def ce_recovered(self, saes: Mapping[str, Sae], tokens: int) -> dict[str, float | None]:
        """Share of the cross-entropy that each SAE's reconstruction recovers, over held-out windows."""
        resolved = self.resolved
        harvest = resolved.config.harvest
        spliced = splice_metrics(
            LanguageModel.load(resolved.model, dtype=resolved.config.model.dtype),
            Corpus.open(self.storage, resolved.corpus_id),
            self.wanted.hook,
            saes,
            max_tokens=tokens,
            mask_first=harvest.mask_first,
            outlier_norm=harvest.outlier_norm,
        )
        return {name: spliced.metrics(name)["ce_recovered"] for name in saes}

    def _harvest(self) -> None:
        """`midiscover harvest` of a config of one hook."""
        wanted = self.wanted
        self.folder.mkdir(parents=True, exist_ok=True)
        tree = {
            "name": "frontier",
            "model": {"id": wanted.model, "dtype": "auto"},
            "corpus": {
                "source": wanted.text,
                "max_tokens": round(TOKENS_PER_ROW * max(wanted.steps * wanted.batch_size, 10 * wanted.held_out)),
                "context_size": 128,
            },
            "harvest": {"hooks": wanted.hook},
            "train": {"batch_size": wanted.batch_size},
            "resources": {"threads": wanted.threads, "harvest_actors": 1},
        }
        self.config.write_text(yaml.safe_dump(tree))
        began = time.monotonic()
        command = [sys.executable, "-m", "midiscover.cli", "harvest", str(self.config), "--store", self.store]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
        self.harvest_seconds = time.monotonic() - began

    def _write(self) -> None:
        """The files, in the order in which our loader shuffles one epoch."""
        wanted, resolved = self.wanted, self.resolved
        manifest = read_manifest(self.storage, resolved.harvest_id, wanted.hook)
        assert manifest is not None, "the harvest is over"
        if manifest.usable["train"] < wanted.steps * wanted.batch_size:
            raise SystemExit(
                f"The text gives {manifest.usable['train']:,} training rows, and {wanted.steps} steps of "
                f"{wanted.batch_size:,} need {wanted.steps * wanted.batch_size:,}; give --text or fewer --steps."
            )
        stream = ActivationStream(self.storage, manifest, batch_size=wanted.batch_size, seed=0)
        train = torch.cat([batch for _, batch in zip(range(wanted.steps), stream, strict=False)])
        held_out = torch.cat(
            list(iterate_rows(self.storage, manifest, "held_out", ROWS_PER_BATCH, max_rows=wanted.held_out))
        )
        save_file({"rows": held_out.contiguous()}, self.folder / "held_out.safetensors")
        partial = self.folder / "train.partial"
        save_file({"rows": train}, partial)
        partial.rename(self.folder / "train.safetensors")


def load_made(path: Path, shape: tuple[int, int]) -> Sae:
    """The SAE that a runner wrote: `path`.safetensors and `path`.json, of shape [d_in, d_sae]."""
    cfg = json.loads(path.with_name(path.name + ".json").read_text())["cfg"]
    fields = {"k": cfg["k"]} if cfg.get("k") else {}
    weights = load_file(path.with_name(path.name + ".safetensors"))
    return folded_sae({"architecture": cfg["architecture"], "d_in": shape[0], "d_sae": shape[1], **fields}, weights)
