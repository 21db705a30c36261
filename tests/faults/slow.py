"""A sweep with work enough that a kill falls into it: small blocks, small batches, a checkpoint after every report."""

from __future__ import annotations

from typing import Any

SLOW: dict[str, Any] = {
    "harvest": {"hooks": "model.layers.{0,1}.mlp.down_proj", "block_tokens": 256, "batch_tokens": 32},
    "evaluate": {"ce_tokens": 0},  # what is compared are weights and blocks
    "train": {"epochs": 8, "batch_size": 32, "lr": 1e-3, "checkpoint_every": 0.2, "report_every": 5},
}
