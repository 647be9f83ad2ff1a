"""Dropout whose random bits are drawn in lots where that is quicker: on CPUs."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEVELS = 2**16  # 16 random bits decide on a value


def drop(values: Tensor, rate: float) -> Tensor:
    """`values` with each one 0 by a chance of `rate`, the others scaled so that the mean stays.

    On CPUs 64 bits of torch's global generator decide on four values: torch's own dropout draws as many for each, one
    after the other, and takes twice as long, forward and backward together. The rate is then a multiple of 1 / LEVELS
    (0.1 is 0.100006), and the scale belongs to that. Elsewhere, and compiled, it is torch's own.

    Args:
        values: of any shape and floating dtype.
        rate: from 0 to less than 1.
    """
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(values, rate)
    dropped, number = round(rate * LEVELS), values.numel()
    drawn = torch.empty(-(-number // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = drawn.view(torch.int16)[:number].view(values.shape) >= dropped - LEVELS // 2
    return values * kept.to(values.dtype).mul_(LEVELS / (LEVELS - dropped))


class Dropout(nn.Dropout):
    """torch's layer with `drop`: nothing is dropped in evaluation mode."""

    def forward(self, values: Tensor) -> Tensor:
        return drop(values, self.p) if self.training and self.p else values
