"""Images as Parquet files: nothing is lost or changed, broken ones are named, what is done is not done again."""

import math
import os

import numpy as np
import pytest
from PIL import Image
from preparing import do, job
from pyarrow import parquet

from orchestrator import outfolder
from orchestrator.errors import DataError, UserError
from orchestrator.storage import Folder
from orchestrator.tables import Manifest, read_manifest
from workloads.resnet import data, prepared, preparing
from workloads.resnet.config import ResnetConfig
from workloads.resnet.workload import ResnetWorkload


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    data._prepared.cache_clear()


def of(out, **settings):
    return ResnetWorkload(ResnetConfig(data=f"parquet:{out}", **settings))


def test_digits_are_the_same_images_in_another_order(tmp_path):
    do(job("resnet", "digits", tmp_path / "out", "--file-mb", "0.02"))
    plain, prepared = ResnetWorkload(ResnetConfig()), of(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("train-*.parquet"))) > 5
    for split in ("train", "heldout"):
        all_of = np.arange(len(plain.samples(split)))
        assert len(prepared.samples(split)) == len(all_of)
        there, here = plain.samples(split).microbatch(all_of, 0), prepared.samples(split).microbatch(all_of, 0)
        pixels = [images["images"].flatten(1).numpy() for images in (there, here)]
        if split == "heldout":
            assert np.array_equal(*pixels)
            assert np.array_equal(there["labels"], here["labels"])
        else:
            assert not np.array_equal(*pixels), "the training split is not mixed"
            rows = [np.column_stack([p, images["labels"]]) for p, images in zip(pixels, (there, here), strict=True)]
            assert np.array_equal(*(r[np.lexsort(r.T)] for r in rows))


def test_the_plan_and_its_model_are_those_of_the_source(tmp_path):
    do(job("resnet", "digits", tmp_path / "out"))
    config = ResnetConfig(data=f"parquet:{tmp_path / 'out'}")
    summary = data.check(config)
    assert (summary.train_samples, summary.heldout_samples) == (1437, 360)
    assert sum(summary.blocks) == 1437
    assert "10 classes" in summary.description
    assert of(tmp_path / "out")._description == ResnetWorkload(ResnetConfig())._description


def test_files_are_kept_as_they_are(tmp_path, image_folder):
    folder = image_folder("jpg")
    do(job("resnet", f"imagefolder:{folder}", tmp_path / "out"))
    plain = ResnetWorkload(ResnetConfig(data=f"imagefolder:{folder}"))
    there = plain.samples("heldout").microbatch(np.arange(4), 0)
    here = of(tmp_path / "out").samples("heldout").microbatch(np.arange(4), 0)
    assert np.array_equal(there["images"], here["images"])
    batch = of(tmp_path / "out").samples("train").microbatch(np.arange(6), 0)
    assert batch["images"].shape == (6, 3, 224, 224)


def broken(image_folder):
    folder = image_folder("png")
    file = folder / "train" / "cat" / "1.png"
    file.write_bytes(file.read_bytes()[:60])
    return folder


def test_a_broken_image_is_left_out_and_named(tmp_path, image_folder):
    source = f"imagefolder:{broken(image_folder)}"
    found = do(job("resnet", source, tmp_path / "out", "--max-broken", "0.2"))
    assert found.samples("train") == 5
    assert found.broken_count == 1
    assert "cat/1.png" in found.broken[0]


