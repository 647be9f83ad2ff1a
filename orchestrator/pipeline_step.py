"""One step's gradients of a pipeline's stage, and which gradients go with which --parallel."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrator.feed import Fed
from orchestrator.pipeline import Stage, StageModule, StageState, schedule
from orchestrator.plan import Plan, Request
from orchestrator.shards import Placement, derive_seed
from orchestrator.split_step import SideBySideGradients, TogetherGradients
from orchestrator.splits import SplitState
from orchestrator.state import TrainingState
from workloads.workload import Workload


class PipelineGradients(TogetherGradients):
    """pipeline: the shards of a replica group go through its stages one behind the other."""

    def __init__(self, plan: Plan, workload: Workload, state: StageState, placement: Placement, processes: int) -> None:
        self._stage = state
        self._needs = state.first or state.last or workload.pieces_read  # batches
        super().__init__(plan, workload, state, placement, processes)
        self._module = StageModule(state, workload)
        self._schedules: dict[tuple[int, int], Any] = {}
        self._on_way: list[tuple[int, Fed | None]] = []  # shards, and what of them is needed here
        self._reports: dict[int, Tensor] = {}
        self._sending: list[tuple[dist.Work | None, Tensor]] = []
        self._step, self._nominal, self._stop = 0, 1.0, False

    def _requests(self, step: int) -> Iterator[Request]:
        if self._needs:
            yield from super()._requests(step)

    def _pass(self, step: int, nominal: float, stop: bool) -> None:
        self._step, self._nominal, self._stop = step, nominal, stop
        with self._group.others_wait():
            self._stage.refresh()
        sizes = {
            shard: stop - start for shard in self._own for _, start, stop in [self._plan.schedule.places(step, shard)]
        }
        for size, shards in groupby(self._own, key=lambda shard: sizes[shard]):
            self._group.step_on()
            if size:
                self._run(step, list(shards), size)
            else:
                for shard in shards:
                    self._reducer.start_shard(shard)
                    self._reducer.end_shard()

    def _run(self, step: int, shards: list[int], size: int) -> None:
        """Shards of as many samples each, through all stages."""
        self._on_way = [(shard, self._fed(step, shard) if self._needs else None) for shard in shards]
        self._module.batches = [fed[1] if fed else None for _, fed in self._on_way]
        self._module.seeds = [derive_seed("step", self._plan.config.seed, step, shard) for shard in shards]
        places = torch.arange(len(shards))
        made = self._schedules.get((len(shards), size))
        if made is None:
            stage = Stage(self._module, self._stage, self._forwarded, self._backward, self._done)
            made = schedule(self._plan.config.pipeline_schedule, stage, len(shards), self._loss)
            self._schedules[len(shards), size] = made
        with self._group.others_wait():
            made.step(*([places] if self._stage.first else []), place=places, target=places, return_outputs=False)
            for work, _ in self._sending:
                assert work is not None
                work.wait()
        self._sending.clear()

    def _loss(self, loss: Tensor, place: Tensor) -> Tensor:
        return loss / self._nominal

    def _forwarded(self, number: int) -> None:
        """What the shard reports, before the next forward pass overwrites the statistics."""
        self._group.step_on(0)
        shard, fed = self._on_way[number]
        samples = self._plan.schedule.places(self._step, shard)
        if self._stage.last and fed is not None:
            sums = self._module.sums.pop(number)
            self._reports[shard] = self._extra(shard, sums, fed[0], samples[2] - samples[1], self._stop)
        else:
            report = self._reports[shard] = torch.zeros_like(self._reducer.extra)
            if self._statistics.numel:
                report[self._rows :] = self._statistics.of_last_forward(samples[2] - samples[1])

    def _backward(self, number: int) -> None:
        shard, _ = self._on_way[number]
        self._reducer.start_shard(shard)
        self._reducer.add_extra(self._reports.pop(shard))

    def _done(self, number: int) -> None:
        """A backward pass has left its gradients; that of a tied parameter is the sum over its stages."""
        self._group.step_on(0)
        group = self._stage.side.process_group
        for parameter, stages in self._stage.tied:
            assert parameter.grad is not None
            if self._stage.seating.part == stages[0]:
                for other in stages[1:]:
                    theirs = torch.empty_like(parameter.grad)
                    dist.recv(theirs, group=group, group_src=other)
                    parameter.grad += theirs
            else:
                self._sending.append((dist.isend(parameter.grad, group=group, group_dst=stages[0]), parameter.grad))
                parameter.grad = None
        self._take()
        self._reducer.end_shard()

    def _all_rows(self) -> Tensor:
        """See ShardedGradients; the last stage knows the losses."""
        rows = super()._all_rows().clone()
        self._stage.seating.inside.broadcast(rows, self._stage.seating.layout.size - 1)
        return rows


def split_gradients(
    plan: Plan, workload: Workload, state: TrainingState, placement: Placement, processes: int
) -> TogetherGradients:
    """The gradients of the run's --parallel."""
    assert isinstance(state, SplitState)
    if isinstance(state, StageState):
        return PipelineGradients(plan, workload, state, placement, processes)
    kind = SideBySideGradients if plan.config.parallel.kind in ("fsdp", "hsdp") else TogetherGradients
    return kind(plan, workload, state, placement, processes)
