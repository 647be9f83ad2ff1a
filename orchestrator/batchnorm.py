"""Batch normalization whose running statistics do not depend on who computed which shard.

Each shard is normalized by its own statistics (as each worker's batch is in ordinary data parallelism). With
momentum 1 a module's running statistics are those of the last forward pass; they travel with the gradients as
part of the extra vector, weighted by the shard's samples, and one update with the module's own momentum follows.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class RunningStatistics:
    """The running means and variances of all batch normalization modules of a model, as one flat vector."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        self._momenta = [m.momentum for m in self._modules]
        for module in self._modules:
            module.momentum = 1.0
        self._buffers = [b for m in self._modules for b in (m.running_mean, m.running_var) if b is not None]
        self._kept = [b.clone() for b in self._buffers]
        self._tracked: list[int] = []
        self._open = False  # a step has begun and is not committed

    @property
    def numel(self) -> int:
        return sum(b.numel() for b in self._buffers)

    def of_last_forward(self, samples: int) -> Tensor:
        """Statistics of the last forward pass times its number of samples, fp32 [numel]."""
        assert self._buffers
        return torch.cat([b.flatten() for b in self._buffers]).mul_(samples)

    def start_step(self) -> None:
        """Remember the running statistics: forward passes overwrite the modules' own."""
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            kept.copy_(buffer)
        self._tracked = [int(m.num_batches_tracked) for m in self._modules if m.num_batches_tracked is not None]
        self._open = True

    def fold(self, total: Tensor, samples: int, steps_done: int, of_batch: float = 1.0) -> None:
        """Update the modules: running = (1 - momentum) running + momentum total / samples.

        Args:
            total: fp32 [numel], the sum over shards of `of_last_forward`.
            samples: of all shards.
            steps_done: updates so far, this one included; a momentum of None averages over them (as in torch).
            of_batch: the share of a batch that this is; the shares of a batch make one update together.
        """
        self._open = False
        mean = total / samples
        parts = mean.split([b.numel() for b in self._buffers])
        momenta = [m for m in self._momenta for _ in range(2)]
        for buffer, kept, part, momentum in zip(self._buffers, self._kept, parts, momenta, strict=True):
            share = 1 / steps_done if momentum is None else momentum
            if of_batch != 1.0 and momentum is not None:
                share = 1 - (1 - momentum) ** of_batch
            buffer.copy_(kept.mul_(1 - share).add_(part.view_as(buffer), alpha=share))
        for module in self._modules:
            if module.num_batches_tracked is not None:
                module.num_batches_tracked.fill_(steps_done)

    def close(self) -> None:
        """Leave the modules as they were made, and as the last committed step left their statistics."""
        for module, momentum in zip(self._modules, self._momenta, strict=True):
            module.momentum = momentum
        if not self._open:
            return
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            buffer.copy_(kept)
        counters = [m.num_batches_tracked for m in self._modules if m.num_batches_tracked is not None]
        for counter, tracked in zip(counters, self._tracked, strict=True):
            counter.fill_(tracked)
