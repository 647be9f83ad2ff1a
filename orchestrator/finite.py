"""Whether a model's numbers are numbers still: a finite loss may have a gradient that is infinite."""

from collections.abc import Mapping

import torch
from torch import Tensor

from orchestrator.errors import NonFiniteWeightsError


def check_finite(tensors: Mapping[str, Tensor], step: int) -> None:
    """Raises NonFiniteWeightsError where a parameter or buffer among the tensors of a snapshot is NaN or infinite."""
    for name, tensor in tensors.items():
        if name.startswith("model.") and tensor.is_floating_point() and tensor.numel():
            least_and_most = torch.stack(torch.aminmax(tensor.detach()))  # which let NaN through, without a copy
            if not bool(torch.isfinite(least_and_most).all()):
                raise NonFiniteWeightsError(
                    f"the model's {name.removeprefix('model.')} is not finite after step {step}: training has "
                    "diverged; a lower --lr, or --clip-norm; checkpoints from before that are kept"
                )
