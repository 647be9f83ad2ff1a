"""Readers of image sets that fit in memory, each in its published format; no torch, no network.

Every reader returns an `ImageSet` or raises `UnusableDataError`: what is wrong and what to do, in one line.
"""

import gzip
import importlib.util
import io
import pickle
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from orchestrator.tables import Table

Split = Literal["train", "heldout"]

# N = images, H, W = height and width, C = channels
IMAGE_MAGIC, LABEL_MAGIC = 0x803, 0x801  # IDX: two zero bytes, 8 = unsigned bytes, number of dimensions
FASHION_CLASSES = (  # Xiao et al. 2017, arXiv:1708.07747, table 2
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
CIFAR_SHAPE = (3, 32, 32)  # one row of a batch: 1,024 red, then 1,024 green, then 1,024 blue bytes
CIFAR_BATCHES = {"train": [f"data_batch_{n}" for n in range(1, 6)], "heldout": ["test_batch"]}
DIGITS_HELDOUT = 5  # every fifth sample is held out: 0, 5, 10, ... are 360 of 1,797
CHUNK_BYTES = 1 << 20


class UnusableDataError(ValueError):
    """The data cannot be used; the text says what is wrong with which file and what to do."""


@dataclass(frozen=True)
class ImageSet:
    """One split.

    Attributes:
        images: uint8 [N, H, W, C], or the N paths of image files, or a table of N encoded images (columns image,
            label, name; see prepared.py).
        labels: int64 [N], 0..classes-1; with a table none, for they lie in it.
        class_names: one name per class.
    """

    images: NDArray[np.uint8] | list[str] | Table
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


def read_digits(split: Split) -> ImageSet:
    """The 1,797 grey 8x8 digits that scikit-learn ships (UCI Optical Recognition of Handwritten Digits).

    The file is read directly: importing sklearn costs more than a second.
    """
    table = _digits_table()
    # Published values are 0..16.
    images_NHWC = np.round(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = table[:, -1].astype(np.int64)
    heldout = np.arange(len(table)) % DIGITS_HELDOUT == 0
    chosen = heldout if split == "heldout" else ~heldout
    return ImageSet(images_NHWC[chosen], labels[chosen], tuple("0123456789"))


def _digits_table() -> NDArray[np.float64]:
    spec = importlib.util.find_spec("sklearn")
    if spec is None:
        raise UnusableDataError("scikit-learn, which carries the digits, is not installed; pip install scikit-learn")
    for folder in spec.submodule_search_locations or ():
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            return np.loadtxt(path, delimiter=",")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return np.column_stack([images, labels]).astype(np.float64)


def cifar10_folder(folder: Path) -> Path:
    """The folder with the batches: the given one, or the published folder name inside it."""
    inner = folder / "cifar-10-batches-py"
    return inner if inner.is_dir() else folder


def read_cifar10(folder: Path, split: Split) -> ImageSet:
    """CIFAR-10, the published "python version" (Krizhevsky 2009): pickled batches of [n, 3072] bytes."""
    folder = cifar10_folder(folder)
    wanted = [*CIFAR_BATCHES["train"], *CIFAR_BATCHES["heldout"], "batches.meta"]
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise UnusableDataError(f"{folder} lacks {', '.join(missing)}; give the unpacked cifar-10-batches-py folder")
    names = _cifar10_names(folder / "batches.meta")
    parts = [_cifar10_batch(folder / name, len(names)) for name in CIFAR_BATCHES[split]]
    rows = np.concatenate([images for images, _ in parts])
    images_NHWC = np.ascontiguousarray(rows.reshape(-1, *CIFAR_SHAPE).transpose(0, 2, 3, 1))
    return ImageSet(images_NHWC, np.concatenate([labels for _, labels in parts]), names)


def _cifar10_names(path: Path) -> tuple[str, ...]:
    names = _unpickle(path).get("label_names")
    if not (isinstance(names, list | tuple) and len(names) == 10 and all(isinstance(n, str | bytes) for n in names)):
        raise UnusableDataError(f"{path}: label_names is not a list of 10 names; download the archive again")
    return tuple(n.decode("utf-8", "replace") if isinstance(n, bytes) else n for n in names)


def _cifar10_batch(path: Path, classes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    batch = _unpickle(path)
    images, labels = batch.get("data"), batch.get("labels")
    row_bytes = int(np.prod(CIFAR_SHAPE))
    if not (
        isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim == 2 and len(images)
        and images.shape[1] == row_bytes
    ):  # fmt: skip
        raise UnusableDataError(f"{path}: data is not uint8 [n, {row_bytes}]; download the archive again")
    return images, _labels(path, labels, len(images), classes)


def _labels(path: Path, labels: Any, count: int, classes: int) -> NDArray[np.int64]:
    """`labels` as int64 [count], refused unless each is one of 0..classes-1."""
    try:
        array = np.asarray(labels)
    except ValueError:  # a ragged list
        array = np.empty(0)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UnusableDataError(f"{path}: the labels are not a list of whole numbers; download the data again")
    if len(array) != count:
        raise UnusableDataError(f"{path}: {len(array)} labels for {count} images; download the data again")
    if count and (array.min() < 0 or array.max() >= classes):
        raise UnusableDataError(f"{path}: labels outside 0..{classes - 1}; download the data again")
    return array.astype(np.int64)


def _array_globals() -> dict[tuple[str, str], Callable[..., Any]]:
    """What a pickle of plain values and numpy arrays names; made anew, so that no pickle alters it."""

    def latin1(text: str, encoding: str) -> bytes:
        """_codecs.encode as protocol 2 writes bytes with it, without the other codecs."""
        if encoding != "latin1":
            raise pickle.UnpicklingError(f"encoding {encoding}")
        return text.encode("latin1")

    def from_buffer(buffer: Any, dtype: Any, shape: Any, order: Any) -> NDArray[Any]:
        """What protocol 5 rebuilds arrays with (numpy._core.numeric._frombuffer)."""
        return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)

    from numpy._core.multiarray import _reconstruct, scalar

    allowed: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype, ("_codecs", "encode"): latin1,
    }  # fmt: skip
    for package in ("numpy.core", "numpy._core"):  # before and since numpy 2
        allowed[package + ".multiarray", "_reconstruct"] = _reconstruct
        allowed[package + ".multiarray", "scalar"] = scalar
        allowed[package + ".numeric", "_frombuffer"] = from_buffer
    return allowed


class ArrayUnpickler(pickle.Unpickler):
    """Loads data and nothing that runs: a pickle from the internet may name any function to be called."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        super().__init__(file, encoding="bytes")  # the published files were written by Python 2
        self._allowed = _array_globals()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no array needs")
        return self._allowed[module, name]


def _unpickle(path: Path) -> dict[str, Any]:
    """The dictionary in a CIFAR-10 file, keys as texts."""
    with path.open("rb") as file:
        try:
            content = ArrayUnpickler(file).load()
        except OSError:
            raise
        except Exception as error:  # a damaged or hostile pickle can raise anything
            reason = str(error) or type(error).__name__
            raise UnusableDataError(f"{path} is not a CIFAR-10 batch ({reason}); download the archive again") from None
    if not isinstance(content, dict):
        raise UnusableDataError(f"{path} is not a CIFAR-10 batch (no dictionary); download the archive again")
    return {k.decode("utf-8", "replace") if isinstance(k, bytes) else str(k): v for k, v in content.items()}


def read_fashion_mnist(folder: Path, split: Split) -> ImageSet:
    """Fashion-MNIST (or MNIST): IDX files, plain or .gz, as published with the papers."""
    stem = "train" if split == "train" else "t10k"
    images_path = _idx_path(folder, f"{stem}-images-idx3-ubyte")
    labels_path = _idx_path(folder, f"{stem}-labels-idx1-ubyte")
    images_NHW = _read_idx(images_path, IMAGE_MAGIC)
    if 0 in images_NHW.shape:
        raise UnusableDataError(f"{images_path} holds no images; download it again")
    labels = _labels(labels_path, _read_idx(labels_path, LABEL_MAGIC), len(images_NHW), len(FASHION_CLASSES))
    return ImageSet(images_NHW[..., None], labels, FASHION_CLASSES)


def _idx_path(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise UnusableDataError(f"{folder} lacks {name} (or {name}.gz); give the folder with the four IDX files")


def _read_idx(path: Path, magic: int) -> NDArray[np.uint8]:
    """An IDX file of unsigned bytes: magic and sizes as big-endian 32-bit numbers, then the values."""
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            found = int.from_bytes(file.read(4), "big")
            if found != magic:
                problem = f"{path}: magic number 0x{found:08x} where 0x{magic:08x} is due; download it again"
                raise UnusableDataError(problem)
            ndim = magic & 0xFF
            header = file.read(4 * ndim)
            if len(header) < 4 * ndim:
                raise EOFError
            shape = struct.unpack(f">{ndim}I", header)
            values = _read_exactly(file, path, shape)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UnusableDataError(f"{path} is truncated or damaged; download it again") from None
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


def _read_exactly(file: io.BufferedIOBase, path: Path, shape: Sequence[int]) -> bytes:
    """The values, in pieces: a damaged header must not ask for memory that the file does not fill."""
    wanted = 1
    for size in shape:
        wanted *= size
    values = bytearray()
    while len(values) <= wanted:
        piece = file.read(min(CHUNK_BYTES, wanted + 1 - len(values)))
        if not piece:
            break
        values += piece
    if len(values) != wanted:
        held = f"more than {wanted}" if len(values) > wanted else str(len(values))
        raise UnusableDataError(f"{path}: its header promises {wanted} values, it holds {held}; download it again")
    return bytes(values)
