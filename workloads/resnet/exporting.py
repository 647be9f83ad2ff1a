"""A trained ResNet as orchestrator.export sees it."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from workloads.resnet import data
from workloads.resnet.config import RESIZE_RATIO, ResnetConfig
from workloads.resnet.workload import load
from workloads.workload import Batch


class ResnetExporting:
    """See workloads.exporting.Exporting."""

    inputs = ("images",)
    axes = ({0: "batch"},)
    output = "logits"
    accuracy = "accuracy"
    shown = ("accuracy", "top5_accuracy")
    refused = {"dynamic": "only linear layers quantize on the fly, and these are convolutions; use --quantize static"}
    files = ()
    asked = "IMAGE-FILE"

    def __init__(self, config: ResnetConfig) -> None:
        """All runs are exported alike."""

    def load(self, folder: Path) -> nn.Module:
        """From model.safetensors and config.json."""
        return load(folder)[0]

    def example(self, batch: Batch) -> tuple[Tensor, ...]:
        """Images [m, C, H, W]."""
        return (batch["images"],)

    def about(self, config: ResnetConfig, folder: Path) -> dict[str, Any]:
        """Labels, channels, size, mean and std of the pixels, and how an image of another size is brought to it."""
        _, description = load(folder)
        resize = round(description["image_size"] * RESIZE_RATIO) if data.kind(config).photos else 0
        return {**description, "resize": resize}
