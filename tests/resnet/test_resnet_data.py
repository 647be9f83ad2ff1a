"""The readers on small files in the published formats, and every way in which data is refused."""

import dataclasses
import gzip
import os
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest

from orchestrator.errors import UserError
from workloads.resnet import data, readers
from workloads.resnet.config import ResnetConfig


def config(spec, **settings):
    return ResnetConfig(data=str(spec), **settings)


def refusal(spec, **settings):
    """The one line that the data is refused with."""
    with pytest.raises(UserError) as caught:
        data.check(config(spec, **settings))
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("--")
    assert ";" in text  # what to do
    return text


def test_config_and_data_import_no_torch():
    code = (
        "import sys, workloads.resnet.config, workloads.resnet.data as d;"
        "d.check(workloads.resnet.config.ResnetConfig());"
        "print([m for m in ('torch', 'sklearn', 'ray', 'torchvision') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_digits():
    summary = data.check(config("digits"))
    assert (summary.train_samples, summary.heldout_samples) == (1437, 360)
    assert summary.description == "digits: 1,437 + 360 grey images 8x8, 10 classes"
    train = data.open_split(config("digits"), "train")
    heldout = data.open_split(config("digits"), "heldout")
    assert train.images.shape == (1437, 8, 8, 1)
    assert heldout.images.shape == (360, 8, 8, 1)
    assert train.images.dtype == np.uint8
    assert train.images.max() == 255
    assert sorted(set(heldout.labels)) == list(range(10))
    kind = data.KINDS["digits"]
    assert train.images.mean() / 255 == pytest.approx(kind.mean[0], abs=1e-4)
    assert train.images.std() / 255 == pytest.approx(kind.std[0], abs=1e-4)


def test_digits_without_the_file_come_from_load_digits(monkeypatch):
    directly = readers.read_digits("train")
    monkeypatch.setattr(readers.Path, "is_file", lambda self: False)
    loaded = readers.read_digits("train")
    assert np.array_equal(directly.images, loaded.images)
    assert np.array_equal(directly.labels, loaded.labels)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("key", [str.encode, str])
def test_cifar10(cifar10, protocol, key):
    folder = cifar10(rows=4, protocol=protocol, key=key)
    summary = data.check(config(f"cifar10:{folder}"))
    assert (summary.train_samples, summary.heldout_samples) == (20, 4)
    assert summary == data.check(config(f"cifar10:{folder.parent}"))
    train = data.open_split(config(f"cifar10:{folder}"), "train")
    assert train.images.shape == (20, 32, 32, 3)
    assert train.class_names[3] == "class 3"
    row = pickle.loads((folder / "data_batch_2").read_bytes())[key("data")][1]
    for channel in range(3):  # the published layout: a plane of each colour
        plane = row[1024 * channel : 1024 * (channel + 1)].reshape(32, 32)
        assert np.array_equal(train.images[5, :, :, channel], plane)


def test_cifar10_labels_may_be_numpy_numbers(cifar10):
    folder = cifar10(rows=2, labels=[np.int64(3), np.int64(9)])
    assert list(data.open_split(config(f"cifar10:{folder}"), "heldout").labels) == [3, 9]


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_pickle_that_calls_functions_is_refused_and_calls_nothing(cifar10, tmp_path):
    folder = cifar10()
    batch = pickle.loads((folder / "data_batch_3").read_bytes())
    batch[b"extra"] = Hostile(tmp_path / "called")
    (folder / "data_batch_3").write_bytes(pickle.dumps(batch))
    text = refusal(f"cifar10:{folder}")
    assert "data_batch_3" in text
    assert "mkdir" in text
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("data_batch_3", None, "lacks data_batch_3"),
        ("batches.meta", None, "lacks batches.meta"),
        ("test_batch", b"", "test_batch"),
        ("data_batch_1", b"\x80\x04garbage", "data_batch_1"),
        ("data_batch_1", pickle.dumps([1, 2]), "no dictionary"),
        ("data_batch_1", pickle.dumps({"data": np.zeros((4, 3071), np.uint8)}), "uint8 [n, 3072]"),
        ("data_batch_1", pickle.dumps({"data": np.zeros((4, 3072))}), "uint8 [n, 3072]"),
        (
            "data_batch_1",
            pickle.dumps({"data": np.zeros((0, 3072), np.uint8), "labels": []}),
            "uint8 [n, 3072]",
        ),
        ("data_batch_1", pickle.dumps({"data": np.zeros((4, 3072), np.uint8)}), "labels"),
        (
            "data_batch_1",
            pickle.dumps({"data": np.zeros((4, 3072), np.uint8), "labels": [1] * 3}),
            "3 labels",
        ),
        ("data_batch_1", pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}), "0..9"),
        ("data_batch_1", pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [-1, 0]}), "0..9"),
        ("data_batch_1", pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [[1], 0]}), "labels"),
        ("batches.meta", pickle.dumps({"label_names": ["a"]}), "label_names"),
    ],
)
def test_cifar10_refusals(cifar10, name, content, says):
    folder = cifar10()
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    text = refusal(f"cifar10:{folder}")
    assert says in text
    assert str(folder) in text


