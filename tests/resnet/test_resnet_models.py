"""The networks: sizes as published, shapes, stems, initialization, and gradients that repeat bit by bit."""

import math

import pytest
import torch

from workloads.resnet.config import AIRBENCH, CIFAR_BLOCKS, IMAGENET_FAMILY, SMALL_IMAGE, last_size
from workloads.resnet.models import BasicBlock, build


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet20", 0.27), ("resnet32", 0.46), ("resnet56", 0.85)]
)  # He et al. 2015, table 6
def test_cifar_family_has_the_published_sizes(name, millions):
    model = build(name, classes=10, channels=3, image_size=32)
    assert round(parameters(model) / 1e6, 2) == pytest.approx(millions, abs=0.011)
    layers = sum(isinstance(m, torch.nn.Conv2d | torch.nn.Linear) for m in model.modules())
    assert layers == int(name.removeprefix("resnet"))


def test_imagenet_family_has_the_published_sizes():
    # The "Num. of params" that torchvision publishes with its weights.
    assert parameters(build("resnet18", 1000, 3, 224)) == 11_689_512
    assert parameters(build("resnet50", 1000, 3, 224)) == 25_557_032


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "resnet18", "airbench-small"])
@pytest.mark.parametrize(("channels", "size"), [(1, 9), (1, 28), (3, 32)])
def test_output_shape(name, channels, size):
    model = build(name, classes=7, channels=channels, image_size=size)
    assert model(torch.zeros(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize(("size", "kernel"), [(32, 3), (SMALL_IMAGE - 1, 3), (SMALL_IMAGE, 7), (224, 7)])
def test_stem_by_image_size(size, kernel):
    model = build("resnet18", classes=5, channels=1, image_size=size)
    assert model.conv1.kernel_size == (kernel, kernel)
    assert isinstance(model.maxpool, torch.nn.Identity) == (kernel == 3)
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 5)


@pytest.mark.parametrize("size", [8, 9, 28, 32, 64, 65])
@pytest.mark.parametrize("name", ["resnet8", "resnet18", "airbench-small"])
def test_the_last_size_is_what_the_network_ends_with(name, size):
    model = build(name, classes=2, channels=1, image_size=size).eval()
    seen = []
    last = {"resnet8": "stage3", "resnet18": "layer4", "airbench-small": "blocks"}[name]
    getattr(model, last).register_forward_hook(lambda module, args, out: seen.append(out.shape[-1]))
    if last_size(name, size):
        model(torch.zeros(1, 1, size, size))
    assert seen == ([last_size(name, size)] if (name, size) != ("airbench-small", 8) else [])


def test_shortcut_keeps_every_second_pixel_and_adds_zero_channels():
    block = BasicBlock(2, 4, stride=2)
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    out = block.shortcut(x)
    assert out.shape == (1, 4, 2, 2)
    assert torch.equal(out[:, :2], x[:, :, ::2, ::2])
    assert not out[:, 2:].any()


def test_initial_weights_come_from_the_global_generator_and_are_kaiming():
    for name in ("resnet20", "resnet18"):
        torch.manual_seed(5)
        first = build(name, 10, 3, 32)
        torch.manual_seed(5)
        second = build(name, 10, 3, 32)
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    wide = build("resnet20", 10, 3, 32).stage3[1].conv1.weight
    assert wide.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.02)


def test_unknown_model():
    with pytest.raises(ValueError, match="resnet8, resnet20"):
        build("resnet9", 10, 3, 32)


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "airbench"])
def test_gradients_repeat_bit_by_bit_with_deterministic_algorithms(name):
    torch.use_deterministic_algorithms(True)
    try:
        model = build(name, 10, 1, 8)
        x = torch.randn(4, 1, 9, 9)
        grads = []
        for _ in range(2):
            model.zero_grad()
            model(x).logsumexp(1).sum().backward()
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
        assert torch.equal(*grads)
    finally:
        torch.use_deterministic_algorithms(False)


def test_families_do_not_overlap():
    assert len({*CIFAR_BLOCKS, *AIRBENCH, *IMAGENET_FAMILY}) == len(CIFAR_BLOCKS) + len(AIRBENCH) + len(IMAGENET_FAMILY)


def test_airbench_whitens_patches_and_starts_as_the_identity():
    """Covariance of what the frozen layer gives is the identity, then its negative; of correlated images."""
    torch.manual_seed(0)
    images = torch.nn.functional.avg_pool2d(torch.randn(200, 3, 24, 24), 5, 1) * 4
    model = build("airbench-small", 10, 3, 20)
    model.whiten_by([images])
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["whiten.weight", *(f"blocks.{i}.bn{j}.weight" for i in range(3) for j in (1, 2))]
    white = model.whiten(images).detach().transpose(0, 1).flatten(1).double()
    covariance = white @ white.T / white.shape[1]
    assert torch.allclose(covariance[:12, :12], torch.eye(12).double(), atol=0.03)  # EPSILON
    assert torch.equal(white[:12], -white[12:])
    block = model.blocks[0]
    x = torch.randn(2, 24, 6, 6)
    assert torch.allclose(block.conv1(x)[:, :16], x[:, :16])
    assert torch.allclose(block.conv2(x[:, :16]), x[:, :16])


@pytest.mark.parametrize("part", [1, 7, 50])
def test_whitening_does_not_depend_on_the_order_of_sums(part):
    torch.manual_seed(0)
    images = torch.nn.functional.avg_pool2d(torch.randn(50, 3, 24, 24), 5, 1) * 4
    whole, parts, other = (build("airbench-small", 10, 3, 20) for _ in range(3))
    whole.whiten_by([images])
    parts.whiten_by(images.split(part))
    other.whiten_by([images[:25]])
    assert torch.equal(whole.whiten.weight, parts.whiten.weight)
    assert not torch.equal(whole.whiten.weight, other.whiten.weight)
