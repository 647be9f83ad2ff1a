"""The data of image classification: KIND or KIND:DIR, checked before any worker starts; no torch.

Kinds: digits (ships with scikit-learn), cifar10:DIR, fashion-mnist:DIR, imagefolder:DIR, parquet:URI (any of these,
prepared by orchestrator.prepare).
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.tables import Table, check_whole, read_manifest
from workloads.resnet import prepared
from workloads.resnet.config import ResnetConfig, last_size
from workloads.resnet.folder import check_headers, printable, read_image_folder, sizes
from workloads.resnet.readers import (
    ImageSet,
    Split,
    UnusableDataError,
    read_cifar10,
    read_digits,
    read_fashion_mnist,
)
from workloads.summary import DataSummary

SMALLEST_IMAGE, LARGEST_IMAGE = 8, 1024  # pixels; three halvings need 8, and memory bounds the other end


@dataclass(frozen=True)
class Kind:
    """What a kind of data needs and implies.

    Attributes:
        read: (folder, split) -> the images.
        augment: what --augment auto means.
        image_size: what --image-size 0 means, in pixels; 0: as the images are.
        mean, std: of the training pixels scaled to 0..1, per channel.
        words: how the data is described to people.
        decodes: whether the images are encoded, and decoded one by one.
        photos: whether they are of many sizes, so that the middle is cut out of a held-out one.
    """

    read: Callable[[Path, Split], ImageSet]
    augment: str
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    words: str
    decodes: bool = False
    photos: bool = False


KINDS = {
    # Mean and std of all pixels of the training split, over 255: numpy mean and std of open_split().images.
    # Fashion-MNIST: of its 60,000 published training images. A test recomputes those of digits.
    "digits": Kind(lambda _, split: read_digits(split), "none", 0, (0.3053,), (0.3762,), "grey"),
    "fashion-mnist": Kind(read_fashion_mnist, "crop-flip", 0, (0.2860,), (0.3530,), "grey"),
    # The published training set's: mean and std of each channel over its 50,000 images.
    "cifar10": Kind(read_cifar10, "crop-flip", 0, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), "colour"),
    # ImageNet's, as torchvision's published weights use them.
    "imagefolder": Kind(
        read_image_folder,
        "resized-crop-flip",
        224,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        "colour",
        decodes=True,
        photos=True,
    ),
}
WITHOUT_FOLDER = ("digits",)


def split_spec(data: str) -> tuple[str, str]:
    """KIND or KIND:DIR -> (kind, folder or ""); raises UserError."""
    name, _, folder = data.partition(":")
    allowed = "digits, cifar10:DIR, fashion-mnist:DIR, imagefolder:DIR, parquet:URI"
    if name not in KINDS and name != "parquet":
        raise UserError(printable(f"--data {data}: no such kind of data; choose from {allowed}"))
    if name in WITHOUT_FOLDER and data != name:
        raise UserError(printable(f"--data {data}: {name} takes no folder; write --data {name}"))
    if name not in WITHOUT_FOLDER and not folder.strip():
        raise UserError(printable(f"--data {data}: a folder is missing; write --data {name}:DIR"))
    return name, folder


def absolute_data(config: ResnetConfig) -> str:
    """The data setting with an absolute folder, to be used from any working directory."""
    name, folder = split_spec(config.data)
    if "://" in folder:
        return config.data
    return f"{name}:{_absolute(folder)}" if folder else name


def absolute_paths(config: RunConfig) -> RunConfig:
    """The same configuration with an absolute data folder; raises UserError for an unknown kind of data."""
    assert isinstance(config, ResnetConfig)
    return dataclasses.replace(config, data=absolute_data(config))


def kind(config: ResnetConfig) -> Kind:
    """The kind of data that the configuration names; raises UserError."""
    name, folder = split_spec(config.data)
    if name != "parquet":
        return KINDS[name]
    return dataclasses.replace(KINDS[_prepared(folder, config.storage_patience).kind], decodes=True)


@functools.lru_cache(maxsize=8)  # asked for in every corner
def _prepared(uri: str, patience_s: float) -> prepared.Prepared:
    return prepared.about(read_manifest(uri, "resnet", patience_s), KINDS)


def augment_name(config: ResnetConfig) -> str:
    """The augmentation, "auto" resolved."""
    return kind(config).augment if config.augment == "auto" else config.augment


def image_size(config: ResnetConfig, images: ImageSet) -> int:
    """Height and width that the network sees, in pixels, 0 resolved."""
    if isinstance(images.images, Table):
        return config.image_size or _prepared(split_spec(config.data)[1], config.storage_patience).size
    if config.image_size or isinstance(images.images, list):
        return config.image_size or kind(config).image_size
    return int(max(images.images.shape[1:3]))


def open_split(config: ResnetConfig, split: Split) -> ImageSet:
    """One split of the data; raises UserError with one line where it cannot be used."""
    name, folder = split_spec(config.data)
    if name == "parquet":
        return prepared.open_prepared(config, split, KINDS)
    with user_errors(config):
        if "://" in folder:
            raise UnusableDataError("is read from a folder, here or mounted; mount it, or prepare it where it is")
        path = Path(_absolute(folder))
        if folder and not path.exists():
            raise UnusableDataError(f"no folder {path}; give one that exists on every node")
        if folder and not path.is_dir():
            raise UnusableDataError(f"{path} is not a folder; give the folder that holds the data")
        return kind(config).read(path, split)


def check(config: RunConfig) -> DataSummary:
    """Read everything that training would; raises UserError with one line at the first thing that would fail.

    Image files are opened up to a bounded number (folder.HEADERS_CHECKED); everything else is read whole.
    """
    assert isinstance(config, ResnetConfig)
    name, folder = split_spec(config.data)
    if name == "parquet":
        check_whole(folder, "resnet", config)
    splits = [open_split(config, "train"), open_split(config, "heldout")]
    train, heldout = splits
    found = fingerprint(config, splits)
    with user_errors(config):
        for images in splits:
            if isinstance(images.images, list):
                check_headers(images.images)
        if _shape(train) != _shape(heldout):
            raise UnusableDataError(f"train images are {_shape(train)}, held-out ones {_shape(heldout)}; use one size")
    size = image_size(config, train)
    if not SMALLEST_IMAGE <= size <= LARGEST_IMAGE:
        allowed = f"use {SMALLEST_IMAGE} to {LARGEST_IMAGE}, or 0 for the data's own size"
        raise UserError(f"--image-size {config.image_size}: images of {size} pixels; {allowed}")
    _check_microbatch(config, size, len(train))
    counts = f"{len(train):,} + {len(heldout):,}"
    files = "images" if isinstance(train.images, np.ndarray) else "image files"
    words = f"{kind(config).words} {files} {size}x{size}, {len(train.class_names)} classes"
    blocks = tuple(train.images.order.sizes) if isinstance(train.images, Table) else ()
    described = f"{config.data.partition(':')[0]}: {counts} {words}"
    return DataSummary(len(train), len(heldout), described, found, blocks)


def _check_microbatch(config: ResnetConfig, size: int, train_samples: int) -> None:
    """Batch normalization in training needs two values per channel: of one image, a last stage above 1x1."""
    last = last_size(config.model, size)
    if not last:
        raise UserError(f"--model {config.model}: images of {size} pixels are too small for it; give --image-size 9")
    if last == 1 and min(config.batch_size // config.shards, train_samples) == 1:
        raise UserError(
            f"--batch-size {config.batch_size}: 1 image per shard leaves {config.model} nothing to "
            f"normalize over at {size} pixels; use at least {2 * config.shards}"
        )


def _shape(images: ImageSet) -> str:
    return "files" if not isinstance(images.images, np.ndarray) else "x".join(str(n) for n in images.images.shape[1:])


def fingerprint(config: ResnetConfig, splits: Sequence[ImageSet]) -> str:
    """SHA-256 over pixels and labels; of image files over their names, sizes in bytes and labels. Raises UserError."""
    with user_errors(config):
        return _fingerprint(splits)


def _fingerprint(splits: Sequence[ImageSet]) -> str:
    digest = hashlib.sha256()
    for images in splits:
        if isinstance(images.images, Table):
            return images.images.fingerprint
        if isinstance(images.images, list):
            root = os.path.commonpath(images.images)
            for path, file_bytes in zip(images.images, sizes(images.images), strict=True):
                digest.update(f"{os.path.relpath(path, root)}\0{file_bytes}\n".encode("utf-8", "surrogateescape"))
        else:
            digest.update(str(images.images.shape).encode())
            digest.update(np.ascontiguousarray(images.images).data)
        digest.update(images.labels.data)
        digest.update("\0".join(images.class_names).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _absolute(folder: str) -> str:
    return os.path.abspath(os.path.expanduser(folder)) if folder else ""


@contextmanager
def user_errors(config: ResnetConfig) -> Iterator[None]:
    """What the readers raise, as a UserError that names the flag."""
    try:
        yield
    except UnusableDataError as error:
        raise UserError(printable(f"--data {config.data}: {error}")) from None
    except OSError as error:
        where, reason = error.filename or config.data, error.strerror or str(error)
        advice = "make it readable for the user who runs the workers"
        raise UserError(printable(f"--data {config.data}: {where} cannot be read ({reason}); {advice}")) from None