def test_too_many_broken_images_stop_the_job(tmp_path, image_folder):
    with pytest.raises(
        DataError, match=r"1 cannot be read, more than --max-broken 0.05 of 10; the first: .*cat/1.png.*--max-broken$"
    ):
        do(job("resnet", f"imagefolder:{broken(image_folder)}", tmp_path / "out", "--max-broken", "0.05"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_too_many_broken_images_stop_the_next_job_too(tmp_path, image_folder):
    """All parts have been written by then."""
    source, out = f"imagefolder:{broken(image_folder)}", tmp_path / "out"
    do(job("resnet", source, out, "--max-broken", "0.2"))
    (out / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"more than --max-broken 0.05"):
        do(job("resnet", source, out, "--max-broken", "0.05"))
    assert not (out / "manifest.json").exists()


def test_an_image_that_could_not_be_read_is_tried_again(tmp_path, image_folder):
    source, out = f"imagefolder:{broken(image_folder)}", tmp_path / "out"
    do(job("resnet", source, out, "--max-broken", "0.2"))
    assert job("resnet", source, out, "--max-broken", "0.2").missing() == []
    assert job("resnet", source, out, "--max-broken", "0.2", "--verify").missing() == [0]


def test_files_of_somebody_else_stay(tmp_path):
    out = tmp_path / "out"
    do(job("resnet", "digits", out, "--file-mb", "0.02"))
    others = [out / "train-00000-of-00010.parquet", out / "trainer.parquet", out / "parts" / "notes" / "a.txt"]
    for file in others:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"not ours")
    do(job("resnet", "digits", out))
    assert [file.read_bytes() for file in others] == [b"not ours"] * 3
    assert not (out / "train-00003.parquet").exists(), "what the earlier job made"


def test_a_file_name_that_is_not_utf8_is_written_out(tmp_path, image_folder):
    folder = image_folder("png")
    odd = os.fsencode(folder / "train" / "cat") + b"/caf\xe9.png"
    os.rename(folder / "train" / "cat" / "0.png", odd)
    do(job("resnet", f"imagefolder:{folder}", tmp_path / "out"))
    names = parquet.read_table(tmp_path / "out" / "train-00000.parquet").column("name").to_pylist()
    assert r"train/cat/caf\udce9.png" in names


def test_a_job_that_was_broken_off_goes_on(tmp_path):
    out = tmp_path / "out"
    first = job("resnet", "digits", out, "--file-mb", "0.02")
    do(first, [0, 2])
    again = job("resnet", "digits", out, "--file-mb", "0.02")
    assert again.missing() == [n for n in range(len(first.parts)) if n not in (0, 2)]
    manifest = do(again)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    third = job("resnet", "digits", out, "--file-mb", "0.02")
    assert third.missing() == []
    assert third.finish() == manifest
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_damaged_file_is_mended_alone(tmp_path):
    out = tmp_path / "out"
    manifest = do(job("resnet", "digits", out, "--file-mb", "0.02"))
    file = out / "train-00001.parquet"
    good = file.read_bytes()
    file.write_bytes(good[:-5] + b"xxxxx")
    with pytest.raises(DataError, match=r"train-00001.parquet is damaged"):
        of(out).samples("train").microbatch(np.arange(1437), 0)
    assert job("resnet", "digits", out, "--file-mb", "0.02").missing() == []
    careful = job("resnet", "digits", out, "--file-mb", "0.02", "--verify")
    assert careful.missing() == [1]
    assert do(careful) == manifest
    assert file.read_bytes() == good


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("kind", (None, "foo", "parquet", ["digits"])),
        ("class_names", (None, [], ["one"], "two", [1, 2])),
        ("size", (None, "8", 0, 8.0, math.inf)),
    ],
)
def test_a_manifest_that_does_not_describe_images_is_refused(name, wrong):
    good = {"kind": "digits", "class_names": ["a", "b"], "size": 8}
    assert prepared.about(manifest(good), data.KINDS) == prepared.Prepared("digits", ("a", "b"), 8)
    lacking = {key: value for key, value in good.items() if key != name}
    for bad in [lacking, *({**good, name: value} for value in wrong)]:
        with pytest.raises(UserError, match="does not describe images; prepare the data again"):
            prepared.about(manifest(bad), data.KINDS)


def manifest(about):
    return Manifest("resnet", "there", "", {}, about, (), 0, "f")


@pytest.mark.parametrize("text", ["{bad", "{}", "[]", "", '{"number": 0, "spec": 5, "files": {}, "broken": []}'])
def test_a_damaged_record_is_a_part_that_is_not_done(tmp_path, text):
    out = tmp_path / "out"
    found = do(job("resnet", "digits", out))
    for damaged in (text.encode(), b"\xff"):
        (out / "parts" / "00000.json").write_bytes(damaged)
        again = job("resnet", "digits", out)
        assert again.missing() == [0]
        assert do(again) == found


@pytest.mark.parametrize("name", ["train-00001.parquet", "parts/00001.json"])
def test_what_cannot_be_read_is_made_again(tmp_path, name):
    """A bad sector, or another user's file: here a folder is in its place."""
    out = tmp_path / "out"
    found = do(job("resnet", "digits", out, "--file-mb", "0.02"))
    (out / name).unlink()
    (out / name).mkdir()
    again = job("resnet", "digits", out, "--file-mb", "0.02", "--verify")
    assert again.missing() == [1]
    (out / name).rmdir()
    assert do(again) == found


