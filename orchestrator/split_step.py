"""One step's gradients where a worker holds a part of the model.

tensor: the workers of a replica group compute the same shards together. fsdp, hsdp: side by side, each a shard of its
own. pipeline: one behind the other. The sums go through the tree as ever, among the workers that hold the same part.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from orchestrator.feed import Fed
from orchestrator.layout import units_of
from orchestrator.plan import Plan, Request
from orchestrator.shards import Placement
from orchestrator.split_build import tree_sum
from orchestrator.splits import SplitState
from orchestrator.step import ShardedGradients, StepTotals
from workloads.workload import Workload


class TogetherGradients(ShardedGradients):
    """tensor: every worker of a replica group goes through all its shards; torch exchanges what they need."""

    def __init__(self, plan: Plan, workload: Workload, state: SplitState, placement: Placement, processes: int) -> None:
        self._part = state
        super().__init__(plan, workload, state, state.seating.across, placement, processes)

    def compute(self, step: int, stop: bool) -> StepTotals:
        """See GradientSource; one that asks to stop speaks for its replica group."""
        asked = torch.tensor(float(stop), device=self._group.device)
        self._part.seating.inside.sum(asked)
        totals = super().compute(step, bool(asked > 0))
        self._part.seating.inside.sum(asked)  # no part takes a step whose gradient another one may not get
        return totals

    def _all_rows(self) -> Tensor:
        """See ShardedGradients; where there is one replica group, nothing has told yet whether its sums are real."""
        self._part.seating.inside.settle()
        return super()._all_rows()

    def _waits_of_all(self, rows: torch.Tensor) -> list[float]:
        """Not told: the parts of a group wait for each other within the passes."""
        return [0.0]

    def _one_fed(self, shard: int, fed: Fed, samples: int, nominal: float, stop: bool) -> None:
        with self._group.others_wait():
            super()._one_fed(shard, fed, samples, nominal, stop)
        self._take()

    def _take(self) -> None:
        for place, gradient in self._part.take_gradients():
            self._reducer.add_gradient(place, gradient)


class SideBySideGradients(TogetherGradients):
    """fsdp, hsdp: as many shards at a time as a replica group has workers; what is placed are such units."""

    def _requests(self, step: int) -> Iterator[Request]:
        for later in range(step, self._plan.total_steps):
            for unit in self._own:
                shard, _ = self._mine(later, unit)
                if shard >= 0:
                    yield self._plan.request(later, shard)

    def _mine(self, step: int, unit: int) -> tuple[int, bool]:
        """(the shard that this worker computes in a unit, -1 for none; whether it counts)."""
        _, each = units_of(self._plan.config.parallel, self._part.seating.layout, self._plan.config.shards)
        first, mine = unit * each, unit * each + self._part.seating.part
        filled = self._plan.schedule.microbatches_in_step(step)
        if first >= filled:
            return -1, False
        # Torch's exchange needs all workers: one without a shard computes another's, for nothing.
        return (mine, True) if mine < filled else (first, False)

    def _take(self) -> None:
        taken = dict(self._part.take_gradients())
        own = [place for place in taken if not isinstance(self._part.held[place], DTensor)]  # torch sums the others
        taken.update(zip(own, self._summed([taken[place] for place in own]), strict=True))
        for place, gradient in taken.items():
            self._reducer.add_gradient(place, gradient)

    def _summed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each over the shards of a unit, in the tree's order; together, for a message costs more than its bytes."""
        if not tensors:
            return []
        inside, flat = self._part.seating.inside, torch.cat([tensor.reshape(-1) for tensor in tensors])
        rows = flat.new_empty(inside.world, len(flat))
        inside.wait(inside.start_gather(rows.view(-1), flat))
        sums = tree_sum(list(rows)).split([tensor.numel() for tensor in tensors])
        return [found.view_as(tensor) for found, tensor in zip(sums, tensors, strict=True)]

    def _pass(self, step: int, nominal: float, stop: bool) -> None:
        for unit in self._own:
            self._group.step_on()
            self._reducer.start_shard(unit)
            shard, counts = self._mine(step, unit)
            if shard >= 0:
                fed = self._fed(step, shard)
                with self._group.others_wait():
                    self._one_of_unit(shard, fed, counts, nominal, stop)
                self._take()
            self._reducer.end_shard()

    def _one_of_unit(self, shard: int, fed: Fed, counts: bool, nominal: float, stop: bool) -> None:
        indices, batch = fed
        with self._state.precision.autocast():
            sums = self._workload.sums(self._state.model, batch)
        extra = self._extra(shard, sums, indices, len(indices), stop)
        if not counts:
            extra.zero_()
        self._reducer.add_extra(*self._summed([extra]))
        with self._group.others_wait():  # the sum has ended that of the whole
            (sums.loss / nominal * float(counts)).backward()
