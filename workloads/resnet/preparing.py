"""Image sets as tables of encoded images (see prepared.py): any kind of data, mixed once, every image looked at."""

import functools
import hashlib
import io
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.errors import DataError, UserError
from orchestrator.shards import derive_seed, sample_order
from orchestrator.storage import encoded
from orchestrator.tables import Table
from workloads.preparation import Made, Part, changed
from workloads.resnet import data
from workloads.resnet.config import ResnetConfig
from workloads.resnet.folder import decode, printable, read
from workloads.resnet.readers import ImageSet, Split

MIXING_SEED = derive_seed("prepare")
SPLITS: tuple[Split, ...] = ("train", "heldout")


@functools.lru_cache(maxsize=4)
def _open(config: ResnetConfig, split: Split) -> ImageSet:
    return data.open_split(config, split)


@dataclass(frozen=True)
class ImagePreparation:
    """The Preparation of images."""

    config: ResnetConfig
    compression: str = "none"  # images are compressed already

    def parts(self, file_bytes: int) -> Sequence[Part]:
        """See Preparation; the training split is mixed, so that the images of a file are no neighbours."""
        if self.config.data.startswith("parquet:"):
            raise UserError(f"--source {self.config.data}: is prepared already; give what it was prepared from")
        found: list[Part] = []
        for split in SPLITS:
            images = _open(self.config, split)
            with data.user_errors(self.config):
                try:
                    found += self._parts_of(split, images, file_bytes)
                except FileNotFoundError:
                    raise changed(self.config.data) from None
        return found

    @staticmethod
    def _parts_of(split: Split, images: ImageSet, file_bytes: int) -> Iterator[Part]:
        count = len(images)
        files = -(-count // max(1, min(count, int(file_bytes / _bytes_each(images)))))
        for start, stop in itertools.pairwise(count * n // files for n in range(files + 1)):
            order = sample_order(MIXING_SEED, 0, count, start, stop) if split == "train" else range(start, stop)
            samples = [int(i) for i in order]
            seen = _identity(images, samples)
            yield {"split": split, "of": _version(images, samples), "samples": samples, "seen": seen}

    def things(self) -> int:
        return sum(len(_open(self.config, split)) for split in SPLITS)

    def more(self) -> str:
        return "give more images that can be read"

    def make(self, part: Part) -> Made:
        """See Preparation; an image that cannot be decoded is left out and named."""
        import pyarrow as pa

        images, rows, broken = _open(self.config, part["split"]), [], []
        try:
            same = _identity(images, part["samples"]) == part["seen"]
        except (OSError, IndexError):
            same = False
        if not same:
            raise changed(self.config.data)
        for index in part["samples"]:
            try:
                encoded, name = _encoded(images, index, self.root)
            except DataError as error:
                broken.append(str(error))
                continue
            rows.append({"image": encoded, "label": int(images.labels[index]), "name": name})
        schema = pa.schema([("image", pa.binary()), ("label", pa.int32()), ("name", pa.string())])
        return Made({part["split"]: pa.Table.from_pylist(rows, schema)} if rows else {}, broken)

    @property
    def root(self) -> str:
        """Names are relative to it."""
        return self.config.data.partition(":")[2]

    def folded(self, sofar: None, notes: Mapping[str, Any]) -> None:
        """See Preparation: there are none."""

    def about(self, folded: None) -> dict[str, Any]:
        images = _open(self.config, "train")
        return {
            "kind": self.config.data.partition(":")[0],
            "class_names": list(images.class_names),
            "size": data.image_size(self.config, images),
        }

    def run_flags(self) -> list[str]:
        """See Preparation: none."""
        return []


def _version(images: ImageSet, samples: Sequence[int]) -> str:
    """Changes when these images do: by the times of files; by all else _identity does."""
    times = [os.stat(images.images[i]).st_mtime_ns for i in samples] if isinstance(images.images, list) else []
    return hashlib.sha256(np.asarray(times, np.int64).data).hexdigest()


def _identity(images: ImageSet, samples: Sequence[int]) -> str:
    """The same on every node that has these samples in these places: not by times, which differ from node to node."""
    assert not isinstance(images.images, Table)
    digest = hashlib.sha256(images.labels[samples].data)
    for index in samples:
        if isinstance(images.images, list):
            path = images.images[index]
            digest.update(f"{path}\0{os.stat(path).st_size}\n".encode("utf-8", "surrogateescape"))
        else:
            digest.update(np.ascontiguousarray(images.images[index]).data)
    return digest.hexdigest()


def _bytes_each(images: ImageSet) -> float:
    """Of an encoded image, on average, from a look at some."""
    if isinstance(images.images, list):
        some = images.images[:: max(1, len(images) // 1000)]
        return max(1.0, sum(os.stat(path).st_size for path in some) / len(some))
    some_at = range(0, len(images), max(1, len(images) // 100))
    return sum(len(_encoded(images, index, "")[0]) for index in some_at) / len(some_at)


def _encoded(images: ImageSet, index: int, root: str) -> tuple[bytes, str]:
    """(a file as it is, or pixels as PNG; its name); raises DataError where it cannot be decoded."""
    from PIL import Image

    if isinstance(images.images, list):
        path = images.images[index]
        try:
            raw = read(path)
        except OSError as error:
            raise DataError(f"{printable(path)} cannot be read ({error.strerror})") from None
        decode(raw, path)
        return raw, encoded(os.path.relpath(path, root)).decode()
    assert not isinstance(images.images, Table)
    pixels: Any = images.images[index]
    out = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(out, "PNG")
    return out.getvalue(), str(index)


def preparation(config: ResnetConfig) -> ImagePreparation:
    """For the registry."""
    return ImagePreparation(config)
