"""Gradients of --reduce ddp: torch's DistributedDataParallel."""

import time
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from orchestrator.devices import seed
from orchestrator.errors import NonFiniteLossError
from orchestrator.feed import batches
from orchestrator.group import Group
from orchestrator.plan import Plan, Request
from orchestrator.shards import derive_seed
from orchestrator.state import TrainingState
from orchestrator.step import ROW, StepTotals, ledger_of, of_the_slowest, sealed_rows
from workloads.workload import Batch, Sums, Workload


class _LossModule(nn.Module):
    """A workload's sums as a module's forward pass, which is what DistributedDataParallel wraps."""

    def __init__(self, workload: Workload, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._workload = workload

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        sums: Sums = self._workload.sums(self.model, batch)
        return sums.loss, sums.count


class _Sums:
    """DistributedDataParallel's sums over workers, waited for so that the wait can be broken off."""

    def __init__(self, group: Group) -> None:
        self._group, self._errands = group, group.errands("buckets")
        self.finish, self.close = self._errands.finish, self._errands.close

    def start(self, _: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """A communication hook (https://docs.pytorch.org/docs/stable/ddp_comm_hooks.html).

        It always gives a result, for backward waits for it without end; `finish` raises PeerLostError if it is none.
        """
        total: torch.futures.Future[Tensor] = torch.futures.Future()
        self._errands.start(self._sum, bucket.buffer(), total)
        return total

    def _sum(self, tensor: Tensor, total: torch.futures.Future[torch.Tensor]) -> None:
        try:
            self._group.sum(tensor)
        finally:
            total.set_result(tensor)


class DdpGradients:
    """Ordinary DistributedDataParallel: each worker's part of the batch in one pass, ring all-reduce.

    The sample order is that of the run; sums depend on the number of workers in their last bits.
    """

    def __init__(
        self, plan: Plan, workload: Workload, state: TrainingState, group: Group, loader_processes: int
    ) -> None:
        self._plan, self._workload, self._state, self._group = plan, workload, state, group
        self._module: nn.Module = _LossModule(workload, state.model)
        self._sums, self._factor = _Sums(group), 1  # of the loss: torch's own are means over workers
        if group.world > 1:
            self._share([*state.model.parameters(), *state.model.buffers()])  # kinds of machines may begin differently
            self._module = wrapped = nn.parallel.DistributedDataParallel(
                self._module, gradient_as_bucket_view=True, broadcast_buffers=False, init_sync=False
            )
            if group.device.type == "cpu":
                wrapped.register_comm_hook(None, self._sums.start)
            else:  # NCCL can be aborted
                self._factor = group.world
        self._before: list[tuple[Tensor, Tensor]] = []  # buffers, and what they were before the step under way
        samples = workload.samples("train")
        self._feed = batches(samples, self._requests(state.step), loader_processes, group.device, group.clock)

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
        self._before = [(buffer, buffer.clone()) for buffer in self._state.model.buffers()]
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
        rows[self._group.rank, 5] = fed_s - waiting_since
        with self._group.others_wait():
            self._state.precision.scaler.scale(loss * (weight * self._factor / nominal)).backward()
            self._sums.finish()
        computed_s = time.perf_counter()
        self._group.sum(rows)
        # Before the optimizer's step: between that and its count nobody can be missed.
        self._share([b for b in self._state.model.buffers() if b.is_floating_point()])
        reduce_s = time.perf_counter() - computed_s
        data_s, compute_s = of_the_slowest(fed_s - waiting_since, rows[:, 5].tolist(), computed_s - fed_s)
        bad = torch.nonzero(~torch.isfinite(rows[:, 0])).flatten().tolist()
        if bad:
            mine = f"; samples of this worker: {indices.tolist()}" if self._group.rank in bad else ""
            raise NonFiniteLossError(f"step {step}: loss is not finite on ranks {bad} (--reduce ddp){mine}")
        total = rows[:, 1].sum().item() or 1.0
        stopping, ledger = bool(rows[:, 2].sum() > 0), sealed_rows(rows.cpu(), samples, step)
        return StepTotals(
            rows[:, 0].sum().item() / total,
            samples,
            nominal / total,
            stopping,
            ledger,
            data_s,
            compute_s,
            reduce_s,
        )

    def committed(self, step: int) -> None:
        """See GradientSource."""
        self._before.clear()

    def _share(self, tensors: list[Tensor]) -> None:
        """Everyone takes rank 0's; of buffers after a pass, where DistributedDataParallel does it before."""
        for dtype in {tensor.dtype: None for tensor in tensors} if self._group.world > 1 else ():
            held = [tensor.detach() for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.flatten() for tensor in held])
            self._group.broadcast(flat, 0)
            for tensor, part in zip(held, flat.split([tensor.numel() for tensor in held]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def close(self) -> None:
        self._feed.close()
        self._sums.close()
        del self._module
        for buffer, before in self._before:
            buffer.copy_(before)
