"""One parameter server's part: a range of the parameters, their optimizer state, and the updates they get.

With staleness 0 the gradients of a step are collected, summed in the tree's order and applied once, which gives the
bits of --sync allreduce. Otherwise each gradient is applied when it comes, by the run's optimizer, with the step's
learning rate times the microbatch's share of the batch: as many samples move the parameters as far. The first server
also has the model's buffers: a microbatch moves running statistics by its share of what a whole batch would.
"""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.batchnorm import RunningStatistics
from orchestrator.build import build_state
from orchestrator.errors import UserError
from orchestrator.handout import Counted, Unit, ranges
from orchestrator.microbatch import Flat, is_synchronous, views
from orchestrator.plan import Plan
from orchestrator.schedule import learning_rate
from orchestrator.state import TrainingState, sha256_of
from workloads.workload import Workload

APPLIED = "applied."  # checkpoint tensors: which microbatches are in the parameters of each server


class TreeSum:
    """Vectors of shards 0..shards-1, added in the order of the binary tree however they come."""

    def __init__(self, shards: int) -> None:
        self._shards = shards
        self._blocks: dict[tuple[int, int], Flat] = {}

    def add(self, shard: int, vector: Flat) -> None:
        """A shard's vector, which is not written to."""
        start, size = shard, 1
        while (sibling := self._blocks.pop((start ^ size, size), None)) is not None:
            vector = vector + sibling  # the same as sibling + vector, bit by bit
            start, size = start & ~size, 2 * size
        self._blocks[start, size] = vector

    def total(self, missing: Sequence[int]) -> Flat:
        """The sum, zeros for the shards that are `missing`."""
        ((_, vector), *_) = self._blocks.items()
        for shard in missing:
            self.add(shard, np.zeros_like(vector))
        return self._blocks.pop((0, self._shards))


def split(plan: Plan, state: TrainingState) -> list[range]:
    """The parameters of each server, as positions in state.parameters: whole ones, about as many bytes each."""
    return ranges([p.numel() for p in state.parameters], plan.config.servers)


def _nothing() -> Flat:
    return np.empty(0, np.float32)


