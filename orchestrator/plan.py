"""The plan of a run: everything that follows from its configuration and the size of its data."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from orchestrator.blocks import BlockOrder
from orchestrator.config import RunConfig
from orchestrator.digest import digest
from orchestrator.settings import settings
from orchestrator.shards import Schedule, sample_order


class Request(NamedTuple):
    """A microbatch, as samples are asked for it.

    Attributes:
        epoch: that it belongs to.
        indices: int64 [microbatch], the samples.
        progress: share of the run's steps that are done before it, 0 to 1; 1 outside of training.
    """

    epoch: int
    indices: NDArray[np.int64]
    progress: float = 1.0


@dataclass(frozen=True)
class Plan:
    """A run before anyone has computed anything.

    Attributes:
        workload: name in the registry.
        config: complete and resolved (no "auto" left, absolute paths).
        train_samples: samples of the training split.
        heldout_samples: samples of the held-out split.
        fingerprint: of the data.
        blocks: samples of each file that the data lies in, () where any sample is as near as any other.
    """

    workload: str
    config: RunConfig
    train_samples: int
    heldout_samples: int
    fingerprint: str
    blocks: tuple[int, ...] = ()

    @functools.cached_property
    def schedule(self) -> Schedule:
        order = BlockOrder(self.blocks, self.config.shuffle_window) if self.blocks else sample_order
        return Schedule(self.train_samples, self.config.batch_size, self.config.shards, order)

    @property
    def total_steps(self) -> int:
        return self.config.steps or (self.config.epochs or 0) * self.schedule.steps_per_epoch

    def request(self, step: int, shard: int) -> Request:
        """The microbatch of one shard of one step, without indices where the shard is empty."""
        return Request(*self.schedule.indices(self.config.seed, step, shard), step / self.total_steps)

    def epoch_of(self, step: int) -> int:
        return step // self.schedule.steps_per_epoch

    def evaluates_after(self, step: int) -> bool:
        """Whether the held-out split is evaluated when `step` steps are done; the end has its own evaluation."""
        epochs = self.config.eval_every
        every = max(1, round(epochs * self.schedule.steps_per_epoch)) if epochs else 0
        return bool(every) and step > 0 and step % every == 0 and step < self.total_steps

    @property
    def steps_per_commit(self) -> int:
        """Steps after which the workers have the same parameters again."""
        return self.config.local_steps if self.config.sync in ("local-sgd", "diloco") else 1

    @property
    def deterministic(self) -> bool:
        """Whether the result is a function of the configuration: of neither the number of workers nor of timing."""
        return self.config.parallel.exact and self.config.reduce == "fixed" and not self.config.staleness.steps

    def identity(self) -> str:
        """SHA-256 over what decides the result; a checkpoint is only loaded into a run of the same identity."""
        decisive = {
            name: str(getattr(self.config, name))
            for name, f in settings(type(self.config)).items()
            if f.metadata["result"]
        }
        version = self.config.arithmetic
        return digest([self.workload, self.fingerprint, decisive, *([version] if version > 1 else [])])

    def with_config(self, **changes: object) -> "Plan":
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **changes))  # type: ignore[arg-type]
