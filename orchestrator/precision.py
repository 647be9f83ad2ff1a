"""Mixed precision: one code path for fp32, bf16 and fp16."""

import torch


class Precision:
    """Autocast for the forward pass and a loss scale that is 1 unless fp16 needs it.

    The scaler sees reduced gradients, the same on every worker, so all workers skip or take the same step.
    """

    def __init__(self, kind: str, device_type: str) -> None:
        self.kind = kind
        self._device_type = device_type
        self.scaler = torch.amp.GradScaler(device_type, enabled=kind == "fp16")
        # The scaler makes its scale when it is first used, which a worker without samples would never do.
        self.scaler.scale(torch.zeros(1, device=device_type))

    def autocast(self) -> torch.autocast:
        """Context of a forward pass; weights stay fp32, matrix products run in the run's precision."""
        dtype = torch.float16 if self.kind == "fp16" else torch.bfloat16
        return torch.autocast(self._device_type, dtype=dtype, enabled=self.kind != "fp32")
