"""Builders of small data sets in the published formats."""

import gzip
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def cifar10(tmp_path):
    """cifar10(rows) -> a cifar-10-batches-py folder with so many images per batch."""

    def write(rows=4, protocol=2, key=str.encode, labels=None):
        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir(exist_ok=True)
        random = np.random.default_rng(0)
        for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
            batch = {
                key("batch_label"): name.encode(),
                key("labels"): labels if labels is not None else [(number + i) % 10 for i in range(rows)],
                key("data"): random.integers(0, 256, (rows, 3072), dtype=np.uint8),
                key("filenames"): [b"x.png"] * rows,
            }
            (folder / name).write_bytes(pickle.dumps(batch, protocol))
        names = [f"class {n}".encode() for n in range(10)]
        meta = {key("label_names"): names, key("num_vis"): 3072}
        (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol))
        return folder

    return write


@pytest.fixture
def idx(tmp_path):
    """idx(suffix) -> a folder with the four IDX files, plain or .gz."""

    def write(suffix="", size=28, rows=6):
        random = np.random.default_rng(1)
        for stem, count in (("train", 2 * rows), ("t10k", rows)):
            images = random.integers(0, 256, (count, size, size), dtype=np.uint8)
            labels = np.arange(count, dtype=np.uint8) % 10
            parts = {
                f"{stem}-images-idx3-ubyte": struct.pack(">4I", 0x803, count, size, size) + images.tobytes(),
                f"{stem}-labels-idx1-ubyte": struct.pack(">2I", 0x801, count) + labels.tobytes(),
            }
            for name, content in parts.items():
                content = gzip.compress(content) if suffix else content
                (tmp_path / (name + suffix)).write_bytes(content)
        return tmp_path

    return write


@pytest.fixture
def image_folder(tmp_path):
    """image_folder(extension) -> DIR/{train,val}/{cat,dog} with images of differing sizes and modes."""

    def write(extension="jpg", train=3, val=2):
        random = np.random.default_rng(2)
        for part, count in (("train", train), ("val", val)):
            for name in ("cat", "dog"):
                folder = tmp_path / part / name
                folder.mkdir(parents=True)
                for n in range(count):
                    pixels = random.integers(0, 256, (60 + 7 * n, 90 - 5 * n, 3), dtype=np.uint8)
                    image = Image.fromarray(pixels)
                    (image.convert("L") if n == 1 else image).save(folder / f"{n}.{extension}")
        return tmp_path

    return write
