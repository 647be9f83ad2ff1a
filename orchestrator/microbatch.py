"""The gradient of one microbatch, as a worker of --sync parameter-server computes it: a flat vector for each server."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator.batchnorm import RunningStatistics
from orchestrator.devices import seed
from orchestrator.errors import NonFiniteLossError
from orchestrator.group import Group
from orchestrator.handout import Unit, offsets
from orchestrator.plan import Plan
from orchestrator.shards import derive_seed
from orchestrator.state import TrainingState
from orchestrator.step import ledger_of
from workloads.workload import Workload

Flat = NDArray[np.float32]


@dataclass(frozen=True)
class Computed:
    """What a microbatch gives.

    Attributes:
        gradients: fp32 [numel of the server's range], for each server.
        statistics: of its batch normalization times its samples, fp32; empty where there is none.
        loss, count, samples, ledger: as in step.ROW.
        data_s, compute_s: seconds.
    """

    gradients: list[Flat]
    statistics: Flat
    loss: float
    count: float
    samples: int
    ledger: int
    data_s: float
    compute_s: float


def is_synchronous(plan: Plan) -> bool:
    """Whether a step's gradients are summed before they are applied."""
    return not plan.config.staleness.steps


def views(flat: torch.Tensor, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The stretches of `flat` [total numel] with the shapes and memory layouts of the parameters, in their order."""
    starts = offsets(p.numel() for p in parameters)
    return [
        flat.as_strided(p.shape, p.stride(), flat.storage_offset() + start)
        for p, start in zip(parameters, starts, strict=False)
    ]


class Microbatches:
    """A worker's copy of the parameters, and what it computes with them.

    The gradient is that of the run's step where steps are synchronous (the loss over the nominal count of the global
    batch, to be summed over shards), else that of the microbatch's own mean loss, clipped to --clip-norm.
    """

    def __init__(
        self, plan: Plan, workload: Workload, state: TrainingState, group: Group, parts: Sequence[range]
    ) -> None:
        """Args:
        parts: the parameters of each server, as positions in state.parameters.
        """
        self._plan, self._workload, self._state, self._group = plan, workload, state, group
        self._samples = workload.samples("train")
        self._statistics = RunningStatistics(state.model)
        self._parts = [[state.parameters[i] for i in part] for part in parts]
        self._flats = [torch.empty(sum(p.numel() for p in part)) for part in self._parts]
        self._views = [views(flat, part) for flat, part in zip(self._flats, self._parts, strict=True)]
        if group.device.type == "cpu":  # pulled parameters land where the model reads them
            for part, places in zip(self._parts, self._views, strict=True):
                for parameter, view in zip(part, places, strict=True):
                    parameter.data = view.copy_(parameter.data)

    def landing(self, server: int) -> Flat:
        """Where the parameters of a server are to be written; `landed` comes after."""
        return self._flats[server].numpy()  # type: ignore[no-any-return]

    def landed(self, server: int) -> None:
        """The model takes over what was written."""
        if self._group.device.type != "cpu":
            for parameter, view in zip(self._parts[server], self._views[server], strict=True):
                parameter.data.copy_(view)

    def place(self, server: int, pulled: Flat) -> None:
        """Take over the parameters of a server."""
        np.copyto(self.landing(server), pulled)
        self.landed(server)

    def read(self, unit: Unit) -> tuple[NDArray[np.int64], dict[str, torch.Tensor]]:
        """(sample indices, batch on the CPU); raises DataError."""
        epoch, indices, progress = self._plan.request(unit.step, unit.shard)
        with self._group.clock.away():
            return indices, self._samples.microbatch(indices, epoch, progress)

    def compute(self, unit: Unit, data_s: float, fed: tuple[NDArray[np.int64], dict[str, torch.Tensor]]) -> Computed:
        """Forward and backward with the parameters that are there; raises NonFiniteLossError.

        Args:
            data_s: seconds in which `fed`, of `read`, was waited for.
        """
        plan, state, started = self._plan, self._state, time.perf_counter()
        indices, batch = fed
        synchronous = is_synchronous(plan)
        of = plan.schedule.samples_in_step(unit.step) if synchronous else len(indices)
        nominal = self._workload.nominal_count(of)
        state.model.train()
        for parameter in state.parameters:
            parameter.grad = None
        seed(self._group.device, derive_seed("step", plan.config.seed, unit.step, unit.shard))
        with state.precision.autocast():
            sums = self._workload.sums(
                state.model, {name: tensor.to(self._group.device) for name, tensor in batch.items()}
            )
        loss, count = float(sums.loss.detach()), float(sums.count)
        if not np.isfinite(loss):
            raise NonFiniteLossError(
                f"step {unit.step}, epoch {plan.epoch_of(unit.step)}: loss is not finite in shard {unit.shard} "
                f"(loss {loss}): samples {indices.tolist()}"
            )
        statistics = self._statistics.of_last_forward(len(indices)) if self._statistics.numel else torch.empty(0)
        (sums.loss / nominal).backward()
        factor = 1.0 if synchronous else self._clip(nominal / (count or 1.0))
        gradients = [self._flat(part, factor) for part in self._parts]
        return Computed(
            gradients,
            statistics.cpu().numpy(),
            loss,
            count,
            len(indices),
            ledger_of(indices),
            data_s,
            time.perf_counter() - started,
        )

    def _clip(self, scale: float) -> float:
        """What the gradients have to be multiplied by: `scale`, or less if they were too long then."""
        limit = self._plan.config.clip_norm
        if not limit:
            return scale
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._state.parameters if p.grad is not None])
        return scale * min(1.0, limit / (scale * float(norm) + 1e-6))

    def _flat(self, part: Sequence[torch.nn.Parameter], factor: float) -> Flat:
        flat = torch.zeros(sum(p.numel() for p in part), device=self._group.device)
        for parameter, place in zip(part, views(flat, part), strict=True):
            if parameter.grad is not None:
                place.copy_(parameter.grad)
        if factor != 1.0:
            flat.mul_(factor)
        return flat.cpu().numpy()  # type: ignore[no-any-return]

    def place_buffers(self, buffers: dict[str, NDArray[np.generic]]) -> None:
        """Take over the model's buffers, for an evaluation or the end."""
        for name, buffer in self._state.model.named_buffers():
            if name in buffers:
                buffer.copy_(torch.tensor(buffers[name]))

    def close(self) -> None:
        """Leave the model as it was made."""
        self._statistics.close()