def test_cifar10_truncated(cifar10):
    path = cifar10() / "data_batch_4"
    path.write_bytes(path.read_bytes()[:-3000])
    assert "data_batch_4" in refusal(f"cifar10:{path.parent}")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist(idx, suffix):
    folder = idx(suffix)
    summary = data.check(config(f"fashion-mnist:{folder}"))
    assert (summary.train_samples, summary.heldout_samples) == (12, 6)
    assert summary.description == "fashion-mnist: 12 + 6 grey images 28x28, 10 classes"
    heldout = data.open_split(config(f"fashion-mnist:{folder}"), "heldout")
    assert heldout.images.shape == (6, 28, 28, 1)
    assert list(heldout.labels) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("train-images-idx3-ubyte", lambda old: None, "lacks train-images-idx3-ubyte"),
        ("t10k-labels-idx1-ubyte", lambda old: None, "lacks t10k-labels-idx1-ubyte"),
        ("train-images-idx3-ubyte", lambda old: b"\0\0\x08\x01" + old[4:], "magic number 0x00000801"),
        ("train-images-idx3-ubyte", lambda old: b"", "magic number"),
        ("train-images-idx3-ubyte", lambda old: old[:9], "truncated"),
        ("train-images-idx3-ubyte", lambda old: old[:-1], "it holds 9407"),
        ("train-images-idx3-ubyte", lambda old: old + b"x", "more than 9408"),
        ("train-images-idx3-ubyte", lambda old: struct.pack(">4I", 0x803, 0, 28, 28), "holds no images"),
        ("train-images-idx3-ubyte", lambda old: struct.pack(">4I", 0x803, *[2**32 - 1] * 3), "promises"),
        (
            "train-labels-idx1-ubyte",
            lambda old: struct.pack(">2I", 0x801, 3) + b"abc",
            "3 labels for 12 images",
        ),
        ("train-labels-idx1-ubyte", lambda old: old[:-1] + b"\x0a", "outside 0..9"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_refusals(idx, suffix, name, change, says):
    path = idx(suffix) / (name + suffix)
    old = path.read_bytes()
    new = change(gzip.decompress(old) if suffix else old)
    if new is None:
        path.unlink()
    else:
        path.write_bytes(gzip.compress(new) if suffix else new)
    text = refusal(f"fashion-mnist:{path.parent}")
    assert says in text
    assert str(path.parent) in text


@pytest.mark.parametrize("cut", [-20, 5, 0])
def test_truncated_gz(idx, cut):
    path = idx(".gz") / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:cut])
    assert str(path) in refusal(f"fashion-mnist:{path.parent}")


def test_damaged_gz(idx):
    path = idx(".gz") / "t10k-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[60:90] = b"\xff" * 30
    path.write_bytes(content)
    assert "damaged" in refusal(f"fashion-mnist:{path.parent}")


def test_idx_splits_of_different_sizes(idx):
    folder = idx("", size=28)
    (folder / "t10k-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, 6, 20, 20) + bytes(2400))
    assert "28x28x1, held-out ones 20x20x1" in refusal(f"fashion-mnist:{folder}")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "choose from digits, cifar10:DIR"),
        ("mnist", "choose from digits"),
        ("CIFAR10:/x", "choose from digits"),
        ("digits:/x", "write --data digits"),
        ("digits:", "write --data digits"),
        ("cifar10", "write --data cifar10:DIR"),
        ("imagefolder: ", "write --data imagefolder:DIR"),
        ("cifar10:/no/such", "no folder /no/such"),
        ("cifar10:/etc/passwd", "is not a folder"),
        ("imagefolder:/no\nsuch", "no folder /no\\nsuch"),
        ("imagefolder:/no\0such", "/no\\x00such"),
    ],
)
def test_specs_refused(spec, says):
    assert says in refusal(spec)


def test_images_that_are_too_small_for_the_network():
    assert "give --image-size 9" in refusal("digits", model="airbench-small")
    assert data.check(config("digits", model="airbench-small", image_size=9)).train_samples == 1437


def test_unreadable(idx, monkeypatch):
    folder = idx()

    def refuse(path, magic):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(readers, "_read_idx", refuse)  # the tests may run as root, who can read everything
    text = refusal(f"fashion-mnist:{folder}")
    assert "train-images-idx3-ubyte cannot be read (Permission denied)" in text


def test_absolute_paths(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert data.absolute_data(config("cifar10:data/x")) == f"cifar10:{tmp_path}/data/x"
    assert data.absolute_data(config("cifar10:/a/../b")) == "cifar10:/b"
    assert data.absolute_data(config("digits")) == "digits"
    moved = data.absolute_paths(config("imagefolder:y", seed=3))
    assert moved == config(f"imagefolder:{tmp_path}/y", seed=3)


def test_fingerprint_follows_the_data(cifar10):
    folder = cifar10()
    before = data.check(config(f"cifar10:{folder}")).fingerprint
    assert before == data.check(config(f"cifar10:{folder}", seed=5)).fingerprint
    cifar10(labels=[1, 2, 3, 4])
    assert data.check(config(f"cifar10:{folder}")).fingerprint != before


@pytest.mark.parametrize("size", [1, 7, 1025])
def test_image_size_out_of_range(size):
    assert refusal("digits", image_size=size).startswith(f"--image-size {size}: ")


def test_one_image_per_shard_needs_more_than_one_pixel_at_the_end():
    data.check(config("digits", batch_size=8))
    text = refusal("digits", batch_size=8, model="resnet18")
    assert text.startswith("--batch-size 8: ")
    assert "at least 16" in text
    data.check(dataclasses.replace(config("digits", batch_size=16), model="resnet18"))
