"""Learning rate, sparsity warm-up and dead window of a training run: pure functions of the settings and the step."""

from __future__ import annotations

import math

from midiscover.config import TrainConfig

MAX_DEAD_WINDOW = 10_000_000
REFERENCE_STEPS, REFERENCE_WIDTH = 300, 4608
PEAK_LR = 2.5e-3
"""Peak learning rate at the reference number of steps and width, of every architecture; see tests/bench/RESULTS.md."""
LR_BOUNDS = (5e-5, 5e-3)


def peak_lr(config: TrainConfig, *, d_sae: int, steps: int) -> float:
    """The peak learning rate: the setting, or what suits the width and the number of steps.

    Falls with the square root of the width (Gao et al. 2024, section A.3) and with the power 0.4 of the number of
    steps, which takes 2e-3 at 300 steps to the 3e-4 that SAELens and dictionary_learning use at 30,000.
    """
    if config.lr is not None:
        return config.lr
    lr = PEAK_LR * math.sqrt(REFERENCE_WIDTH / d_sae) * (REFERENCE_STEPS / max(steps, 1)) ** 0.4
    return min(max(lr, LR_BOUNDS[0]), LR_BOUNDS[1])


def lr_scale(step: int, steps: int, config: TrainConfig) -> float:
    """Share of the peak learning rate at `step`: linear warm-up, plateau, linear decay to 0 after the last step."""
    warmup, decay = round(config.lr_warmup * steps), round(config.lr_decay * steps)
    rise = (step + 1) / warmup if step < warmup else 1.0
    fall = (steps - step) / decay if decay and step >= steps - decay else 1.0
    return min(rise, fall)


def l1_scale(step: int, steps: int, config: TrainConfig) -> float:
    """Share of the sparsity coefficient at `step`: linear from 0 over the warm-up."""
    warmup = round(config.l1_warmup * steps)
    return min(1.0, step / warmup) if warmup else 1.0


def dead_window(config: TrainConfig, rows_per_epoch: int) -> int:
    """Training tokens without firing after which a feature counts as dead: by default half an epoch, at most 10M.

    With resampling, at most half of what comes before the first time, so that there can be dead features by then.
    """
    if config.dead_window is not None:
        return config.dead_window
    window = min(MAX_DEAD_WINDOW, rows_per_epoch // 2)
    if config.resample_at:
        window = min(window, int(min(config.resample_at) * rows_per_epoch * config.epochs / 2))
    return max(1, window)


def resampling_steps(config: TrainConfig, steps: int) -> set[int]:
    """Steps before which dead features start anew: at the latest the last one, where a share rounds to a later one."""
    return {min(round(share * steps), steps - 1) for share in config.resample_at}


def aux_window(config: TrainConfig, window: int, rows_per_epoch: int) -> int:
    """The same for AuxK: the setting, else a thirtieth of all training tokens, as SAELens' 1,000 of 30,000 steps.

    So that it has time to help: what is dead for half an epoch is seldom brought back in the other half.
    """
    if config.dead_window is not None:
        return config.dead_window
    return max(1, min(window, rows_per_epoch * config.epochs // 30))
