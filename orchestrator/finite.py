"""Whether a model's numbers are numbers still: a finite loss may have a gradient that is infinite."""

from collections.abc import Mapping

import torch
from torch import Tensor


def spoilt(tensors: Mapping[str, Tensor]) -> str:
    """The name of a parameter or buffer among the tensors of a snapshot that holds NaN or infinity; "": none does."""
    for name, tensor in tensors.items():
        if name.startswith("model.") and tensor.is_floating_point() and tensor.numel():
            least_and_most = torch.stack(torch.aminmax(tensor.detach()))  # which let NaN through, without a copy
            if not bool(torch.isfinite(least_and_most).all()):
                return name.removeprefix("model.")
    return ""
