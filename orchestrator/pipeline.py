"""Layers dealt out to the workers of a replica group, one stage each: torch.distributed.pipelining.

A shard of the step is a microbatch of the pipeline. The order of backward passes is that of the shards, so the sums go
through the tree as ever; the state of the random generator travels with the activations, so that dropout draws what
it draws on one worker. Bits are those of one worker.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from orchestrator.config import RunConfig
from orchestrator.devices import seed
from orchestrator.group import Group
from orchestrator.precision import Precision
from orchestrator.splits import Seating, SplitEvaluation, SplitState
from workloads.workload import Batch, Sums, Workload


def deal(weights: Sequence[int], stages: int) -> list[range]:
    """Consecutive pieces for each stage, at least one each, the heaviest stage as light as can be.

    Args:
        weights: of the pieces; at least as many as stages.
    """
    count = len(weights)
    best: dict[tuple[int, int], tuple[int, list[int]]] = {(0, 0): (0, [0])}  # (stages, pieces) -> (heaviest, bounds)
    for stage in range(1, stages + 1):
        for stop in range(stage, count - (stages - stage) + 1):
            options = [
                (max(best[stage - 1, start][0], sum(weights[start:stop])), [*best[stage - 1, start][1], stop])
                for start in range(stage - 1, stop)
                if (stage - 1, start) in best
            ]
            best[stage, stop] = min(options)
    bounds = best[stages, count][1]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def keep_only(model: nn.Module, own: nn.Module) -> None:
    """Give up the memory of what is not in `own`; names and shapes stay."""
    kept = {id(t) for t in (*own.parameters(), *own.buffers())}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in kept:
                setattr(module, name, nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if id(buffer) not in kept:
                setattr(module, name, buffer.to("meta"))


Told = Callable[[int], None]


class StageState(SplitState):
    """The training state of a stage.

    Args:
        pieces: of this stage.
        tied: parameters that several stages compute with, each with those stages; the first one trains it.
        side: the workers of the replica group, for what travels beside the pipeline.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        pieces: Sequence[nn.Module],
        order: list[str],
        precision: Precision,
        at: Seating,
        tied: Sequence[tuple[nn.Parameter, list[int]]],
        side: Group,
    ) -> None:
        own = nn.ModuleList(pieces)
        keep_only(model, own)
        own.to(at.inside.device)
        super().__init__(config, model, own, order, precision, at, [p for p, stages in tied if at.part in stages[1:]])
        self.pieces_in_order, self.side = list(pieces), side
        self.tied = [(parameter, stages) for parameter, stages in tied if at.part in stages]
        held = at.inside.gather_objects([name for name, t in model.state_dict().items() if not t.is_meta])
        self._owner = {
            name: next(part for part, names in enumerate(held) if name in names) for name in model.state_dict()
        }

    @property
    def first(self) -> bool:
        return self.seating.part == 0

    @property
    def last(self) -> bool:
        return self.seating.part == self.seating.layout.size - 1

    @property
    def speaks(self) -> bool:
        """See SplitState: a parameter is trained by one stage."""
        return True

    def _from(self, owner: int, tensor: Tensor) -> Tensor:
        """The tensor of part `owner`, of which the others give the likeness."""
        device = self.seating.inside.device
        mine = owner == self.seating.part
        sent = tensor.detach().contiguous() if mine else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        on_host = sent.device != device  # the optimizer counts its steps on the host
        sent = sent.to(device) if on_host else sent
        self.seating.inside.broadcast(sent, owner)
        return sent

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See SplitState."""
        for name, tensor in self.model.state_dict().items():
            yield name, self._from(self._owner[name], tensor)

    def _whole_optimizer(self) -> Iterator[tuple[str, Tensor]]:
        mine = dict(self._optimizer_entries())
        told = self.seating.inside.gather_objects([(name, v.shape, v.dtype) for name, v in mine.items()])
        found = [
            (int(name.split(".")[1]), part, name, *kind) for part, names in enumerate(told) for name, *kind in names
        ]
        for _, part, name, shape, dtype in sorted(found, key=lambda entry: entry[0]):
            like = mine[name] if part == self.seating.part else torch.empty(shape, dtype=dtype, device="meta")
            yield name, self._from(part, like)

    def parts(self) -> dict[str, Tensor]:
        """See SplitState; a tied parameter is its first stage's."""
        mine = {f"model.{name}" for name, owner in self._owner.items() if owner == self.seating.part}
        return {name: t for name, t in super().parts().items() if name in mine or name.startswith("optimizer.")}

    def evaluation(self, workload: Workload, group: Group) -> tuple[Workload, Group, bool]:
        """See TrainingState."""
        using: Any = StageEvaluation(workload, self)
        return using, self.seating.across, False

    def refresh(self) -> None:
        """Bring the copies of tied parameters up to date."""
        for parameter, stages in self.tied:
            for other in stages[1:]:
                self._beside(parameter.detach(), stages[0], other)

    def _beside(self, tensor: Tensor, source: int, target: int) -> None:
        """Overwrite `tensor` on stage `target` with that of stage `source`."""
        with self.side.others_wait():
            if self.seating.part == source:
                dist.send(tensor.contiguous(), group=self.side.process_group, group_dst=target)
            elif self.seating.part == target:
                dist.recv(tensor, group=self.side.process_group, group_src=source)


