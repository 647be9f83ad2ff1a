"""One step's gradients, the sharded way: the same bits for any number of workers."""

import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.batchnorm import RunningStatistics
from orchestrator.devices import compute_now, seed, sent
from orchestrator.errors import NonFiniteLossError
from orchestrator.feed import Fed, batches
from orchestrator.group import Group
from orchestrator.plan import Plan, Request
from orchestrator.reduce import TreeReducer
from orchestrator.shards import Placement, derive_seed
from orchestrator.state import TrainingState
from orchestrator.stepbook import seal
from workloads.workload import Sums, Workload

ROW = ("loss", "count", "stop", "samples", "ledger", "data_s")  # what each shard reports beside its gradients
EXACT = 2**24  # whole numbers below it are exact in fp32


@dataclass(frozen=True)
class StepTotals:
    """What a step found out, the same on every worker but for the seconds.

    Attributes:
        loss: mean over the global batch.
        samples: of the global batch.
        gradient_scale: what the summed gradients have to be multiplied by to be those of `loss`.
        stop: whether some worker asked to stop after this step.
        ledger: 8 hex digits that depend on which samples every shard was computed from.
        data_s: seconds in which this worker had no samples to compute on, or, as far as it is known of others who hold
            the model whole, waited for one that had none.
        compute_s: seconds of forward and backward on this worker.
        reduce_s: seconds in which it waited for sums of gradients, those within backward (--reduce ddp) left out.
    """

    loss: float
    samples: int
    gradient_scale: float
    stop: bool
    ledger: str
    data_s: float
    compute_s: float
    reduce_s: float


def ledger_of(indices: NDArray[np.int64]) -> int:
    """A number below EXACT that tells sets of sample indices apart, whatever their order."""
    return zlib.crc32(np.sort(indices).tobytes()) % EXACT


def of_the_slowest(own_s: float, waits_s: Sequence[float], among_s: float) -> tuple[float, float]:
    """Seconds of a step that go to data, and what is left of those among which others are waited for.

    Args:
        own_s: this worker waited for samples.
        waits_s: each worker did.
        among_s: this worker waited for others, for whatever reason.
    """
    for_others_s = min(max(own_s, *waits_s) - own_s, among_s)
    return own_s + for_others_s, among_s - for_others_s


def sealed_rows(rows: Tensor, expected: int, step: int) -> str:
    """The ledger of a step from its rows [., ROW]; raises as seal."""
    return seal(rows[:, 3].sum().item(), expected, rows[:, 4].to(torch.int64).numpy(), step)


class GradientSource(Protocol):
    """Leaves the gradients of a step, summed over the global batch, in p.grad on every worker."""

    def compute(self, step: int, stop: bool) -> StepTotals: ...

    def committed(self, step: int) -> None:
        """The optimizer has taken step `step`."""
        ...

    def close(self) -> None: ...