class ServerPart:
    """See the module."""

    def __init__(
        self, plan: Plan, workload: Workload, number: int, loaded: Mapping[str, Tensor] | None, step: int
    ) -> None:
        """Args:
        number: of this server.
        loaded: a checkpoint of `step` steps; None: the initial state.

        Raises:
            UserError: the model, or the checkpoint, does not fit the number of servers.
        """
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # gradients are only read
        self._plan, self._workload, self._number = plan, workload, number
        state = build_state(plan, workload, torch.device("cpu"))
        if loaded is not None:
            state.load(loaded, step)
        parts = split(plan, state)
        if len(parts) < plan.config.servers:
            raise UserError(
                f"--servers {plan.config.servers}: the model has {len(parts)} parameters; use at most as many"
            )
        self._own = parts[number]
        self.applied = Counted.of(self.width, _applied(loaded or {}, len(parts), number, step))
        self._optimizer, self._model = state.optimizer, state.model
        self._parameters = [state.parameters[i] for i in self._own]
        self._flat = _let_go_of_the_rest(state, self._own)
        self._statistics = RunningStatistics(state.model) if number == 0 else None
        self.version = 0
        counters = [int(b) for name, b in state.model.named_buffers() if name.endswith("num_batches_tracked")]
        self._counted = max(counters, default=0)  # by batch normalization, up to the checkpoint
        self._sums = [TreeSum(plan.config.shards) for _ in range(2)]
        self._steps_applied = self.applied.step

    def width(self, step: int) -> int:
        """Microbatches of a step."""
        return self._plan.schedule.microbatches_in_step(step)

    def pull(self, version: int) -> tuple[int, Flat | None]:
        """(version, parameters fp32 [numel]); no parameters if they are those of `version` still."""
        return self.version, None if version == self.version else self._flat.numpy()

    def push(self, unit: Unit, version: int, gradient: Flat, statistics: Flat, samples: int) -> int:
        """Take a microbatch's gradient; returns the updates since `version`. One that was taken before is dropped."""
        stale = self.version - version
        if not self.applied.add(unit):
            return stale
        if is_synchronous(self._plan):
            self._sums[0].add(unit.shard, gradient)
            if self._counts_statistics:
                self._sums[1].add(unit.shard, statistics)
            return stale
        share = samples / self._plan.config.batch_size
        self._step(unit.step, self._cut(gradient), share)
        self.version += 1
        if self._counts_statistics:
            self._fold(statistics, samples, share)
        return stale

    @property
    def _counts_statistics(self) -> bool:
        return self._statistics is not None and bool(self._statistics.numel)

    def _fold(self, total: Flat, samples: int, share: float) -> None:
        assert self._statistics is not None
        self._statistics.start_step()
        self._statistics.fold(torch.from_numpy(total), samples, self._steps_done, share)

    @property
    def _steps_done(self) -> int:
        """What batch normalization counts: steps if they are synchronous, else updates."""
        return self._steps_applied if is_synchronous(self._plan) else self._counted + self.version

    def _cut(self, flat: Flat) -> list[Tensor]:
        return views(torch.from_numpy(flat), self._parameters)

    def sum_up(self, step: int, count: float) -> Flat:
        """A step's gradients are here, of so many items: make them those of the mean loss.

        Returns:
            The norm of each parameter's, for clipping.
        """
        shards = self._plan.config.shards
        scale = self._workload.nominal_count(self._plan.schedule.samples_in_step(step)) / (count or 1.0)
        missing = range(self.width(step), shards)
        gradients = self._cut(self._sums[0].total(missing))
        if self._counts_statistics:
            self._folding = self._sums[1].total(missing)
        if scale != 1.0:
            gradients = list(torch._foreach_mul(gradients, scale))
        self._summed = gradients
        if not self._plan.config.clip_norm:
            return _nothing()
        return torch.stack(torch._foreach_norm(gradients, 2.0)).numpy()  # type: ignore[no-any-return]

    def apply(self, step: int, norms: Flat) -> None:
        """Take the step whose gradients were summed up.

        Args:
            norms: of all parameters in their order, empty without clipping.
        """
        gradients, limit = self._summed, self._plan.config.clip_norm
        if limit:
            factor = limit / (torch.linalg.vector_norm(torch.from_numpy(norms), 2.0) + 1e-6)  # as in loop.update
            if factor < 1.0:
                gradients = list(torch._foreach_mul(gradients, factor))
        self._step(step, gradients, 1.0)
        self.version += 1
        self._steps_applied = step + 1
        if self._counts_statistics:
            self._fold(self._folding, self._plan.schedule.samples_in_step(step), 1.0)

    def _step(self, step: int, gradients: Sequence[Tensor], share: float) -> None:
        lr = learning_rate(self._plan.config, step, self._plan.total_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * share
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        self._optimizer.step()
        for parameter in self._parameters:
            parameter.grad = None  # it is another process's memory

    def buffers(self) -> dict[str, NDArray[np.generic]]:
        """The model's buffers by name; none but on the first server."""
        named = self._model.named_buffers() if self._number == 0 else ()
        return {name: buffer.numpy() for name, buffer in named}

    def snapshot(self) -> dict[str, NDArray[np.generic]]:
        """This server's tensors of a checkpoint, by the names of TrainingState.tensors, and what is applied."""
        mine = {id(parameter) for parameter in self._parameters}
        saved = set(self._model.state_dict())
        everything = self._model.named_parameters(remove_duplicate=False)
        named = {f"model.{name}": p.detach() for name, p in everything if id(p) in mine}
        if self._number == 0:
            named |= {f"model.{name}": b for name, b in self._model.named_buffers() if name in saved}
            # Frozen ones are in no optimizer, and so of no server.
            frozen = self._model.named_parameters(remove_duplicate=False)
            named |= {f"model.{name}": p.detach() for name, p in frozen if not p.requires_grad}
        for index, entry in self._optimizer.state_dict()["state"].items():
            for key, value in entry.items():
                if value is not None:
                    named[f"optimizer.{self._own.start + index}.{key}"] = torch.as_tensor(value)
        applied = [self._steps_applied] if is_synchronous(self._plan) else self.applied.flat()
        return {name: t.contiguous().numpy() for name, t in named.items()} | {
            f"{APPLIED}{self._number}": np.asarray(applied, np.int64)
        }

    def weights_sha256(self, parts: Sequence[Mapping[str, NDArray[np.generic]]]) -> str:
        """Of the whole model, from the snapshots of all servers; see state.weights_sha256."""
        kept = {name: array for part in parts for name, array in part.items()}
        return sha256_of((name, torch.from_numpy(kept[f"model.{name}"])) for name in self._model.state_dict())


def _applied(loaded: Mapping[str, Tensor], servers: int, number: int, step: int) -> list[int]:
    """What a checkpoint says is in the parameters of server `number` of `servers`."""
    parts = {name: t.tolist() for name, t in loaded.items() if name.startswith(APPLIED)}
    if len(parts) == servers:
        return list(parts[f"{APPLIED}{number}"])
    if any(len(part) > 1 or part[0] != step for part in parts.values()):
        raise UserError(
            f"--servers {servers}: the checkpoint of step {step} was written by {len(parts)} servers in the middle of "
            f"steps; resume with --servers {len(parts)}"
        )
    return [step if loaded else 0]


def _let_go_of_the_rest(state: TrainingState, own: range) -> Tensor:
    """Leave the parameters of `own` to the optimizer, as views of one flat tensor, which is returned."""
    parameters = state.parameters
    mine = {id(parameters[i]) for i in own}
    flat = torch.empty(sum(parameters[i].numel() for i in own))
    for i, view in zip(own, views(flat, [parameters[i] for i in own]), strict=True):
        parameters[i].data = view.copy_(parameters[i].data)
    for parameter in parameters:
        if id(parameter) not in mine:
            state.optimizer.state.pop(parameter, None)
            parameter.data = torch.empty(0)
    for group in state.optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) in mine]
    state.optimizer.param_groups[:] = [group for group in state.optimizer.param_groups if group["params"]]
    return flat
