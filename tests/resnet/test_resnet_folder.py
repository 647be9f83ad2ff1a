"""Folders of image files: what is read, what is left out, what is refused."""

import errno
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from preparing import do, job

from orchestrator import tables
from orchestrator.errors import DataError, StorageError, UserError
from workloads.resnet import data, preparing
from workloads.resnet.config import ResnetConfig
from workloads.resnet.folder import decode, without_ends


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


@pytest.mark.parametrize("extension", ["jpg", "JPEG", "png", "bmp", "webp", "ppm", "tif"])
def test_image_folder(image_folder, extension):
    folder = image_folder(extension)
    summary = data.check(config(f"imagefolder:{folder}", batch_size=64))
    assert (summary.train_samples, summary.heldout_samples) == (6, 4)
    assert summary.description == "imagefolder: 6 + 4 colour image files 224x224, 2 classes"
    train = data.open_split(config(f"imagefolder:{folder}"), "train")
    assert train.class_names == ("cat", "dog")
    assert list(train.labels) == [0, 0, 0, 1, 1, 1]
    assert train.images[0].endswith(f"train/cat/0.{extension}")
    assert decode(train.images[1]).mode == "RGB"


def test_image_folder_leaves_out_hidden_and_other_files(image_folder):
    folder = image_folder("png")
    before = data.check(config(f"imagefolder:{folder}"))
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / "cat" / "._0.png").write_bytes(b"x")
    (folder / "train" / "cat" / "notes.txt").write_bytes(b"x")
    assert data.check(config(f"imagefolder:{folder}")) == before
    image_file = folder / "train" / "cat" / "0.png"
    Image.open(image_file).rotate(90).crop((0, 0, 5, 5)).save(image_file)
    assert data.check(config(f"imagefolder:{folder}")).fingerprint != before.fingerprint


def test_image_folder_refusals(image_folder):
    folder = image_folder()
    spec = f"imagefolder:{folder}"
    (folder / "val" / "bird").mkdir()
    assert "class bird is in val/ but not in train/" in refusal(spec)
    (folder / "train" / "bird").mkdir()
    assert f"{folder}/train/bird holds no images" in refusal(spec)
    (folder / "train" / "bird").rmdir()
    (folder / "val" / "bird").rmdir()
    broken = folder / "val" / "dog" / "1.jpg"
    broken.write_bytes(b"not an image")
    assert f"{broken} is not an image" in refusal(spec)
    broken.write_bytes(b"")
    assert f"{broken} is empty" in refusal(spec)
    assert "no folder val" in refusal(f"imagefolder:{_with_empty(folder, 'train')}")
    assert "no folder train" in refusal(f"imagefolder:{folder / 'train'}")
    assert "is read from a folder, here or mounted" in refusal("imagefolder:s3://bucket/images")


def _with_empty(folder, name):
    (folder / "empty" / name).mkdir(parents=True)
    return folder / "empty"


def test_image_folder_needs_two_classes(tmp_path):
    for part in ("train", "val"):
        (tmp_path / part / "only").mkdir(parents=True)
    assert "at least 2" in refusal(f"imagefolder:{tmp_path}")


def test_a_truncated_image_is_named(image_folder):
    path = image_folder() / "train" / "dog" / "2.jpg"
    path.write_bytes(path.read_bytes()[:-500])
    data.check(config(f"imagefolder:{path.parents[2]}"))  # its header is whole
    with pytest.raises(DataError, match=r"dog/2\.jpg cannot be decoded") as caught:
        decode(str(path))
    assert "\n" not in str(caught.value)


def test_grey_in_16_bits_is_scaled_and_not_cut_off(tmp_path):
    values = (np.arange(16).reshape(4, 4) * 4096).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "grey.png")
    for mode in ("L", "RGB"):
        found = np.asarray(decode(str(tmp_path / "grey.png"), mode=mode))
        assert np.array_equal(found if mode == "L" else found[..., 1], values >> 8)


