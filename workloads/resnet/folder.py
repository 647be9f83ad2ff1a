"""Image files in one folder per class: DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg; Pillow, no torch."""

import io
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from orchestrator.errors import DataError, StorageError
from orchestrator.patience import mount_is_away, patiently
from orchestrator.storage import PATIENCE_S
from workloads.resnet.readers import ImageSet, Split, UnusableDataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
SPLIT_FOLDERS = {"train": "train", "heldout": "val"}
SIXTEEN_BITS = ("PPM", "PNG")  # formats of which Pillow opens, or once opened, 16-bit grey with 32 bits a pixel
BITS_PER_SAMPLE = 258  # a tag of TIFF 6.0
LONGEST = 8  # times the shorter side
HEADERS_CHECKED = 1000  # of each split, before a run: about a second from a local disk


def read_image_folder(folder: Path, split: Split) -> ImageSet:
    """The paths and labels of one split; classes are the folder names in order; hidden files are left out."""
    root = folder / SPLIT_FOLDERS[split]
    names = class_names(folder)
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found = sorted(_image_files(root / name))
        if not found:
            allowed = " ".join(EXTENSIONS)
            raise UnusableDataError(
                f"{root / name} holds no images ({allowed}; not in folders of its own); add some or remove the class"
            )
        paths += found
        labels += [label] * len(found)
    return ImageSet(paths, np.asarray(labels, dtype=np.int64), names)


def class_names(folder: Path) -> tuple[str, ...]:
    """The class folders, which train/ and val/ must agree on."""
    classes = {}
    for part in SPLIT_FOLDERS.values():
        root = folder / part
        if not root.is_dir():
            raise UnusableDataError(f"{folder} has no folder {part}; it needs train/CLASS/*.jpg and val/CLASS/*.jpg")
        classes[part] = {p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")}
    train, val = classes["train"], classes["val"]
    if train != val:
        here, there = ("train", "val") if train - val else ("val", "train")
        one = min(classes[here] - classes[there])
        raise UnusableDataError(
            f"class {one} is in {here}/ but not in {there}/ of {folder}; both need the same classes"
        )
    if len(train) < 2:
        raise UnusableDataError(f"{folder / 'train'} has {len(train)} class folders; classification needs at least 2")
    return tuple(sorted(train))


def _image_files(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".") and entry.is_file():
                yield entry.path


def sizes(paths: list[str]) -> list[int]:
    """Of all files, in bytes; refuses an empty one."""
    found = [os.stat(path).st_size for path in paths]
    if 0 in found:
        raise UnusableDataError(f"{paths[found.index(0)]} is empty; replace or remove it")
    return found


def check_headers(paths: list[str]) -> None:
    """Refuses an unreadable image among HEADERS_CHECKED that are spread evenly over the list, and so over classes."""
    stride = -(-len(paths) // HEADERS_CHECKED)
    for path in paths[::stride]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, of many pixels, with its source's lines
                Image.open(path).close()
        except PermissionError:
            raise
        except Image.DecompressionBombError:
            raise UnusableDataError(f"{path} has too many pixels; make it smaller or remove it") from None
        except Exception:  # Pillow lets through what its parsers meet, from SyntaxError to struct.error
            raise UnusableDataError(f"{path} is not an image that Pillow can open; replace or remove it") from None


def printable(name: str) -> str:
    """On one line and in UTF-8: what an odd file name has else is written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def read(path: str, patience_s: float = PATIENCE_S) -> bytes:
    """A file's bytes; raises OSError, and StorageError where the server of a mounted folder stays away for so long."""
    try:
        return patiently(Path(path).read_bytes, mount_is_away, patience_s, printable(path))
    except OSError as error:
        if not mount_is_away(error):
            raise
        told = f"{printable(path)} cannot be read for {patience_s:g} s ({error.strerror})"
        raise StorageError(f"{told}; look at the disk or server that has it") from error


def decode(source: str | bytes, name: str = "", mode: str = "RGB", patience_s: float = PATIENCE_S) -> Image.Image:
    """An image of a file or of encoded bytes; raises DataError naming it where it cannot be read or is truncated.

    A file whose server is away is asked for again for `patience_s`, then StorageError is raised.
    """
    named = printable(name or str(source))
    try:
        with Image.open(io.BytesIO(read(source, patience_s) if isinstance(source, str) else source)) as image:
            return _eight_bits(image, named).convert(mode)
    except (DataError, StorageError):
        raise
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise DataError(f"{named} has more than {most:,} pixels; make it smaller or remove it") from None
    except Exception as error:  # as above
        text = re.sub(r" <_io.BytesIO object at \w+>", "", str(error))
        reason = " ".join(text.split()) or type(error).__name__
        raise DataError(f"{named} cannot be decoded ({reason}); replace or remove it") from None


def without_ends(image: Image.Image) -> Image.Image:
    """The middle of a very long image: resizing its shorter side would make gigabytes of what is cut off after it."""
    width, height = image.size
    most = LONGEST * min(width, height)
    if max(width, height) <= most:
        return image
    left, above = max(0, width - most) // 2, max(0, height - most) // 2
    return image.crop((left, above, left + min(width, most), above + min(height, most)))


def _eight_bits(image: Image.Image, named: str) -> Image.Image:
    """A 16-bit grey image in 8 bits, by their upper half; Pillow's own conversion cuts off at 255.

    Pillow opens those of two formats with 32 bits a pixel, and TIFFs with 12 as if they had 16. What really has 32
    bits has no known white.
    """
    if image.mode[0] not in "IF":
        return image
    pixels = np.asarray(image)
    if image.mode == "F" or (image.mode == "I" and image.format not in SIXTEEN_BITS):
        raise DataError(f"{named} has 32-bit pixels; save it with 8 or 16 bits")
    bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]
    return Image.fromarray((pixels.astype(np.uint16) >> (bits - 8)).astype(np.uint8))
