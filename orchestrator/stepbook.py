"""The records of metrics.jsonl, and what microbatches that were handed out say of their steps."""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import TrainingError
from orchestrator.plan import Plan
from orchestrator.schedule import learning_rate
from orchestrator.served import Done

PARTS = ("data", "compute", "reduce")


def seal(samples: float, expected: int, ledgers: NDArray[np.int64], step: int) -> str:
    """The ledger of a step from its shards' [shards]; raises TrainingError if not every sample was used once."""
    if round(samples) != expected:
        raise TrainingError(f"step {step}: {samples:.0f} samples were computed where {expected} belong")
    return f"{zlib.crc32(ledgers.tobytes()):08x}"


def step_record(
    plan: Plan, step: int, loss: float, lr: float, samples: int, ledger: str, step_s: float, shares: Sequence[float]
) -> dict[str, Any]:
    """A line of metrics.jsonl, but for who trained and when.

    Args:
        step: how many are done.
        shares: of the step's time, for data, computation and reduction.
    """
    step_s = max(step_s, 1e-9)
    return {
        "step": step,
        "epoch": plan.epoch_of(step - 1),
        "loss": loss,
        "lr": lr,
        "samples": samples,
        "ledger": ledger,
        "samples_per_s": round(samples / step_s, 3),
        "step_s": round(step_s, 6),
        **{f"{part}_share": round(min(1.0, share), 4) for part, share in zip(PARTS, shares, strict=True)},
    }


class StepBook:
    """Collects what was done until a step is complete."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._open: dict[int, dict[int, Done]] = {}
        self._updates, self._stale, self._worst = 0, 0, 0

    def clear(self) -> None:
        """Forget what is not complete: it will be done again."""
        self._open.clear()

    def add(self, done: Done) -> None:
        self._open.setdefault(done.unit.step, {})[done.unit.shard] = done

    def count(self, step: int) -> float:
        """Items of a complete step."""
        return sum(done.count for done in self._open[step].values())

    def close(self, step: int, step_s: float) -> dict[str, Any]:
        """The record of a complete step, but for who trained and when; raises TrainingError if its samples are wrong.

        Args:
            step: as counted by the schedule, from 0.
            step_s: seconds since the one before was complete.
        """
        dones = self._open.pop(step)
        schedule, shards = self._plan.schedule, self._plan.config.shards
        samples = sum(done.samples for done in dones.values())
        ledgers = np.asarray([dones[v].ledger if v in dones else 0 for v in range(shards)], np.int64)
        ledger = seal(samples, schedule.samples_in_step(step), ledgers, step)
        stale = [done.staleness for done in dones.values()]
        self._updates, self._stale = self._updates + len(stale), self._stale + sum(stale)
        self._worst = max(self._worst, *stale)
        parts_s = np.asarray([(done.data_s, done.compute_s, done.exchange_s) for done in dones.values()]).sum(axis=0)
        loss = sum(dones[v].loss for v in sorted(dones)) / (sum(d.count for d in dones.values()) or 1.0)
        lr = learning_rate(self._plan.config, step, self._plan.total_steps)
        shares = (parts_s / (parts_s.sum() or 1.0)).tolist()
        return {
            **step_record(self._plan, step + 1, loss, lr, samples, ledger, step_s, shares),
            "staleness_mean": round(sum(stale) / len(stale), 3),
            "staleness_max": max(stale),
        }

    def staleness(self) -> dict[str, float]:
        """Of all updates so far: mean and most."""
        return {"mean": round(self._stale / max(1, self._updates), 3), "max": self._worst}