@pytest.mark.parametrize("size", [(30, 1), (1, 33), (5, 40), (4, 4)])
def test_of_a_very_long_image_the_middle_is_kept(size):
    image = Image.fromarray(np.arange(size[0] * size[1], dtype=np.uint8).reshape(size[::-1]))
    found, pixels = without_ends(image), np.asarray(image)
    if max(size) <= 8 * min(size):
        assert found is image
    else:
        assert max(found.size) == 8
        assert np.array_equal(np.asarray(found).ravel(), pixels.ravel()[(max(size) - 8) // 2 :][:8])


def test_grey_in_16_bits_that_pillow_opens_with_32_is_scaled_too(tmp_path):
    values = (np.arange(16).reshape(4, 4) * 4096).astype(np.uint16)
    (tmp_path / "grey.ppm").write_bytes(b"P5\n4 4\n65535\n" + values.astype(">u2").tobytes())
    assert np.array_equal(np.asarray(decode(str(tmp_path / "grey.ppm"), mode="L")), values >> 8)


@pytest.mark.parametrize(
    "pixels", [np.float32([[0, 1]]), np.int32([[0, 65536]]), np.int32([[-1, 5]]), np.int32([[0, 200]])]
)
def test_an_image_with_32_bits_a_pixel_is_refused(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "deep.tif")
    with pytest.raises(DataError, match=r"deep\.tif has 32-bit pixels; save it with 8 or 16 bits$"):
        decode(str(tmp_path / "deep.tif"))


def test_an_image_with_too_many_pixels_is_told_as_that(tmp_path, monkeypatch):
    Image.new("L", (8, 8)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16)
    with pytest.raises(DataError, match=r"large.png has more than 32 pixels"):
        decode(str(tmp_path / "large.png"))


def test_files_that_may_not_be_looked_at_are_one_line(tmp_path, monkeypatch, image_folder):
    """A folder whose names may be listed, and no more."""

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    folder = image_folder("png")
    monkeypatch.setattr(preparing, "os", SimpleNamespace(**{**vars(os), "stat": refuse}))
    with pytest.raises(UserError, match=r"0.png cannot be read \(Permission denied\); make it readable for the user"):
        job("resnet", f"imagefolder:{folder}", tmp_path / "out")


def test_a_worker_waits_for_the_manifest_and_a_user_does_not(tmp_path, monkeypatch):
    do(job("resnet", "digits", tmp_path / "out"))
    asked, read = [], tables.Folder.read

    def noted(folder, name):
        asked.append(folder._patience_s)
        return read(folder, name)

    monkeypatch.setattr(tables.Folder, "read", noted)
    data._prepared.cache_clear()
    config = ResnetConfig(data=f"parquet:{tmp_path}/out", storage_patience=7.0)
    data.open_split(config, "train")
    data.kind(config)
    assert asked == [7.0, 7.0]
    data.check(config)
    assert asked[2] is None


def away(monkeypatch, times):
    """The server of a mounted folder does not answer so often; returns how often it is asked."""
    asked, read = [], Path.read_bytes

    def answer(path):
        asked.append(path)
        if len(asked) <= times:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", answer)
    monkeypatch.setattr("orchestrator.patience.PAUSES_S", (0.0,))
    return asked


def test_a_server_that_is_away_for_a_moment_breaks_no_image(tmp_path, monkeypatch, image_folder):
    """A prepared image that is left out stays out; one that is trained on is no reason to stop."""
    images = image_folder("png")
    asked = away(monkeypatch, 3)
    preparing_job = job("resnet", f"imagefolder:{images}", tmp_path / "out")
    do(preparing_job)
    assert not preparing_job.broken()
    asked.clear()
    assert decode(str(images / "train" / "cat" / "0.png")).mode == "RGB"
    assert len(asked) == 4


def test_a_server_that_stays_away_is_no_broken_image(monkeypatch, image_folder):
    images = image_folder("png")
    away(monkeypatch, 10**9)
    with pytest.raises(StorageError, match=r"0.png cannot be read for 0 s \(Stale file handle\); look at the disk"):
        decode(str(images / "train" / "cat" / "0.png"), patience_s=0.0)


@pytest.mark.parametrize(("pixels", "grey"), [(b"\xff\xff\xff", 255), (b"\x80\x08\x00", 128), (b"\x00\x00\x00", 0)])
def test_tiffs_with_twelve_bits_keep_their_upper_eight(tmp_path, pixels, grey):
    """Pillow opens them as 16 bits, of which the upper four are 0."""
    values = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 3)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values)
    head = b"II*\0" + struct.pack("<I", 12) + pixels + b"\0"
    (tmp_path / "x.tif").write_bytes(head + struct.pack("<H", len(values)) + entries + b"\0\0\0\0")
    with Image.open(tmp_path / "x.tif") as opened:
        assert opened.mode == "I;16"
    assert np.asarray(decode(str(tmp_path / "x.tif"), mode="L")).tolist() == [[grey, grey]]
