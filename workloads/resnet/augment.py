"""Augmentation and normalization of images; each sample is a pure function of (seed, epoch, its index).

Measured 2026-11-23 (one core of a shared 2-core cloud machine, torch 2.13 CPU, 3x32x32, microbatches of 64,
CPU time a sample with normalization): none 6 us, shift 40, crop-flip 63, resized-crop-flip 160.
torch.manual_seed would add 130: it looks after every accelerator; v2 draws from the CPU generator alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.shards import derive_seed
from workloads.resnet.vision import v2


class Augmentation:
    """Random crops and flips of single images, uint8 [C, H, W]; resized-crop-flip takes any size.

    Args:
        name: none, shift, crop-flip or resized-crop-flip; "auto" is resolved by the caller.
        image_size: height and width of the result in pixels.
    """

    def __init__(self, name: str, image_size: int) -> None:
        self._made_of = name, image_size
        self.padding = 0
        self.resizes = name == "resized-crop-flip"
        self.transforms: list[Any] = []
        if name == "none":
            return
        flip = v2().RandomHorizontalFlip()
        if name in ("shift", "crop-flip"):
            self.padding = max(1, image_size // 8)  # He et al. 2015, section 4.2: 4 of 32 pixels on each side
            crop = v2().RandomCrop(image_size)
            self.transforms = [crop, flip] if name == "crop-flip" else [crop]
        elif self.resizes:
            # torchvision's defaults are those of Szegedy et al. 2014, section 6: 8 % to 100 % of the area,
            # aspect ratio 3/4 to 4/3.
            self.transforms = [v2().RandomResizedCrop(image_size, antialias=True), flip]
        else:
            raise ValueError(f"no augmentation {name}")

    def __reduce__(self) -> tuple[type, tuple[str, int]]:
        """Made anew in another process, which imports torchvision in the order that it needs."""
        return Augmentation, self._made_of

    def pad(self, images: Tensor) -> Tensor:
        """What the crops are cut from: uint8 [..., H, W] with a black border; a whole microbatch at once."""
        return F.pad(images, (self.padding,) * 4) if self.padding else images

    def __call__(self, image: Tensor, seed: int, epoch: int, index: int) -> Tensor:
        """One augmented image from one padded image; reseeds torch's CPU generator, which v2 draws from."""
        if self.transforms:
            torch.default_generator.manual_seed(derive_seed("augment", seed, epoch, index))
        for transform in self.transforms:
            image = transform(image)
        return image


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [m, C, H, W] to float32: scaled to 0..1, minus `mean`, over `std` (one number per channel).

    Subtraction and division are rounded element by element, so the other images change no bit of one.
    """
    # The scale to 0..1 is moved into the constants: one pass less over the images.
    mean_C11 = torch.tensor(mean, dtype=torch.float32)[:, None, None] * 255
    std_C11 = torch.tensor(std, dtype=torch.float32)[:, None, None] * 255
    return images.to(torch.float32).sub_(mean_C11).div_(std_C11)
