"""A trained ResNet as orchestrator.export sees it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from workloads.resnet import data as images
from workloads.resnet.config import RESIZE_RATIO, ResnetConfig
from workloads.resnet.workload import ImageSamples, ResnetWorkload, load
from workloads.workload import Batch, Split

NAMED = 5  # classes in a message


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
        self._config = config

    def load(self, folder: Path) -> nn.Module:
        """From model.safetensors and config.json."""
        return load(folder)[0]

    def example(self, batch: Batch) -> tuple[Tensor, ...]:
        """Images [m, C, H, W]."""
        return (batch["images"],)

    def about(self, config: ResnetConfig, folder: Path) -> dict[str, Any]:
        """Labels, channels, size, mean and std of the pixels, and how an image of another size is brought to it."""
        _, description = load(folder)
        resize = round(description["image_size"] * RESIZE_RATIO) if images.kind(config).photos else 0
        return {**description, "resize": resize}

    def settings_for(self, data: str, about: Mapping[str, Any], folder: Path) -> ResnetConfig:
        """See Exporting: the model's size of images; classes may be fewer than the model's, in any order."""
        config = dataclasses.replace(self._config, data=data, image_size=about["image_size"])
        names, channels = set(images.open_split(config, "heldout").class_names), len(images.kind(config).mean)
        if unknown := sorted(names - set(about["class_names"])):
            shown = ", ".join(unknown[:NAMED]) + (", ..." if len(unknown) > NAMED else "")
            raise UserError(f"--data {data}: the model does not know {len(unknown)} of its classes ({shown})")
        if channels != about["channels"]:
            raise UserError(f"--data {data}: images of {channels} channels; the model takes {about['channels']}")
        return config

    def workload_for(self, config: RunConfig, about: Mapping[str, Any]) -> ResnetWorkload:
        """See Exporting."""
        assert isinstance(config, ResnetConfig)
        return Judged(config, about)


class Judged(ResnetWorkload):
    """Images as a model that was trained on others expects them."""

    def __init__(self, config: ResnetConfig, about: Mapping[str, Any]) -> None:
        super().__init__(config)
        self._about = about

    def samples(self, split: Split) -> ImageSamples:
        """See ResnetWorkload."""
        opened = self._open(split)
        numbers = {name: number for number, name in enumerate(self._about["class_names"])}
        labels = np.asarray([numbers[name] for name in opened.class_names], np.int64)
        found = JudgedSamples(opened, split, self.config)
        found.judge(labels, self._about["mean"], self._about["std"])
        return found


class JudgedSamples(ImageSamples):
    """ImageSamples with the model's labels and normalization."""

    def judge(self, labels: NDArray[np.int64], mean: Sequence[float], std: Sequence[float]) -> None:
        """Args:
        labels: the model's label of each of the data's.
        mean, std: of the model's pixels, by channel.
        """
        self._numbers = torch.from_numpy(labels)
        self.mean, self.std = tuple(mean), tuple(std)

    def microbatch(self, indices: NDArray[np.int64], epoch: int, progress: float = 1.0) -> Batch:
        """See ImageSamples."""
        batch = super().microbatch(indices, epoch, progress)
        return {**batch, "labels": self._numbers[batch["labels"]]}
