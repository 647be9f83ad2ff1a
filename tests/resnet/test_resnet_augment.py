"""Augmentation and microbatches: every sample a pure function of (seed, epoch, its index)."""

import functools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preparing import do, job

from orchestrator.errors import DataError
from orchestrator.feed import batches
from orchestrator.plan import Request
from workloads.resnet import data
from workloads.resnet.augment import Augmentation, normalize
from workloads.resnet.config import ResnetConfig
from workloads.resnet.workload import ImageSamples, ResnetWorkload

SMALL = ("none", "shift", "crop-flip", "resized-crop-flip")


@functools.cache
def digits(augment, image_size=0, seed=0):
    return ResnetWorkload(ResnetConfig(augment=augment, image_size=image_size, seed=seed)).samples("train")


def images(samples, indices, epoch=0):
    return samples.microbatch(np.asarray(indices, dtype=np.int64), epoch)["images"]


@settings(max_examples=60, deadline=None)
@given(
    augment=st.sampled_from(SMALL),
    image_size=st.sampled_from([0, 8, 12]),
    epoch=st.integers(0, 5),
    indices=st.lists(st.integers(0, 1436), min_size=2, max_size=9, unique=True),
    state=st.integers(0, 2**32),
)
def test_a_sample_is_the_same_alone_and_in_any_microbatch(augment, image_size, epoch, indices, state):
    samples = digits(augment, image_size)
    together = images(samples, indices, epoch)
    torch.manual_seed(state)  # whatever was drawn before
    for place, index in reversed(list(enumerate(indices))):
        assert torch.equal(images(samples, [index], epoch)[0], together[place])


@pytest.mark.parametrize("augment", ["shift", "crop-flip", "resized-crop-flip"])
def test_epochs_indices_and_seeds_differ(augment):
    many = list(range(40))
    first = images(digits(augment), many, epoch=0)
    assert not torch.equal(first, images(digits(augment), many, epoch=1))
    assert not torch.equal(first, images(digits(augment, seed=1), many, epoch=0))
    one = Augmentation(augment, 8)
    padded = one.pad(torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8))
    assert len({one(padded, 0, 0, index).numpy().tobytes() for index in range(40)}) > 5


def test_shift_moves_by_up_to_an_eighth_and_mirrors_nothing():
    shift = Augmentation("shift", 8)
    image = torch.arange(1, 65, dtype=torch.uint8).reshape(1, 8, 8)
    seen = {shift(shift.pad(image), 0, 0, index).numpy().tobytes() for index in range(200)}
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    expected = {padded[:, y : y + 8, x : x + 8].numpy().tobytes() for y in range(3) for x in range(3)}
    assert seen == expected


def test_crop_flip_also_mirrors():
    augmentation = Augmentation("crop-flip", 8)
    image = torch.arange(1, 65, dtype=torch.uint8).reshape(1, 8, 8)
    seen = {augmentation(augmentation.pad(image), 0, 0, index).numpy().tobytes() for index in range(400)}
    assert len(seen) == 18
    assert image.flip(-1).numpy().tobytes() in seen


def test_none_and_heldout_are_the_images_themselves():
    workload = ResnetWorkload(ResnetConfig())
    opened = data.open_split(workload.config, "heldout")
    kind = data.KINDS["digits"]
    expected = (opened.images[:7, :, :, 0] / 255.0 - kind.mean[0]) / kind.std[0]
    for augment in SMALL:  # the held-out split is never augmented
        heldout = ImageSamples(opened, "heldout", ResnetConfig(augment=augment))
        found = images(heldout, range(7))[:, 0].numpy()
        assert np.allclose(found, expected, atol=1e-5)
    assert torch.equal(images(digits("auto"), range(5), epoch=0), images(digits("auto"), range(5), epoch=3))


def test_augment_auto_by_kind():
    kinds = {"digits": "none", "cifar10:x": "crop-flip", "imagefolder:x": "resized-crop-flip"}
    for spec, augment in kinds.items():
        assert data.augment_name(ResnetConfig(data=spec)) == augment
        assert data.augment_name(ResnetConfig(data=spec, augment="shift")) == "shift"
    with pytest.raises(ValueError, match="no augmentation"):
        Augmentation("auto", 8)


def test_normalize_gives_mean_0_and_std_1():
    pixels = torch.randint(0, 256, (50, 3, 9, 9), dtype=torch.uint8)
    scaled = pixels.double() / 255
    mean, std = scaled.mean(dim=(0, 2, 3)), scaled.std(dim=(0, 2, 3), correction=0)
    normal = normalize(pixels, mean.tolist(), std.tolist())
    assert normal.dtype == torch.float32
    assert torch.allclose(normal.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(normal.std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-5)


def test_cifar10_and_fashion_microbatches(cifar10, idx):
    for spec, shape in ((f"cifar10:{cifar10()}", (3, 32, 32)), (f"fashion-mnist:{idx()}", (1, 28, 28))):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            batch = ResnetWorkload(ResnetConfig(data=spec)).samples("train").microbatch(np.arange(5), 2)
        assert batch["images"].shape == (5, *shape)
        assert batch["images"].dtype == torch.float32
        assert batch["labels"].dtype == torch.int64


@pytest.mark.parametrize("augment", ["auto", "crop-flip", "none"])
def test_image_folder_microbatches(image_folder, augment):
    settings = ResnetConfig(data=f"imagefolder:{image_folder()}", image_size=48, augment=augment)
    workload = ResnetWorkload(settings)
    for split in ("train", "heldout"):
        samples = workload.samples(split)
        batch = samples.microbatch(np.array([3, 0, 1]), 1)
        assert batch["images"].shape == (3, 3, 48, 48)
        assert torch.equal(images(samples, [0], 1)[0], batch["images"][1])
    assert batch["labels"].tolist() == [1, 0, 0]


def test_a_truncated_image_ends_training_with_its_name(image_folder):
    path = image_folder() / "train" / "cat" / "1.jpg"
    path.write_bytes(path.read_bytes()[:-500])
    samples = ResnetWorkload(ResnetConfig(data=f"imagefolder:{path.parents[2]}")).samples("train")
    with pytest.raises(DataError, match=r"cat/1\.jpg"):
        samples.microbatch(np.arange(3), 0)


@pytest.mark.parametrize("source", ["digits", "imagefolder", "parquet"])
def test_loader_processes_give_the_same_bits(source, image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    spec = source if source == "digits" else f"imagefolder:{image_folder()}"
    if source == "parquet":
        do(job("resnet", spec, tmp_path / "out"))
        spec = f"parquet:{tmp_path / 'out'}"
    augment = "crop-flip" if source == "digits" else "resized-crop-flip"
    samples = ResnetWorkload(ResnetConfig(data=spec, augment=augment, image_size=32)).samples("train")
    requests = [Request(epoch, np.array([epoch % 3, 4, 1])) for epoch in range(6)]
    for processes in (1, 3):
        read = batches(samples, requests, processes, torch.device("cpu"))
        for request, (_, batch) in zip(requests, read, strict=True):
            here = samples.microbatch(request.indices, request.epoch)
            assert torch.equal(batch["images"], here["images"])
            assert torch.equal(batch["labels"], here["labels"])