def build_stage(
    config: RunConfig,
    model: nn.Module,
    workload: Workload,
    order: list[str],
    precision: Precision,
    at: Seating,
    side: Group,
) -> StageState:
    """This worker's stage, with about its share of the parameters."""
    pieces = workload.pieces(model)
    dealt = deal([sum(p.numel() for p in piece.parameters()) for piece in pieces], at.layout.size)
    users: dict[int, list[int]] = {}
    known = {id(p): p for p in model.parameters()}
    for stage, places in enumerate(dealt):
        for parameter in {id(p) for place in places for p in pieces[place].parameters()}:
            users.setdefault(parameter, []).append(stage)
    tied = [(known[key], stages) for key, stages in users.items() if len(stages) > 1]
    return StageState(config, model, [pieces[place] for place in dealt[at.part]], order, precision, at, tied, side)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device).to(device) if device.type == "cuda" else torch.get_rng_state()


def _go_on_from(state: Tensor) -> None:
    if state.device.type == "cuda":
        torch.cuda.set_rng_state(state.cpu(), state.device)
    else:
        torch.set_rng_state(state)


def _on_wire(hidden: Tensor) -> Tensor:
    """Images lie channels last: contiguous for what sends them."""
    return (hidden.permute(0, 2, 3, 1) if hidden.ndim == 4 else hidden).contiguous()


class _OffWire(torch.autograd.Function):
    """Images as they were before they were sent, and their gradients contiguous again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return hidden.permute(0, 3, 1, 2) if hidden.ndim == 4 else hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _on_wire(gradient)


class StageModule(nn.Module):
    """A stage as torch's pipeline calls it: (activations, random state) in and out; of the last one the loss.

    Attributes:
        batches: of the microbatches that are on their way, by number; None where this stage needs none.
        seeds: likewise.
        sums: of the last stage, by number.
        live: whether numbers are meant; otherwise torch looks at shapes.
    """

    def __init__(self, state: StageState, workload: Workload) -> None:
        super().__init__()
        self._state, self._workload = state, workload
        self.own = state.own
        self.batches: list[Batch | None] = []
        self.seeds: list[int] = []
        self.sums: dict[int, Sums] = {}
        self.live = False

    def forward(self, hidden: Tensor, random_state: Tensor | None = None, *, place: Tensor) -> Any:
        number, first = int(place), random_state is None
        if not self.live and not first:
            # Torch gives memory as it lies; NaN would stay in running statistics, whatever overwrites them.
            hidden = hidden.masked_fill(torch.ones_like(hidden, dtype=torch.bool), 0.0)
        if self.live and first:
            seed(self._state.seating.inside.device, self.seeds[number])
        elif self.live and random_state is not None:
            _go_on_from(random_state)
        with self._state.precision.autocast():
            result = self.through(None if first else _OffWire.apply(hidden), self.batches[number])
        if not self._state.last:
            return _on_wire(result), _random_state(result.device)
        if self.live:
            self.sums[number] = result
        return result.loss

    def through(self, hidden: Tensor | None, batch: Batch | None) -> Any:
        """What comes out of this stage: activations, or the last one's Sums."""
        for piece in self._state.pieces_in_order:
            hidden = piece(hidden, batch)
        if not self._state.last:
            return hidden
        assert hidden is not None
        assert batch is not None
        return self._workload.finish(hidden, batch, self._state.model.training)


class Stage(PipelineStage):
    """Tells of every forward and backward pass."""

    def __init__(self, module: StageModule, state: StageState, forwarded: Told, backward: Told, done: Told) -> None:
        at = state.seating
        super().__init__(module, at.part, at.layout.size, at.inside.device, group=at.inside.process_group)
        self._module, self._forwarded, self._backward, self._done = module, forwarded, backward, done

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self._module.live = True
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        self._module.live = False
        self._forwarded(fwd_chunk_id)
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        self._backward(bwd_chunk_id)
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        self._done(bwd_chunk_id)


def schedule(kind: str, stage: Stage, microbatches: int, loss: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """Torch's schedule; 1f1b needs as many microbatches as there are stages."""
    made = Schedule1F1B if kind == "1f1b" and microbatches >= stage.num_stages else ScheduleGPipe
    return made(stage, microbatches, loss_fn=loss, scale_grads=False)


class StageEvaluation(SplitEvaluation):
    """A workload as `evaluate` uses it, whose sums come out of the last stage."""

    def __init__(self, workload: Workload, state: StageState) -> None:
        super().__init__(workload, state.seating.inside)
        state.refresh()
        self._state, self._module = state, StageModule(state, workload)

    def sums(self, model: nn.Module, batch: Batch) -> Sums:
        """Of one microbatch; every worker of the replica group calls it, and has them."""
        at, state = self._state.seating, self._state
        group, given = at.inside.process_group, [None]
        with at.inside.others_wait():
            if not state.first:
                dist.recv_object_list(given, group=group, group_src=at.part - 1)
            result = [self._module.through(given[0], batch)]
            if not state.last:
                dist.send_object_list(result, group=group, group_dst=at.part + 1)
            dist.broadcast_object_list(result, group=group, group_src=at.layout.size - 1)
        sums: Sums = result[0]
        return sums
