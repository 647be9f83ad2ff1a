"""A small convolutional network that is made to be trained in seconds.

Jordan 2024: 94 % on CIFAR-10 in 3.29 Seconds on a Single GPU, arXiv:2404.00498, section 3; his code is
github.com/KellerJordan/cifar10-airbench, airbench94.py. Taken from there: the frozen whitening layer, the identity
at the start of every convolution, normalization without a scale, GELU, max pooling, the scale of the logits. Not taken:
the larger learning rate of the normalizations' biases, freezing the whitening's bias after three epochs, Lookahead,
copies of an image at the test.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 2  # pixels, height and width of what the first layer looks at
WHITENING_IMAGES = 5000  # as many as airbench94.py takes
EPSILON = 5e-4  # added to the variances, likewise
LOGIT_SCALE = 1 / 9  # likewise

# B = microbatch, C = channels, H, W = height and width, K = classes, N = patches, P = values of a patch


class Block(nn.Module):
    """Two 3x3 convolutions, the first pooled 2x2, each normalized with a bias but no scale."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.bn1 = _norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = _norm(channels)
        for conv in (self.conv1, self.conv2):
            nn.init.dirac_(conv.weight.data[: conv.in_channels])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = F.gelu(self.bn1(F.max_pool2d(self.conv1(x_BCHW), 2)))
        return F.gelu(self.bn2(self.conv2(x_BCHW)))


class AirbenchNet(nn.Module):
    """Whitened 2x2 patches, three blocks, the largest value of each channel, a linear layer.

    Args:
        widths: channels of the three blocks.
        classes: K.
        channels: C of the images.
    """

    def __init__(self, widths: tuple[int, int, int], classes: int, channels: int) -> None:
        super().__init__()
        patch = channels * PATCH * PATCH
        self.whiten = nn.Conv2d(channels, 2 * patch, PATCH)
        self.whiten.weight.requires_grad = False
        nn.init.zeros_(self.whiten.bias)  # type: ignore[arg-type]
        steps = zip((2 * patch, *widths), widths, strict=False)
        self.blocks = nn.Sequential(*(Block(before, width) for before, width in steps))
        self.fc = nn.Linear(widths[-1], classes, bias=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x_BCHW = self.blocks(F.gelu(self.whiten(images_BCHW)))
        logits_BK: Tensor = self.fc(x_BCHW.amax(dim=(2, 3)))
        return logits_BK * LOGIT_SCALE

    @torch.no_grad()
    def whiten_by(self, batches: Iterable[Tensor]) -> None:
        """Set the first layer from training images, normalized: second moments of what comes out are 1, then negated.

        Eigenvectors are computed in fp64 and rounded, so that machines that compute sums differently agree.

        Args:
            batches: of images [B, C, H, W]; only one is held at a time.
        """
        patch, count = self.whiten.weight[0].numel(), 0
        moments_PP = torch.zeros(patch, patch, dtype=torch.float64)
        for images_BCHW in batches:
            patches_NP = F.unfold(images_BCHW.double(), PATCH).transpose(1, 2).flatten(0, 1)
            moments_PP += patches_NP.T @ patches_NP
            count += len(patches_NP)
        variances_P, vectors_PP = torch.linalg.eigh(moments_PP / count)
        rows = (vectors_PP / (variances_P.clamp(min=0) + EPSILON).sqrt()).T.flip(0)
        first = rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()  # an eigenvector's sign is chance
        filters = (rows * first).round(decimals=4).reshape(-1, *self.whiten.weight.shape[1:])
        self.whiten.weight.copy_(torch.cat([filters, -filters]))


def _norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, momentum=0.4)  # 1 - 0.6 there: a short run has few steps to average over
    norm.weight.requires_grad = False
    return norm