class ShardedGradients:
    """Forward and backward of each own shard alone; gradients, losses and statistics summed by the tree."""

    def __init__(
        self,
        plan: Plan,
        workload: Workload,
        state: TrainingState,
        group: Group,
        placement: Placement,
        loader_processes: int,
    ) -> None:
        self._plan, self._workload, self._state, self._group = plan, workload, state, group
        self._own, self._placement = placement.range_of(group.rank), placement
        self._statistics = RunningStatistics(state.own)
        self._rows = plan.config.shards * len(ROW)
        self._reducer = TreeReducer(state.parameters, self._rows + self._statistics.numel, group)
        samples = workload.samples("train")
        self._feed = batches(samples, self._requests(state.step), loader_processes, group.device, group.clock)
        self._samples, self._data_s = 0, 0.0
        self._waits: dict[int, float] = {}  # seconds, for the samples of shards that are not told yet
        try:
            self._reducer.place(placement)
        except BaseException:  # a peer is lost already; hooks and momenta of 1 would stay with the model
            self.close()
            raise

    def _requests(self, step: int) -> Iterator[Request]:
        for later in range(step, self._plan.total_steps):
            for shard in self._own:
                request = self._plan.request(later, shard)
                if len(request.indices):
                    yield request

    def compute(self, step: int, stop: bool) -> StepTotals:
        """See GradientSource; raises NonFiniteLossError on every worker if any shard's loss is not finite."""
        schedule = self._plan.schedule
        self._samples = schedule.samples_in_step(step)
        nominal = self._workload.nominal_count(self._samples)
        self._state.model.train()
        self._data_s = 0.0
        self._statistics.start_step()
        self._reducer.start_step()
        self._group.clock.start(self._group.device)
        started = time.perf_counter()
        self._pass(step, nominal, stop)
        self._group.clock.stop(len(self._own))
        computed = time.perf_counter()
        self._reducer.finish(own=self._state.precision.scaler.is_enabled())  # it unscales them in place
        rows = self._all_rows().view(-1, len(ROW)).cpu().double()
        compute_s, reduce_s = computed - started - self._data_s, time.perf_counter() - computed
        self._check_finite(step, rows[:, 0])
        count = rows[:, 1].sum().item() or 1.0  # a batch may have no masked token: nothing is learnt from it
        stopping = bool(rows[:, 2].sum() > 0)
        ledger = sealed_rows(rows, self._samples, step)
        loss = rows[:, 0].sum().item() / count
        seconds = of_the_slowest(self._data_s, self._waits_of_all(rows), reduce_s)
        return StepTotals(loss, self._samples, nominal / count, stopping, ledger, seconds[0], compute_s, seconds[1])

    def _waits_of_all(self, rows: Tensor) -> list[float]:
        """Seconds in which each worker waited for samples, as far as it is told; rows [shards, ROW]."""
        until = np.concatenate([[0.0], rows[:, 5].double().cpu().numpy().cumsum()])
        return np.diff(until[list(self._placement.bounds)]).tolist()  # type: ignore[no-any-return]

    def _pass(self, step: int, nominal: float, stop: bool) -> None:
        """Forward and backward of all own shards."""
        for shard in self._own:
            self._group.step_on()
            self._reducer.start_shard(shard)
            _, start, end = self._plan.schedule.places(step, shard)
            if end > start:
                self._one_shard(step, shard, end - start, nominal, stop)
            self._reducer.end_shard()
            compute_now(self._group.device)

    def _all_rows(self) -> Tensor:
        """What all shards report, fp32 [shards * ROW]."""
        return self._reducer.extra[: self._rows]

    def _one_shard(self, step: int, shard: int, samples: int, nominal: float, stop: bool) -> None:
        self._one_fed(shard, self._fed(step, shard), samples, nominal, stop)

    def _one_fed(self, shard: int, fed: Fed, samples: int, nominal: float, stop: bool) -> None:
        indices, batch = fed
        with self._state.precision.autocast():
            sums = self._workload.sums(self._state.trained, batch)
        self._reducer.add_extra(self._extra(shard, sums, indices, samples, stop))
        self._state.precision.scaler.scale(sums.loss / nominal).backward()

    def _fed(self, step: int, shard: int) -> Fed:
        """The next samples; torch is seeded for them afterwards, for reading them here may have seeded it."""
        waiting_since = time.perf_counter()
        fed = next(self._feed)
        self._waits[shard] = time.perf_counter() - waiting_since
        self._data_s += self._waits[shard]
        seed(self._group.device, derive_seed("step", self._plan.config.seed, step, shard))
        return fed

    def _extra(self, shard: int, sums: Sums | None, indices: NDArray[np.int64], samples: int, stop: bool) -> Tensor:
        """What a shard reports, with the statistics of its forward pass; its loss is 0 without `sums`."""
        extra = torch.zeros_like(self._reducer.extra)
        row = extra[shard * len(ROW) : (shard + 1) * len(ROW)]
        if sums is not None:
            row[0], row[1] = sums.loss.detach(), sums.count
        told = [float(stop), len(indices), ledger_of(indices), self._waits.pop(shard, 0.0)]
        row[2:] = sent(torch.tensor(told, dtype=row.dtype), row.device)  # one by one, a GPU is waited for each time
        if self._statistics.numel:
            extra[self._rows :] = self._statistics.of_last_forward(samples)
        return extra

    def _check_finite(self, step: int, losses: Tensor) -> None:
        bad = torch.nonzero(~torch.isfinite(losses)).flatten().tolist()
        if bad:
            found = [self._plan.schedule.indices(self._plan.config.seed, step, shard) for shard in bad]
            named = "; ".join(
                f"shard {shard} (loss {losses[shard].item()}): samples {indices.tolist()}"
                for shard, (_, indices) in zip(bad, found, strict=True)
            )
            message = f"step {step}, epoch {found[0][0]}: loss is not finite in {named}"
            raise NonFiniteLossError(message, shards=tuple(bad))

    def committed(self, step: int) -> None:
        if self._statistics.numel:
            self._statistics.fold(self._reducer.extra[self._rows :], self._samples, step + 1)

    def close(self) -> None:
        self._feed.close()
        self._reducer.close()
        self._statistics.close()