def test_files_that_this_machine_does_not_see_are_not_said_to_be_there(tmp_path, monkeypatch, capsys):
    """Nodes with disks of their own: what one has written there is not in the folder of the others."""
    made = job("resnet", "digits", tmp_path / "out", "--file-mb", "0.02")
    do(made)
    monkeypatch.setattr(outfolder, "SEEN_WITHIN_S", 0.05)
    (tmp_path / "out" / "train-00001.parquet").rename(tmp_path / "elsewhere")
    with pytest.raises(
        DataError, match=r"1 of \d+ files are not in it.*\(train-00001.parquet\); give a folder that all"
    ):
        made.finish()
    assert "waiting until this machine sees 1 files, the first is train-00001.parquet" in capsys.readouterr().out
    monkeypatch.setattr(outfolder, "SEEN_WITHIN_S", 30.0)
    monkeypatch.setattr(outfolder, "LOOK_EVERY_S", 0.0)
    looks, sizes = [], Folder.sizes

    def late(folder):
        if looks:
            (tmp_path / "elsewhere").rename(tmp_path / "out" / "train-00001.parquet")
        looks.append(1)
        return sizes(folder)

    monkeypatch.setattr(Folder, "sizes", late)
    assert made.finish() == made.manifest()
    assert len(looks) == 2, "an NFS client that knew the folder of before"


def test_a_missing_file_is_found_before_a_run(tmp_path):
    do(job("resnet", "digits", tmp_path / "out"))
    (tmp_path / "out" / "heldout-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"heldout-00001.parquet is missing"):
        data.check(ResnetConfig(data=f"parquet:{tmp_path / 'out'}"))


def test_another_source_replaces_what_was_there(tmp_path, image_folder):
    out = tmp_path / "out"
    do(job("resnet", "digits", out, "--file-mb", "0.02"))
    folder = image_folder("png")
    do(job("resnet", f"imagefolder:{folder}", out))
    assert {path.name for path in out.glob("*.parquet")} == {"train-00000.parquet", "heldout-00001.parquet"}
    Image.new("RGB", (20, 20)).save(folder / "train" / "dog" / "0.png")
    assert job("resnet", f"imagefolder:{folder}", out).missing() == [0], "a file that has changed"


@pytest.mark.parametrize("change", ["removed", "added", "resized", "moved"])
def test_a_source_that_changes_while_it_is_prepared_is_refused(tmp_path, image_folder, change):
    """Another process of the job lists it by itself."""
    cats = image_folder("png") / "train" / "cat"
    todo = job("resnet", f"imagefolder:{tmp_path}", tmp_path / "out")
    preparing._open.cache_clear()
    for name in ("0.png", "1.png"):
        os.utime(cats / name, (1, 1))
    assert todo.preparation.make(todo.parts[0]).tables["train"].num_rows == 6, "times differ from node to node"
    if change == "added":
        Image.new("RGB", (20, 20)).save(cats / "00.png")
    elif change == "resized":
        Image.new("RGB", (20, 20)).save(cats / "0.png")
    elif change == "moved":
        os.rename(cats / "0.png", tmp_path / "train" / "dog" / "0a.png")
    else:
        (cats / "0.png").unlink()
    if change != "removed":  # this one after the listing
        preparing._open.cache_clear()
    with pytest.raises(UserError, match=r"^--source imagefolder:.*: changed while .* run the same command again"):
        todo.preparation.make(todo.parts[0])


def test_what_is_prepared_is_not_a_source(tmp_path):
    do(job("resnet", "digits", tmp_path / "out"))
    with pytest.raises(UserError, match="prepared already"):
        job("resnet", f"parquet:{tmp_path / 'out'}", tmp_path / "again")


def test_the_manifest_says_what_it_holds_and_where_it_is_from(tmp_path):
    told = ["--origin", "https://archive.ics.uci.edu/dataset/80", "--licence", "CC BY 4.0"]
    found = do(job("resnet", "digits", tmp_path / "out", "--file-mb", "0.02", *told))
    assert found.schema == {"image": "binary", "label": "int32", "name": "string"}
    assert (found.source, found.origin, found.licence) == ("digits", told[1], told[3])
    assert read_manifest(str(tmp_path / "out"), "resnet") == found
