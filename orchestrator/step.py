"""One step's gradients: the sharded way (same bits for any number of workers) and DistributedDataParallel."""

import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from orchestrator.batchnorm import RunningStatistics
from orchestrator.devices import compute_now, seed
from orchestrator.errors import NonFiniteLossError, TrainingError
from orchestrator.feed import Fed, batches
from orchestrator.group import Group
from orchestrator.plan import Plan, Request
from orchestrator.reduce import TreeReducer
from orchestrator.shards import Placement, derive_seed
from orchestrator.state import TrainingState
from workloads.workload import Batch, Sums, Workload

ROW = ("loss", "count", "stop", "samples", "ledger")  # what each shard reports beside its gradients
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
        data_s: seconds in which this worker had no samples to compute on.
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


def _seal(rows: Tensor, expected: int, step: int) -> str:
    """The ledger of a step from its rows [., ROW]; raises TrainingError if not every sample was used once."""
    samples = round(rows[:, 3].sum().item())
    if samples != expected:
        raise TrainingError(f"step {step}: {samples} samples were computed where {expected} belong")
    return f"{zlib.crc32(rows[:, 4].to(torch.int64).numpy().tobytes()):08x}"


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
        self._own = placement.range_of(group.rank)
        self._statistics = RunningStatistics(state.own)
        self._rows = plan.config.shards * len(ROW)
        self._reducer = TreeReducer(state.parameters, self._rows + self._statistics.numel, group)
        samples = workload.samples("train")
        self._feed = batches(samples, self._requests(state.step), loader_processes, group.device)
        self._samples, self._data_s = 0, 0.0
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
        ledger = _seal(rows, self._samples, step)
        loss = rows[:, 0].sum().item() / count
        seconds = (self._data_s, compute_s, reduce_s)
        return StepTotals(loss, self._samples, nominal / count, stopping, ledger, *seconds)

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
        indices, batch = self._fed(step, shard)
        with self._state.precision.autocast():
            sums = self._workload.sums(self._state.trained, batch)
        self._reducer.add_extra(self._extra(shard, sums, indices, samples, stop))
        self._state.precision.scaler.scale(sums.loss / nominal).backward()

    def _fed(self, step: int, shard: int) -> Fed:
        """The next samples; torch is seeded for them afterwards, for reading them here may have seeded it."""
        waiting_since = time.perf_counter()
        fed = next(self._feed)
        self._data_s += time.perf_counter() - waiting_since
        seed(self._group.device, derive_seed("step", self._plan.config.seed, step, shard))
        return fed

    def _extra(self, shard: int, sums: Sums | None, indices: NDArray[np.int64], samples: int, stop: bool) -> Tensor:
        """What a shard reports, with the statistics of its forward pass; its loss is 0 without `sums`."""
        extra = torch.zeros_like(self._reducer.extra)
        row = extra[shard * len(ROW) : (shard + 1) * len(ROW)]
        if sums is not None:
            row[0], row[1] = sums.loss.detach(), sums.count
        row[2], row[3], row[4] = float(stop), len(indices), ledger_of(indices)
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


class _LossModule(nn.Module):
    """A workload's sums as a module's forward pass, which is what DistributedDataParallel wraps."""

    def __init__(self, workload: Workload, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._workload = workload

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        sums: Sums = self._workload.sums(self.model, batch)
        return sums.loss, sums.count


class DdpGradients:
    """Ordinary DistributedDataParallel: each worker's part of the batch in one pass, ring all-reduce.

    The sample order is that of the run; sums depend on the number of workers in their last bits.
    """

    def __init__(
        self, plan: Plan, workload: Workload, state: TrainingState, group: Group, loader_processes: int
    ) -> None:
        self._plan, self._workload, self._state, self._group = plan, workload, state, group
        self._module: nn.Module = _LossModule(workload, state.model)
        if group.world > 1:
            self._module = nn.parallel.DistributedDataParallel(
                self._module, gradient_as_bucket_view=True, broadcast_buffers=False
            )
        samples = workload.samples("train")
        self._feed = batches(samples, self._requests(state.step), loader_processes, group.device)

    def _part(self, step: int) -> tuple[int, NDArray[np.int64], float]:
        """(epoch, sample indices, weight) of this worker in `step`."""
        schedule, seed, world = self._plan.schedule, self._plan.config.seed, self._group.world
        found = [schedule.indices(seed, step, shard) for shard in range(schedule.shards)]
        indices = np.concatenate([part for _, part in found])
        if len(indices) < 2 * world:
            # Too few to go round (batch normalization needs two each): everyone computes all of them.
            return found[0][0], indices, 1 / world
        bounds = [rank * len(indices) // world for rank in range(world + 1)]
        return found[0][0], indices[bounds[self._group.rank] : bounds[self._group.rank + 1]], 1.0

    def _requests(self, step: int) -> Iterator[Request]:
        for later in range(step, self._plan.total_steps):
            epoch, indices, _ = self._part(later)
            yield Request(epoch, indices, later / self._plan.total_steps)

    def compute(self, step: int, stop: bool) -> StepTotals:
        """See GradientSource; raises NonFiniteLossError on every worker if any worker's loss is not finite."""
        samples, world = self._plan.schedule.samples_in_step(step), self._group.world
        self._group.step_on(self._plan.config.shards // world)
        nominal = self._workload.nominal_count(samples)
        _, indices, weight = self._part(step)
        self._state.optimizer.zero_grad(set_to_none=True)
        self._state.model.train()
        waiting_since = time.perf_counter()
        fed, batch = next(self._feed)
        fed_s = time.perf_counter()
        seed(self._group.device, derive_seed("step", self._plan.config.seed, step, self._group.rank))
        with self._state.precision.autocast():
            loss, count = self._module(batch)
        rows = torch.zeros(world, len(ROW), dtype=torch.float64, device=self._group.device)
        rows[self._group.rank, 0], rows[self._group.rank, 1] = loss.detach() * weight, count * weight
        rows[self._group.rank, 2] = float(stop)
        rows[self._group.rank, 3] = len(fed) * weight
        rows[self._group.rank, 4] = ledger_of(fed)
        with self._group.others_wait():
            self._state.precision.scaler.scale(loss * (weight * world / nominal)).backward()
        computed_s = time.perf_counter()
        self._group.sum(rows)
        self._share_buffers()  # before the optimizer's step: between that and its count nobody can be missed
        seconds = (fed_s - waiting_since, computed_s - fed_s, time.perf_counter() - computed_s)
        bad = torch.nonzero(~torch.isfinite(rows[:, 0])).flatten().tolist()
        if bad:
            mine = f"; samples of this worker: {indices.tolist()}" if self._group.rank in bad else ""
            raise NonFiniteLossError(f"step {step}: loss is not finite on ranks {bad} (--reduce ddp){mine}")
        total = rows[:, 1].sum().item() or 1.0
        stopping, ledger = bool(rows[:, 2].sum() > 0), _seal(rows.cpu(), samples, step)
        return StepTotals(rows[:, 0].sum().item() / total, samples, nominal / total, stopping, ledger, *seconds)

    def committed(self, step: int) -> None:
        """See GradientSource."""

    def _share_buffers(self) -> None:
        """Everyone takes rank 0's, as DistributedDataParallel does, but after the pass: none is left behind."""
        buffers = [b for b in self._state.model.buffers() if b.is_floating_point()]
        if buffers and self._group.world > 1:
            flat = torch.cat([b.flatten() for b in buffers])
            self._group.broadcast(flat, 0)
            for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
                buffer.copy_(part.view_as(buffer))

    def close(self) -> None:
        self._feed.close()
        del self._module
