"""Images in the Parquet files of orchestrator.prepare: columns image (encoded), label and name; no torch.

The manifest's `about` says how the source's kind normalizes, augments and sizes its images, so that training from
prepared data is training from the source, in another order.
"""

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import UserError
from orchestrator.tables import Manifest, Table, read_manifest
from workloads.resnet.config import ResnetConfig
from workloads.resnet.readers import ImageSet, Split

PREFIX = "parquet:"
COLUMNS = ("image", "label", "name")


@dataclass(frozen=True)
class Prepared:
    """What the manifest says about the images.

    Attributes:
        kind: of the data in the source.
        class_names: in the order of their labels.
        size: pixels that the network sees with --image-size 0.
    """

    kind: str
    class_names: tuple[str, ...]
    size: int


def about(manifest: Manifest, kinds: Container[str]) -> Prepared:
    """Raises UserError where the manifest lacks something, or has something else in its place."""
    given: list[Any] = [manifest.about.get(name) for name in ("kind", "class_names", "size")]
    kind, names, size = given
    good = isinstance(kind, str) and kind in kinds and type(size) is int and size > 0
    if not (good and isinstance(names, list) and len(names) > 1 and all(isinstance(name, str) for name in names)):
        raise UserError("--data parquet: its manifest does not describe images; prepare the data again")
    return Prepared(kind, tuple(names), size)


def open_prepared(config: ResnetConfig, split: Split, kinds: Container[str]) -> ImageSet:
    """One split of the prepared images."""
    uri = config.data.removeprefix(PREFIX)
    manifest = read_manifest(uri, "resnet", config.storage_patience)  # by then `check` has found it there
    table = Table(uri, manifest, split, config)
    return ImageSet(table, np.empty(0, np.int64), about(manifest, kinds).class_names)


def rows(table: Table, indices: NDArray[np.int64]) -> list[tuple[bytes, int, str]]:
    """(encoded image, label, name) of each sample; raises DataError naming a file that cannot be used."""
    found = table.rows(indices, COLUMNS)
    return list(zip(*(found[name].to_pylist() for name in COLUMNS), strict=True))
