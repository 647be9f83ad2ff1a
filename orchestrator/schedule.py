"""Learning rate by step: pure functions of the step and the configuration."""

import math

from orchestrator.config import RunConfig

STEP_MILESTONES = (1 / 3, 2 / 3, 8 / 9)  # He et al. 2015: epochs 30, 60 (and 80, Goyal et al. 2017) of 90


def learning_rate(config: RunConfig, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0) of `total_steps`.

    Linear warm-up over the first config.warmup share of the steps, then config.schedule: "cosine" as in
    Loshchilov and Hutter 2017 (SGDR, without restarts), "linear" to 0 (Devlin et al. 2019, A.2), "step" and
    "constant".
    """
    warm = round(config.warmup * total_steps)
    if step < warm:
        return config.lr * (step + 1) / warm
    done = (step - warm) / max(1, total_steps - warm)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "linear":
        return config.lr * (1 - done)
    if config.schedule == "step":
        return config.lr * 0.1 ** sum(step >= share * total_steps for share in STEP_MILESTONES)
    return config.lr
