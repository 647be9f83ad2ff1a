"""An image file made ready for an exported ResNet, and its answer; Pillow and numpy, no torch.

The same steps as for a held-out image in training (workload.py). Where that resizes arrays of pixels in torch
(images smaller or larger than --image-size, not photos), Pillow's own filter is used here.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import DataError, UserError
from workloads.predicting import Arrays, Guesses, top
from workloads.resnet.folder import decode, without_ends


class ResnetPredicting:
    """See workloads.predicting.Predicting; the input is the path of an image file."""

    def __init__(self, about: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        self._about = about
        self._name = ""

    def inputs(self, given: str) -> Arrays:
        """{"images": float32 [1, C, H, W]}"""
        self._name = Path(given).name
        try:
            with warnings.catch_warnings():  # Pillow's, of transparency and many pixels, with its source's lines
                warnings.simplefilter("ignore")
                image = decode(given, given, "RGB" if self._about["channels"] == 3 else "L")
        except DataError as error:
            said, _, _ = str(error).rpartition("; ")  # then comes what to do with a sample
            raise UserError(f"--input {said}; give an image file that Pillow can open") from None
        size, resize = self._about["image_size"], self._about["resize"]
        if resize:
            image = _middle(_shorter_side(without_ends(image), resize), size)
        elif image.size != (size, size):
            image = _resized(image, (size, size))
        pixels_HWC = np.asarray(image, np.float32).reshape(size, size, -1)
        # As workloads.resnet.augment.normalize: rounded in the same places.
        mean_C, std_C = (np.asarray(self._about[key], np.float32) * np.float32(255) for key in ("mean", "std"))
        images_1CHW = ((pixels_HWC - mean_C) / std_C).transpose(2, 0, 1)[None]
        return {"images": np.ascontiguousarray(images_1CHW)}

    def answers(self, output: NDArray[np.float32]) -> list[Guesses]:
        """The five most probable classes."""
        return [top(self._name, output[0], list(self._about["class_names"]))]

    def closing(self, answers: list[Guesses]) -> str:
        """Nothing is left to say."""
        return ""


def _resized(image: Any, size: tuple[int, int]) -> Any:
    from PIL import Image

    return image.resize(size, Image.Resampling.BILINEAR)  # with antialiasing, as torchvision's default


def _shorter_side(image: Any, length: int) -> Any:
    """The shorter side `length` pixels, the longer one rounded down, as torchvision's resize."""
    width, height = image.size
    if width <= height:
        return _resized(image, (length, int(length * height / width)))
    return _resized(image, (int(length * width / height), length))


def _middle(image: Any, size: int) -> Any:
    """The middle `size` x `size`, as torchvision's center_crop."""
    left, above = (round((have - size) / 2.0) for have in image.size)
    return image.crop((left, above, left + size, above + size))
