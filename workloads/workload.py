"""The protocol between the training loop and a workload: data, model, loss as sums, metrics, saving.

The loop never sees images or tokens, and a workload never sees shards, steps or workers, but in how many parts to
split a layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

Batch = dict[str, Tensor]
Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Sums:
    """What one forward pass adds to the batch's totals; sums, never means, so that shards can be added.

    Attributes:
        loss: scalar fp32 with gradient, the loss summed over its items.
        count: how many items the loss is a sum over (images; masked tokens).
        others: further scalar sums by name ("correct"), without gradient.
    """

    loss: Tensor
    count: Tensor
    others: dict[str, Tensor] = field(default_factory=dict)


class Samples(Protocol):
    """One split of the data, random access by sample index. Can be pickled."""

    @property
    def modules(self) -> tuple[str, ...]:
        """What a process imports first that is to make microbatches; none of it may start a thread."""
        ...

    def __len__(self) -> int: ...

    def microbatch(self, indices: NDArray[np.int64], epoch: int, progress: float = 1.0) -> Batch:
        """The samples at `indices` (int64 [microbatch]) as CPU tensors, first dimension [microbatch].

        A pure function of (configuration, epoch, indices, progress), each sample of (seed, epoch, its index, progress)
        alone: which other samples are in the microbatch changes nothing of it. `progress` is the share of the run's
        steps that are done, 1 outside of training. Must not depend on, nor need to keep, the
        state of any global generator (it may reseed torch's). Raises DataError naming a sample that cannot
        be read.
        """
        ...


class Piece(nn.Module):
    """Some modules of a model, and how activations come out of them; the first piece of a model is given None."""

    def __init__(self, compute: Callable[[Tensor, Batch], Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self._compute = compute

    def forward(self, hidden: Tensor, batch: Batch) -> Tensor:
        return self._compute(hidden, batch)


class Workload(Protocol):
    """One kind of training; built from its configuration, `SomeWorkload(config)`."""

    @property
    def decodes(self) -> bool:
        """Whether preparing a microbatch is heavy work (image files), so that it pays to do it ahead."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of the data as it lies here: that of its DataSummary, where it is the same."""
        ...

    def build_model(self) -> nn.Module:
        """A new model on the CPU, fp32; initial weights come from torch's global generator (the caller seeds)."""
        ...

    def samples(self, split: Split) -> Samples:
        """The training split (augmented, masked) or the held-out split (not augmented; masked by a fixed seed)."""
        ...

    @property
    def varying_inputs(self) -> tuple[int, ...]:
        """Places of the model's inputs whose first dimension is not the number of samples, for --compile."""
        ...

    @property
    def turning_points(self) -> tuple[float, ...]:
        """Shares of the run from which on training inputs have other shapes than before, for --compile."""
        ...

    def nominal_count(self, samples: int) -> float:
        """The expected `Sums.count` of so many samples: the loss is divided by it before the backward pass."""
        ...

    def sums(self, model: nn.Module, batch: Batch) -> Sums:
        """Forward pass and loss of one microbatch; model.training says whether it is training."""
        ...

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The modules whose parameters are worth gathering one after the other where a model is spread over workers."""
        ...

    def tensor_plan(self, model: nn.Module, part: int, parts: int) -> dict[str, Any]:
        """How the parameters of each layer are split among `parts` workers, by torch's parallelize_module."""
        ...

    @property
    def pieces_read(self) -> bool:
        """Whether all pieces look at the batch, not the first one and `finish` alone."""
        ...

    def pieces(self, model: nn.Module) -> list["Piece"]:
        """The model cut into consecutive pieces, from a batch to what `finish` takes."""
        ...

    def finish(self, output: Tensor, batch: Batch, training: bool) -> Sums:
        """What `sums` makes of the model's output."""
        ...

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Held-out metrics from totals: "loss", "count" and the names in `Sums.others`."""
        ...

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the trained model (model.safetensors, config and what else is needed to load it) into `folder`."""
        ...
