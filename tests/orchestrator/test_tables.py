"""Prepared data as it is read: rows by number, files fetched ahead, and one line for what is wrong."""

import json
import os
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from table_files import write_all

from orchestrator.blocks import BlockOrder
from orchestrator.config import RunConfig
from orchestrator.errors import DataError, StorageError, UserError
from orchestrator.storage import Folder
from orchestrator.tables import MANIFEST, Manifest, Table, check_whole, read_manifest


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))


def table(folder: Path, manifest: Manifest, window: int = 2, cache_gb: float = 1.0) -> Table:
    return Table(str(folder), manifest, "train", RunConfig(data_cache=cache_gb, shuffle_window=window))


def test_rows_come_in_the_order_they_were_asked_for(tmp_path):
    manifest = write_all(tmp_path / "d", [3, 5, 2])
    found = table(tmp_path / "d", manifest)
    assert len(found) == 10
    asked = np.array([9, 0, 4, 3, 0, 8])
    rows = found.rows(asked, ["x", "name"])
    assert rows["x"].to_pylist() == list(asked)
    assert rows["name"].to_pylist() == [f"n{i}" for i in asked]


def test_a_manifest_is_read_back(tmp_path):
    manifest = write_all(tmp_path / "d", [3, 5])
    found = read_manifest(str(tmp_path / "d"), "toy")
    assert found == manifest
    assert found.blocks() == (3, 5)
    assert found.samples("heldout") == 1


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "there is no manifest.json"),
        ("{", "not one that this program writes"),
        ('{"format": 1}', "not one that this program writes"),
        ('{"format": 99}', "another version"),
        ("[]", "not one that this program writes"),
    ],
)
def test_a_folder_without_prepared_data_is_refused(tmp_path, content, word):
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(UserError, match=word) as refusal:
        read_manifest(str(tmp_path), "toy")
    assert "\n" not in str(refusal.value)
    assert "orchestrator.prepare toy" in str(refusal.value)


@pytest.mark.parametrize(
    "damage",
    [
        {"files": {"train": [], "heldout": []}},
        {"files": []},
        {"fingerprint": None},
        {"about": [1]},
        {"broken": [1]},
        *({"samples": value} for value in (-1, 0, "5", 5.5, True)),
        {"bytes": 0},
        {"sha256": 5},
        {"sha256": "../../x"},
        {"name": "../x"},
        {"name": ".."},
    ],
    ids=str,
)
def test_a_manifest_with_what_cannot_be_is_refused(tmp_path, damage):
    write_all(tmp_path, [3])
    content = json.loads((tmp_path / MANIFEST).read_text())
    (content if set(damage) <= set(content) - {"samples"} else content["files"]["train"][0]).update(damage)
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"manifest.json is not one that this program writes"):
        read_manifest(str(tmp_path), "toy")


def test_a_manifest_that_is_no_text_is_refused(tmp_path):
    (tmp_path / MANIFEST).write_bytes(b'{"format": "\xff"}')
    with pytest.raises(UserError, match=r"manifest.json is not one that this program writes"):
        read_manifest(str(tmp_path), "toy")


def test_data_of_another_workload_is_refused(tmp_path):
    write_all(tmp_path / "d", [1])
    with pytest.raises(UserError, match="prepared for toy, not for bert"):
        read_manifest(str(tmp_path / "d"), "bert")


def test_a_file_that_is_missing_or_cut_off_is_found_at_the_door(tmp_path):
    write_all(tmp_path, [3, 5])
    check_whole(str(tmp_path), "toy", RunConfig())
    for name, problem in (("heldout-00000.parquet", "has 4 bytes instead of"), ("train-00001.parquet", "is missing")):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
        if "bytes" in problem:
            (tmp_path / name).write_bytes(whole[:4])
        with pytest.raises(UserError, match=rf"{name} {problem}.*; prepare the data again with --verify"):
            check_whole(str(tmp_path), "toy", RunConfig())
        (tmp_path / name).write_bytes(whole)


def test_what_was_thrown_away_while_it_was_open_can_still_be_read(tmp_path):
    manifest = write_all(tmp_path / "d", [2000, 2000, 2000])
    found = table(tmp_path / "d", manifest, cache_gb=1e-6)
    order = np.random.default_rng(0).permutation(6000)
    assert found.rows(order, ["x"])["x"].to_pylist() == list(order)


@pytest.mark.parametrize(("process", "order"), [(100, [0, 1, 2, 3]), (101, [1, 0, 3, 2])])
def test_processes_of_a_machine_do_not_begin_with_the_same_file(tmp_path, monkeypatch, process, order):
    """Of a window: what the next one needs comes after it for all of them."""
    manifest = write_all(tmp_path / "d", [3, 3, 3, 3])
    monkeypatch.setattr(os, "getpid", lambda: process)
    found, asked = table(tmp_path / "d", manifest), []
    monkeypatch.setattr(BlockOrder, "ahead", lambda *_: [0, 1, 2, 3])
    monkeypatch.setattr(
        found._cache, "ensure", lambda file, *_, **__: asked.append(manifest.files["train"].index(file))
    )
    found.fetch_ahead(0, 0, 0)
    cached(tmp_path, manifest)
    assert asked == order


WAIT_S = 30


def ahead() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fetch-ahead"]


def cached(tmp_path: Path, manifest: Manifest) -> set[int]:
    """Which files are in the cache when nobody fetches ahead any more."""
    for thread in ahead():
        thread.join(WAIT_S)
    assert not ahead()
    names = {path.stem for path in (tmp_path / "cache/tables").glob("*.arrow")}
    return {number for number, file in enumerate(manifest.files["train"]) if file.sha256 in names}


