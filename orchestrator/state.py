"""Training state: what a checkpoint holds and a joiner receives. It never mentions the number of workers."""

import hashlib
import resource
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from orchestrator.checkpoint import Described, Loaded, whole
from orchestrator.devices import host_of, kind_of
from orchestrator.finite import check_finite
from orchestrator.group import Group
from orchestrator.precision import Precision
from workloads.workload import Workload

MESSAGE_BYTES = 32 * 2**20


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over parameters and buffers in state_dict order; see sha256_of."""
    return sha256_of(model.state_dict().items())


def sha256_of(weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over named tensors in this order.

    Each as its name, its dtype ("torch.float32"), its shape ("(64, 3, 3, 3)") in UTF-8 and its raw bytes in
    row-major order, without separators.
    """
    digest = hashlib.sha256()
    for name, tensor in weights:
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(_bytes_of(tensor.detach().cpu()).numpy().data)
    return digest.hexdigest()


def memory_bytes(state: "TrainingState") -> dict[str, int]:
    """What this worker needs: `state`, its parameters with gradients and optimizer state; `peak_rss`, all there was."""
    pieces = [p for p in state.parameters for _ in range(2)]
    kept = [t for entry in state.optimizer.state.values() for t in entry.values() if isinstance(t, Tensor)]
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"state": sum(t.numel() * t.element_size() for t in (*pieces, *kept)), "peak_rss": peak_kb * 1024}


class TrainingState:
    """Model, optimizer, loss scale and the number of committed steps.

    Attributes:
        split: whether this is only a part of them (splits.SplitState).
    """

    split = False

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, precision: Precision) -> None:
        self.model = model
        self.trained = model  # what a step calls: the model, or the model compiled
        self.optimizer = optimizer
        self.precision = precision
        self.step = 0
        self.outer: Tensor | None = None  # the outer momentum of --sync diloco
        self.evaluated_step = -1  # the step after which the held-out split was last evaluated

    @property
    def own(self) -> nn.Module:
        """The modules that this worker computes."""
        return self.model

    def evaluation(self, workload: Workload, group: Group) -> tuple[Workload, Group, bool]:
        """What evaluates the model, those among whom the held-out samples are shared out, and whether in step."""
        return workload, group, False

    def gradient_norm(self) -> Tensor:
        """Of all parameters together."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, the live tensors (not copies) where there are any."""
        named = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        for index, entry in self.optimizer.state_dict()["state"].items():
            for key, value in entry.items():
                if value is not None:
                    named[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
        for key, number in self.precision.scaler.state_dict().items():
            named[f"scaler.{key}"] = torch.tensor(float(number), dtype=torch.float64)
        if self.outer is not None:
            named["outer.momentum"] = self.outer
        return named

    def pieces(self) -> dict[str, Tensor]:
        """What this worker holds, by the names of a snapshot."""
        return self.tensors()

    def check_finite(self) -> None:
        """Raises NonFiniteWeightsError where a parameter or buffer that this worker holds is NaN or infinite."""
        check_finite(self.pieces(), self.step)

    def snapshot(self) -> dict[str, Tensor]:
        """A copy on the CPU that later steps do not touch; tied tensors are copied once each name."""
        return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in self.tensors().items()}

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Take over a snapshot.

        Raises:
            KeyError: a tensor is missing.
            RuntimeError: torch's own, where names or shapes differ.
        """
        model = {k.removeprefix("model."): t for k, t in tensors.items() if k.startswith("model.")}
        self.model.load_state_dict(model)
        entries: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                entries.setdefault(int(index), {})[key] = self._like_parameter(int(index), tensor)
        self.optimizer.load_state_dict({"state": entries, "param_groups": self.optimizer.state_dict()["param_groups"]})
        scaler = self.precision.scaler.state_dict()
        if scaler:
            kinds = {key: type(value) for key, value in scaler.items()}
            self.precision.scaler.load_state_dict(
                {key: kind(tensors[f"scaler.{key}"].item()) for key, kind in kinds.items()}
            )
        if "outer.momentum" in tensors:
            self.outer = tensors["outer.momentum"].to(self.parameters[0].device, copy=True)
        self.step = step

    def room(self, described: Described) -> dict[str, Tensor]:
        """Empty tensors for what this worker takes of a checkpoint that holds these."""
        return whole(described)

    def take_checkpoint(self, loaded: Loaded) -> None:
        """Take over a checkpoint that was read with `room`."""
        self.load(loaded.tensors, loaded.step)

    def _like_parameter(self, index: int, tensor: Tensor) -> Tensor:
        # Fused optimizers walk memory: a buffer must have its parameter's layout, not merely its shape.
        parameter = self.parameters[index]
        if tensor.shape != parameter.shape:
            return tensor.clone()
        return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)

    def receive(self, group: Group, halfway: Callable[[int], None] = lambda step: None) -> None:
        """Take over the state of rank 0; every worker of the group calls it. Who has as many steps keeps its own.

        Args:
            halfway: called with the number of steps before the middle one of the messages.
        """
        mixed = len(set(group.gather_objects(kind_of(group.device)))) > 1
        self._receive(group, self.tensors() if group.rank == 0 else {}, halfway, self.load, alike=not mixed)

    def _receive(
        self,
        group: Group,
        tensors: dict[str, Tensor],
        halfway: Callable[[int], None],
        load: Callable[[Mapping[str, Tensor], int], None],
        cut: Callable[[str, Tensor], Tensor | None] = lambda name, tensor: tensor,
        alike: bool = True,
    ) -> None:
        """See receive.

        Args:
            tensors: on rank 0, what is handed over.
            load: takes over what has come, and the number of its steps.
            cut: what of a tensor that has come is kept until then.
            alike: whether the workers' machines draw the same initial weights.
        """
        described = [(name, t.shape, t.dtype) for name, t in tensors.items()]
        described, step, evaluated = group.broadcast_object((described, self.step, self.evaluated_step))
        if not step and alike:
            return  # everybody has the initial state
        lacks = self.step != step or (not step and group.rank > 0)
        received: dict[str, Tensor] = {}
        device = host_of(group.device)
        parts = list(_parts(described))
        for number, part in enumerate(parts):
            if number == len(parts) // 2:
                halfway(step)
            if group.rank == 0:
                raw = [_bytes_of(tensors[name].detach().to(device)) for name, *_ in part]
                flat = torch.cat(raw)
            else:
                flat = torch.empty(sum(_size(shape, dtype) for _, shape, dtype in part), dtype=torch.uint8)
                flat = flat.to(device)
            group.broadcast(flat, 0)
            if lacks:
                start = 0
                for name, shape, dtype in part:
                    raw_tensor = flat[start : start + _size(shape, dtype)].clone()
                    kept = cut(name, raw_tensor.view(dtype).reshape(shape))
                    if kept is not None:
                        received[name] = kept
                    start += _size(shape, dtype)
        if lacks:
            load(received, step)
        self.evaluated_step = evaluated


Sent = tuple[str, torch.Size, torch.dtype]


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _size(shape: torch.Size, dtype: torch.dtype) -> int:
    return shape.numel() * dtype.itemsize


def _parts(described: list[Sent]) -> Iterator[list[Sent]]:
    """Stretches of about MESSAGE_BYTES: hundreds of small messages would cost more than their bytes."""
    part: list[Sent] = []
    held = 0
    for item in described:
        part.append(item)
        held += _size(item[1], item[2])
        if held >= MESSAGE_BYTES:
            yield part
            part, held = [], 0
    if part:
        yield part
