"""A model in parts: which of its tensors a worker of a replica group holds, and the whole of them again.

The optimizer works on plain tensors: of a parameter that is spread over workers (a DTensor) on the worker's own piece,
in the DTensor's memory. What is saved is the whole state, by the names that it has without any split.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from orchestrator.config import RunConfig
from orchestrator.group import Group
from orchestrator.layout import Layout
from orchestrator.optimizer import build_optimizer, parameter_groups
from orchestrator.precision import Precision
from orchestrator.state import TrainingState, sha256_of
from workloads.workload import Workload

Described = list[tuple[str, torch.Size, torch.dtype]]


@dataclass
class Seating:
    """Where a worker is: `inside` its replica group, and `across` those that hold the same part in other groups."""

    layout: Layout
    inside: Group
    across: Group

    @property
    def part(self) -> int:
        return self.inside.rank


def seating(group: Group, layout: Layout) -> Seating:
    """The two groups of a worker; every worker of `group` calls it."""
    inside = group.among([layout.members(number) for number in range(layout.groups)])
    across = group.among([layout.holders(part) for part in range(layout.size)])
    return Seating(layout, inside, across)


def local(tensor: Tensor) -> Tensor:
    """This worker's piece, in the memory of `tensor`."""
    piece: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return piece


def piece_like(whole: Tensor, like: Tensor) -> Tensor:
    """This worker's piece of `whole`, cut as `like` is; nothing is sent."""
    if not isinstance(like, DTensor):
        return whole
    return local(distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None))


def whole_like(piece: Tensor, like: Tensor) -> Tensor:
    """The whole of which every worker has a piece, cut as `like` is."""
    if not isinstance(like, DTensor) or piece.shape != local(like).shape:
        return piece
    shape: dict[str, Any] = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(piece, like.device_mesh, like.placements, run_check=False, **shape).full_tensor()