@pytest.fixture
def gate(monkeypatch):
    """(set when a fetch ahead has begun; set it and that goes on)"""
    begun, go_on, read = threading.Event(), threading.Event(), Folder.read

    def held(folder, name):
        if threading.current_thread() in ahead():
            begun.set()
            assert go_on.wait(WAIT_S)
        return read(folder, name)

    monkeypatch.setattr(Folder, "read", held)
    yield begun, go_on
    go_on.set()


def test_the_next_files_are_fetched_ahead(tmp_path):
    manifest = write_all(tmp_path / "d", [10] * 6)
    found = table(tmp_path / "d", manifest, window=1)
    order = found.order.opened(0, 0).blocks.tolist()
    found.fetch_ahead(0, 0, order[0] * 10)
    assert cached(tmp_path, manifest) == set(order[:2])
    found.fetch_ahead(0, 0, order[0] * 10 + 9)
    assert not ahead(), "that was done"
    found.fetch_ahead(0, 0, order[5] * 10)
    following = int(found.order.opened(0, 1).blocks[0])
    assert cached(tmp_path, manifest) == {*order[:2], order[5], following}


def test_one_thread_fetches_ahead_at_a_time(tmp_path, gate):
    begun, go_on = gate
    manifest = write_all(tmp_path / "d", [10] * 6)
    found = table(tmp_path / "d", manifest, window=1)
    order = found.order.opened(0, 0).blocks.tolist()
    found.fetch_ahead(0, 0, order[0] * 10)
    (thread,) = ahead()
    assert begun.wait(WAIT_S)
    for block in order[2:]:
        found.fetch_ahead(0, 0, block * 10)
    assert ahead() == [thread]
    go_on.set()
    assert cached(tmp_path, manifest) == set(order[:2])
    found.fetch_ahead(0, 0, order[2] * 10)
    assert cached(tmp_path, manifest) == set(order[:4])


def test_a_table_goes_to_another_process_while_it_fetches_ahead(tmp_path, gate):
    begun, go_on = gate
    manifest = write_all(tmp_path / "d", [10] * 6)
    found = table(tmp_path / "d", manifest, window=1)
    order = found.order.opened(0, 0).blocks.tolist()
    found.fetch_ahead(0, 0, order[0] * 10)
    assert begun.wait(WAIT_S)
    during = pickle.loads(pickle.dumps(found))
    go_on.set()
    assert cached(tmp_path, manifest) == set(order[:2])
    for there in (during, pickle.loads(pickle.dumps(found))):
        assert there.rows(np.array([59, 0]), ["x"])["x"].to_pylist() == [59, 0]
        shutil.rmtree(tmp_path / "cache")
        there.fetch_ahead(0, 0, order[0] * 10)
        assert cached(tmp_path, manifest) == set(order[:2]), "it fetches by itself"


@pytest.mark.parametrize("error", [UserError, StorageError])
def test_where_the_store_was_away_files_are_fetched_ahead_later(tmp_path, monkeypatch, error):
    manifest = write_all(tmp_path / "d", [10] * 6)
    found = table(tmp_path / "d", manifest, window=1)
    order = found.order.opened(0, 0).blocks.tolist()

    def away(*_):
        raise error("does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "read", away)
        for sample in (0, 1):
            found.fetch_ahead(0, 0, order[0] * 10 + sample)
            assert cached(tmp_path, manifest) == set()
    found.fetch_ahead(0, 0, order[0] * 10 + 2)
    assert cached(tmp_path, manifest) == set(order[:2])


def test_a_damaged_file_does_not_keep_the_next_ones_from_being_fetched(tmp_path):
    manifest = write_all(tmp_path / "d", [10] * 6)
    found = table(tmp_path / "d", manifest, window=2)
    order = found.order.opened(0, 0).blocks.tolist()
    damaged, missing = (tmp_path / "d" / manifest.files["train"][number].name for number in order[:2])
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    missing.unlink()
    found.fetch_ahead(0, 0, order[0] * 10)
    assert cached(tmp_path, manifest) == set(order[2:4])
    for number, words in ((order[0], "is damaged"), (order[1], "cannot be read")):
        with pytest.raises(DataError, match=rf"train-{number:05d}.parquet {words}"):
            found.rows(np.array([number * 10]), ["x"])


@pytest.mark.parametrize(("window", "files"), [(1, [2, 3]), (2, [0, 1, 2, 3]), (16, [0, 1, 2, 3, 4])])
def test_a_cache_that_is_too_small_is_told(tmp_path, capsys, window, files):
    """For two windows of the largest files."""
    manifest = write_all(tmp_path, [500, 1000, 3000, 2000, 100])
    least = sum(manifest.files["train"][number].bytes for number in files)
    check_whole(str(tmp_path), "toy", RunConfig(shuffle_window=window, data_cache=(least + 1) / 1e9))
    assert capsys.readouterr() == ("", "")
    check_whole(str(tmp_path), "toy", RunConfig(shuffle_window=window, data_cache=(least - 1) / 1e9))
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert shown.err.startswith("note: --data-cache ")
    assert f"two windows of --shuffle-window {window} files" in shown.err


def test_the_manifest_is_plain_json(tmp_path):
    write_all(tmp_path / "d", [2])
    content = json.loads((tmp_path / "d" / MANIFEST).read_text())
    assert content["files"]["train"][0]["sha256"]
    assert content["licence"] == "MIT"
    assert content["samples"] == {"train": 2, "heldout": 1}
