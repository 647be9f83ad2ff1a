"""Residual networks: the CIFAR family as in He et al. 2015, and torchvision's ImageNet family.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, 2015, arXiv:1512.03385.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.resnet.airbench import AirbenchNet
from workloads.resnet.config import AIRBENCH, CIFAR_BLOCKS, IMAGENET_FAMILY, SMALL_IMAGE
from workloads.resnet.vision import imagenet_family
from workloads.workload import Piece

# B = microbatch, C = channels, H, W = height and width, K = classes


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters (option A, as in section 4.2)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.new_channels = channels - channels_in

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out_BCHW = F.relu(self.bn1(self.conv1(x_BCHW)))
        out_BCHW = self.bn2(self.conv2(out_BCHW))
        return F.relu(out_BCHW + self.shortcut(x_BCHW))

    def shortcut(self, x_BCHW: Tensor) -> Tensor:
        """Identity; where the shape changes, every `stride`-th pixel and zeros for the new channels."""
        if self.stride == 1 and not self.new_channels:
            return x_BCHW
        x_BCHW = x_BCHW[:, :, :: self.stride, :: self.stride]
        return F.pad(x_BCHW, (0, 0, 0, 0, 0, self.new_channels))


class CifarResNet(nn.Module):
    """6n + 2 layers: a 3x3 convolution, three stages of n blocks with 16, 32, 64 channels, a linear layer."""

    def __init__(self, blocks: int, classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.stage1 = stage(blocks, 16, 16, stride=1)
        self.stage2 = stage(blocks, 16, 32, stride=2)
        self.stage3 = stage(blocks, 32, 64, stride=2)
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)  # as section 4.2: He et al. 2015, arXiv:1502.01852
        nn.init.zeros_(self.fc.bias)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BCHW = F.relu(self.bn1(self.conv1(images_BCHW)))
        x_BCHW = self.stage3(self.stage2(self.stage1(x_BCHW)))
        logits_BK: Tensor = self.fc(x_BCHW.mean(dim=(2, 3)))
        return logits_BK


def stage(blocks: int, channels_in: int, channels: int, stride: int) -> nn.Sequential:
    """`blocks` blocks of `channels` channels; the first one takes the stride and the change of channels."""
    rest = (BasicBlock(channels, channels, stride=1) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(channels_in, channels, stride), *rest)


def build(name: str, classes: int, channels: int, image_size: int) -> nn.Module:
    """A new network, float32 on the CPU, channels last (5 to 15 % faster), initialized from torch's global generator.

    Args:
        name: one of CIFAR_BLOCKS, AIRBENCH or IMAGENET_FAMILY.
        classes: K, the number of logits.
        channels: C of the images.
        image_size: H and W of the training images; under SMALL_IMAGE the ImageNet family gets the small stem.

    Returns:
        A module from images [B, C, H, W] to logits [B, K].
    """
    if name in CIFAR_BLOCKS:
        return _channels_last(CifarResNet(CIFAR_BLOCKS[name], classes, channels))
    if name in AIRBENCH:
        return _channels_last(AirbenchNet(AIRBENCH[name], classes, channels))
    if name not in IMAGENET_FAMILY:
        raise ValueError(f"no model {name}; one of {', '.join((*CIFAR_BLOCKS, *AIRBENCH, *IMAGENET_FAMILY))}")
    model: Any = getattr(imagenet_family(), name)(num_classes=classes)
    if image_size < SMALL_IMAGE:
        model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
    elif channels != 3:
        model.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
    return _channels_last(model)


def blocks(network: nn.Module) -> list[nn.Module]:
    """The residual blocks of a network of the CIFAR or the ImageNet family, in order."""
    stages = (
        getattr(network, name, ()) for name in ("stage1", "stage2", "stage3", "layer1", "layer2", "layer3", "layer4")
    )
    return [block for stage in stages for block in stage]


def pieces(network: Any) -> list[Piece]:
    """Stem, residual blocks and classifier of a network of either family, for a pipeline."""
    if isinstance(network, CifarResNet):
        stem = Piece(lambda _, batch: F.relu(network.bn1(network.conv1(batch["images"]))), network.conv1, network.bn1)
        head = Piece(lambda x_BCHW, _: network.fc(x_BCHW.mean(dim=(2, 3))), network.fc)
    else:
        before = nn.Sequential(network.conv1, network.bn1, network.relu, network.maxpool)
        stem = Piece(lambda _, batch: before(batch["images"]), before)
        head = Piece(lambda x_BCHW, _: network.fc(torch.flatten(network.avgpool(x_BCHW), 1)), network.fc)
    return [stem, *(Piece(lambda x_BCHW, _, of=block: of(x_BCHW), block) for block in blocks(network)), head]  # type: ignore[misc]


def _channels_last(network: nn.Module) -> nn.Module:
    # Convolutions take the layout of their weights, whatever that of the images.
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]
