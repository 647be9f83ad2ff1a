"""Settings of image classification; the defaults train the digits in well under a minute on one core."""

from dataclasses import dataclass

from orchestrator.config import OPTIMIZERS, RunConfig
from orchestrator.errors import UserError
from orchestrator.settings import setting

# He et al. 2015, section 4.2: n of 6n + 2 layers.
CIFAR_BLOCKS = {"resnet8": 1, "resnet20": 3, "resnet32": 5, "resnet56": 9}
# Channels of the three blocks. Jordan 2024, arXiv:2404.00498: airbench94's; ours for grey images and CPUs.
AIRBENCH = {"airbench": (64, 256, 256), "airbench-small": (16, 64, 128)}
# Residual blocks of torchvision's networks (He et al. 2015, table 1).
IMAGENET_FAMILY = {"resnet18": 8, "resnet34": 16, "resnet50": 16, "resnet101": 33, "resnet152": 50}
# The ImageNet stem divides height and width by 4 and the stages by 8 more: under 64 pixels the last stage
# would be left with 1x1. Smaller images get a 3x3 stem with stride 1 and without pooling instead.
SMALL_IMAGE = 64
# Krizhevsky et al. 2012, section 2 and 4.1: the shorter side of a held-out image is brought to 256, then its
# middle cut out for an input of 224.
RESIZE_RATIO = 256 / 224


def last_size(model: str, image_size: int) -> int:
    """Height and width, in pixels, of what the network averages over (or takes the largest of) at its end."""
    if model in AIRBENCH:
        return (image_size - 1) // 8  # patches of 2x2 inside the image, then three halvings, rounding down
    if model in CIFAR_BLOCKS:
        return -(-image_size // 4)
    return -(-image_size // (8 if image_size < SMALL_IMAGE else 32))


@dataclass(frozen=True, kw_only=True)
class ResnetConfig(RunConfig):
    """The common settings, re-defaulted for the digits, and those of images."""

    data: str = setting("digits")
    """Images: digits (ships with scikit-learn), cifar10:DIR (the python version), fashion-mnist:DIR (IDX
    files), imagefolder:DIR (DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg), parquet:URI (any of these, prepared
    by orchestrator.prepare)."""

    model: str = setting("resnet8", choices=(*CIFAR_BLOCKS, *AIRBENCH, *IMAGENET_FAMILY))
    """Network: resnet8 to resnet56 of the CIFAR family, resnet18 to resnet152 of the ImageNet family (with a
    3x3 stem for images under 64 pixels), airbench and airbench-small (Jordan 2024), made
    to be trained fast, of 9 pixels or more."""

    batch_size: int = setting(128, low=1)
    """Global batch: images per step over all workers; a multiple of the shards."""

    epochs: int | None = setting(30, low=1)
    """Training length in passes over the training split; give this or --steps."""

    optimizer: str = setting("sgd", choices=OPTIMIZERS)
    """Optimizer; nesterov is sgd with Nesterov's momentum."""

    lr: float = setting(0.1, low=0)
    """Peak learning rate, for the whole global batch."""

    weight_decay: float = setting(5e-4, low=0)
    """Weight decay: L2 for sgd, nesterov and adam, decoupled for adamw."""

    warmup: float = setting(0.1, low=0, high=1)
    """Share of the run in which the learning rate rises linearly from 0."""

    label_smoothing: float = setting(0.1, low=0, high=1)
    """Share of each training label that is spread evenly over all classes; evaluation uses plain labels."""

    augment: str = setting("auto", choices=("auto", "none", "shift", "crop-flip", "resized-crop-flip"))
    """Training augmentation: none; shift by up to 1/8 of the size; crop-flip: shift and mirror;
    resized-crop-flip: a random part of the image, mirrored. auto: none for digits, crop-flip for cifar10 and
    fashion-mnist, resized-crop-flip for imagefolder."""

    image_size: int = setting(0, low=0, high=1024)
    """Height and width of the network's input in pixels, 8 to 1024. 0: 224 for imagefolder, else as the
    images are."""

    def check_split(self) -> None:
        """See RunConfig: residual blocks are what is spread or dealt out."""
        parallel, model = self.parallel, self.model
        if parallel.kind == "tensor":
            raise UserError(f"--parallel {parallel}: convolutions are not split within a layer; use fsdp or pipeline=N")
        if model in AIRBENCH:
            raise UserError(f"--parallel {parallel}: {model} is held whole, it is small; leave it out")
        stages = 2 + (3 * CIFAR_BLOCKS[model] if model in CIFAR_BLOCKS else IMAGENET_FAMILY[model])
        if parallel.kind == "pipeline" and parallel.size > stages:
            raise UserError(f"--parallel {parallel}: {model} makes {stages} stages at most; use fewer")