class SplitState(TrainingState):
    """The training state of a worker that holds a part.

    Args:
        order: names of all parameters that are trained, as the optimizer of a whole model numbers them.
        own: the modules that this worker computes.
    """

    split = True

    def __init__(
        self, config: RunConfig, model: nn.Module, own: nn.Module, order: list[str], precision: Precision, at: Seating
    ) -> None:
        self.seating, self._own, self._config = at, own, config
        named = dict(model.named_parameters())
        self.numbers = [i for i, name in enumerate(order) if not named[name].is_meta]
        self.held = [named[order[i]] for i in self.numbers]  # what forward and backward know
        pieces = nn.ParameterList(nn.Parameter(local(p).detach()) for p in self.held)
        super().__init__(model, build_optimizer(config, pieces), precision)
        place = {id(p): place for place, p in enumerate(pieces)}
        assert [place[id(p)] for p in self.parameters] == list(range(len(pieces)))
        self._count = len(order)
        self.handing: dict[str, Tensor] = {}  # the whole state, where this worker took it along

    @property
    def own(self) -> nn.Module:
        """See TrainingState."""
        return self._own

    def _weights(self) -> dict[str, Tensor]:
        """Own parameters and buffers by name, the live ones."""
        return {name: t for name, t in self.model.state_dict().items() if not t.is_meta}

    def _optimizer_entries(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name in a snapshot, the optimizer's tensor, the parameter) of own parameters."""
        for place, entry in self.optimizer.state_dict()["state"].items():
            for key, value in entry.items():
                if value is not None:
                    yield f"optimizer.{self.numbers[place]}.{key}", torch.as_tensor(value), self.held[place]

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers of the whole model in state_dict order; every worker of the replica group calls it."""
        whole: dict[str, Any] = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True))
        yield from ((name, whole[name]) for name in self.model.state_dict())

    def _whole_optimizer(self) -> Iterator[tuple[str, Tensor]]:
        for name, value, parameter in self._optimizer_entries():
            yield name, whole_like(value, parameter)

    def tensors(self) -> dict[str, Tensor]:
        """The whole state, on the first and the last worker of the replica group; all of it call it."""
        named: dict[str, Tensor] = {}
        keeps = self.carries
        with self.seating.inside.others_wait():
            for name, tensor in self.whole_weights():
                if keeps:
                    named[f"model.{name}"] = tensor.detach().cpu()
            for name, tensor in self._whole_optimizer():
                if keeps:
                    named[name] = tensor.cpu()
        return named

    @property
    def carries(self) -> bool:
        """Whether this worker takes the whole state along from a step boundary: two of a group, for one may leave."""
        return self.seating.part in (0, self.seating.layout.size - 1)

    def pieces(self) -> dict[str, Tensor]:
        """What this worker holds, by the names of a snapshot."""
        kept = {f"model.{name}": local(t) for name, t in self._weights().items()}
        kept |= {name: value for name, value, _ in self._optimizer_entries()}
        return {name: t.detach() for name, t in kept.items()}

    @torch.no_grad()
    def load_pieces(self, pieces: Mapping[str, Tensor], step: int) -> None:
        """Take over what `pieces` gave on a worker with the same part."""
        for name, tensor in self._weights().items():
            local(tensor).copy_(pieces[f"model.{name}"])
        entries: dict[int, dict[str, Tensor]] = {}
        for name, tensor in pieces.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".", 2)
                if int(number) in self.numbers:
                    place = self.numbers.index(int(number))
                    entries.setdefault(place, {})[key] = self._like_parameter(place, tensor)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})
        self.step = step

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Take over this worker's part of a whole snapshot."""
        cut = {f"model.{name}": piece_like(tensors[f"model.{name}"], t) for name, t in self._weights().items()}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                number = int(name.split(".")[1])
                if number in self.numbers:
                    parameter = self.held[self.numbers.index(number)]
                    cut[name] = piece_like(tensor, parameter) if tensor.shape == parameter.shape else tensor
        self.load_pieces(cut, step)
        self.handing = dict(tensors)

    def sha256(self) -> str:
        """See sha256_of, of the whole model; every worker of the replica group calls it."""
        with self.seating.inside.others_wait():
            return sha256_of(self.whole_weights())

    def handed_over(self, group: Group) -> dict[str, Tensor]:
        """See TrainingState: what was taken along, else what the first replica group holds."""
        carried = group.broadcast_object(bool(self.handing))
        if carried:
            return self.handing
        return self.tensors() if group.rank < self.seating.layout.size else {}

    def evaluation(self, workload: Workload, group: Group) -> tuple[Workload, Group]:
        """See TrainingState: the workers of a replica group evaluate together."""
        return workload, self.seating.across

    def gradient_norm(self) -> Tensor:
        """See TrainingState: norms of parameters in the optimizer's order, then their norm, as on one worker.

        Gradients that are spread over workers are gathered one by one: their norm has the bits of a whole one's. With
        tensor parallelism squares are added.
        """
        device, adds = self.seating.inside.device, self._config.parallel.kind == "tensor"
        squares, norms = (torch.zeros(self._count, device=device) for _ in range(2))
        with self.seating.inside.others_wait():
            for number, piece, parameter in zip(self.numbers, self.parameters, self.held, strict=True):
                assert piece.grad is not None
                cut = isinstance(parameter, DTensor) and any(p.is_shard() for p in parameter.placements)
                if cut and adds:
                    squares[number] = torch.linalg.vector_norm(piece.grad) ** 2
                else:
                    norm = torch.linalg.vector_norm(whole_like(piece.grad, parameter))
                    norms[number] = norm if self.speaks else 0.0
            both = torch.stack([squares, norms])
            self.seating.inside.sum(both)
        together: Tensor = torch.linalg.vector_norm(both[0].sqrt() + both[1])
        return together

    @property
    def speaks(self) -> bool:
        """Whether this worker reports what its whole replica group knows."""
        return self.seating.part == 0

    def take_gradients(self) -> Iterator[tuple[int, Tensor]]:
        """(place among the pieces, this worker's gradient) of the last backward pass, which are then forgotten."""
        for place, parameter in enumerate(self.held):
            gradient = parameter.grad
            parameter.grad = None
            if isinstance(gradient, DTensor):
                assert isinstance(parameter, DTensor)
                gradient = local(gradient.redistribute(placements=parameter.placements))
            if gradient is not None:
                yield place, gradient


def parameter_order(config: RunConfig, model: nn.Module) -> list[str]:
    """Names of the parameters in the order of the optimizer of a whole model."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in parameter_groups(config, model) for p in group["params"]]
