"""A model in parts: which of its tensors a worker of a replica group holds, and the whole of them again.

The optimizer works on plain tensors: of a parameter that is spread over workers (a DTensor) on the worker's own piece,
in the DTensor's memory. What is saved is the whole state, by the names that it has without any split.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from orchestrator.checkpoint import Described, Loaded
from orchestrator.config import RunConfig
from orchestrator.group import Group
from orchestrator.layout import Layout
from orchestrator.optimizer import build_optimizer
from orchestrator.pieces import as_cut, channels_last, gathered, local, piece_like
from orchestrator.precision import Precision
from orchestrator.state import TrainingState, sha256_of
from workloads.workload import Batch, Sums, Workload


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


class SplitState(TrainingState):
    """The training state of a worker that holds a part.

    Args:
        order: names of all parameters that are trained, as the optimizer of a whole model numbers them.
        own: the modules that this worker computes.
        copies: parameters among them that another worker of the replica group trains.
        last: names of those that lie channels last in a whole model, and here do not.
    """

    split = True

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        own: nn.Module,
        order: list[str],
        precision: Precision,
        at: Seating,
        copies: Sequence[nn.Parameter] = (),
        last: Container[str] = (),
    ) -> None:
        self.seating, self._own, self._config = at, own, config
        named, foreign = dict(model.named_parameters()), {id(p) for p in copies}
        self.numbers = [i for i, n in enumerate(order) if not named[n].is_meta and id(named[n]) not in foreign]
        self.held = [named[order[i]] for i in self.numbers]  # what forward and backward know
        self._last = {self.held[place] for place, i in enumerate(self.numbers) if order[i] in last}
        pieces = nn.ParameterList(nn.Parameter(local(p).detach()) for p in self.held)
        super().__init__(model, build_optimizer(config, pieces), precision)
        place = {id(p): place for place, p in enumerate(pieces)}
        assert [place[id(p)] for p in self.parameters] == list(range(len(pieces)))
        self._count = len(order)
        self._place = {number: place for place, number in enumerate(self.numbers)}
        self.handing: dict[str, Tensor] = {}  # the whole state, where this worker took it along

    @property
    def own(self) -> nn.Module:
        """See TrainingState."""
        return self._own

    def _weights(self) -> dict[str, Tensor]:
        """Own parameters and buffers by name, the live ones."""
        return {name: t for name, t in self.model.state_dict().items() if not t.is_meta}

    def _optimizer_entries(self) -> Iterator[tuple[str, Tensor]]:
        """(name in a snapshot, the optimizer's tensor, known to be a piece where it is one) of own parameters.

        In the same order on all workers, wherever their state came from.
        """
        for place, entry in sorted(self.optimizer.state_dict()["state"].items()):
            for key, value in sorted(entry.items()):
                if value is not None:
                    yield f"optimizer.{self.numbers[place]}.{key}", as_cut(torch.as_tensor(value), self.held[place])

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers of the whole model in state_dict order, one at a time.

        Every worker of the replica group calls it.
        """
        yield from ((name, gathered(tensor)) for name, tensor in self.model.state_dict().items())

    def _whole_optimizer(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, gathered(value)) for name, value in self._optimizer_entries())

    def tensors(self) -> dict[str, Tensor]:
        """The whole state, on the first and the last worker of the replica group; all of it call it.

        Each of the two needs memory for all parameters, buffers and optimizer state, on the host: as much as a worker
        that holds the model whole. For what may be too large for that there are checkpoints in parts.
        """
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

    def parts(self) -> dict[str, Tensor]:
        """What this worker has to write of a checkpoint, by the names of a snapshot; DTensors where it is cut."""
        return {f"model.{name}": t.detach() for name, t in self._weights().items()} | dict(self._optimizer_entries())

    def pieces(self) -> dict[str, Tensor]:
        """See TrainingState."""
        kept = {f"model.{name}": t for name, t in self._weights().items()} | dict(self._optimizer_entries())
        return {name: local(t).detach() for name, t in kept.items()}

    def room(self, described: Described) -> dict[str, Tensor]:
        """See TrainingState; DTensors for pieces. Raises KeyError where a tensor of the model is missing."""
        live = {f"model.{name}": t for name, t in self._weights().items()}
        if missing := live.keys() - described.keys():
            raise KeyError(min(missing))
        found: dict[str, Tensor] = {}
        for name, (shape, dtype) in described.items():
            like = live.get(name, self._holder(name))
            if like is not None:
                cut = shape == like.shape
                found[name] = as_cut(torch.empty_like(local(like)), like) if cut else torch.empty(shape, dtype=dtype)
        return found

    def _holder(self, name: str) -> Tensor | None:
        """The own parameter whose optimizer state goes by `name`."""
        place = self._place.get(int(name.split(".")[1])) if name.startswith("optimizer.") else None
        return None if place is None else self.held[place]

    @torch.no_grad()
    def load_pieces(self, pieces: Mapping[str, Tensor], step: int) -> None:
        """Take over what `pieces` gave on a worker with the same part."""
        for name, tensor in self._weights().items():
            local(tensor).copy_(local(pieces[f"model.{name}"]))
        entries: dict[int, dict[str, Tensor]] = {}
        for name, tensor in pieces.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".", 2)
                place = self._place.get(int(number))
                if place is not None:
                    entries.setdefault(place, {})[key] = self._like_parameter(place, local(tensor))
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})
        self.step = step

    def _cutter(self) -> Callable[[str, Tensor], Tensor | None]:
        """Gives this worker's piece of a tensor of a whole snapshot, by name; None: it holds nothing of it."""
        live = {f"model.{name}": t for name, t in self._weights().items()}

        def cut(name: str, whole: Tensor) -> Tensor | None:
            like = live.get(name, self._holder(name))
            if like is None:
                return None
            return piece_like(whole, like) if whole.shape == like.shape else whole

        return cut

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Take over this worker's part of a whole snapshot."""
        cut = self._cutter()
        pieces = {name: cut(name, tensor) for name, tensor in tensors.items()}
        self.load_pieces({name: piece for name, piece in pieces.items() if piece is not None}, step)

    def take_checkpoint(self, loaded: Loaded) -> None:
        """See TrainingState."""
        (self.load_pieces if loaded.cut else self.load)(loaded.tensors, loaded.step)

    def receive(self, group: Group, halfway: Callable[[int], None] = lambda step: None) -> None:
        """See TrainingState: of rank 0's whole state if it took that along, else each part of who holds it.

        In either case a worker keeps of what comes only what is its own.
        """
        if group.broadcast_object(bool(self.handing)):
            whole = self.handing if group.rank == 0 else {}
            self._receive(group, whole, halfway, self.load_pieces, self._cutter())
        else:
            across = self.seating.across
            self._receive(across, self.pieces() if across.rank == 0 else {}, halfway, self.load_pieces)

    def sha256(self) -> str:
        """See sha256_of, of the whole model; every worker of the replica group calls it."""
        with self.seating.inside.others_wait():
            return sha256_of(self.whole_weights())

    def evaluation(self, workload: Workload, group: Group) -> tuple[Workload, Group, bool]:
        """See TrainingState: side by side, but with tensor parallelism a replica group together."""
        together = self._config.parallel.kind == "tensor"
        using: Any = SplitEvaluation(workload, group)
        return using, self.seating.across if together else group, not together

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
                    whole = gathered(as_cut(piece.grad, parameter))
                    norm = _norm(channels_last(whole) if parameter in self._last else whole)
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


class SplitEvaluation:
    """A workload as `evaluate` uses it, whose forward passes wait for other workers of `group`."""

    meets_others = True

    def __init__(self, workload: Workload, group: Group) -> None:
        self._workload, self._group = workload, group

    def __getattr__(self, name: str) -> Any:
        return getattr(self._workload, name)

    def sums(self, model: nn.Module, batch: Batch) -> Sums:
        """See Workload."""
        with self._group.others_wait():
            return self._workload.sums(model, batch)


def _norm(gradient: Tensor) -> Tensor:
    """By the kernel that torch.nn.utils.get_total_norm has for a device: another one adds in another order."""
    if gradient.device.type == "cuda":
        norms: tuple[Tensor, ...] = torch._foreach_norm([gradient], 2.0)
        return norms[0]
    found: Tensor = torch.linalg.vector_norm(gradient)
    return found
