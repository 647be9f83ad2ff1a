"""Prepared data as it is read: rows by number, checked files, a bounded cache, and one line for what is wrong."""

import hashlib
import io
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from orchestrator.config import RunConfig
from orchestrator.errors import DataError, UserError
from orchestrator.filecache import FileCache, TableFile
from orchestrator.storage import Folder
from orchestrator.tables import MANIFEST, Manifest, Table, check_whole, read_manifest


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))


def encoded(values: list[int]) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pa.table({"x": values, "name": [f"n{v}" for v in values]}), sink)
    return sink.getvalue()


def write_file(folder: Path, name: str, values: list[int]) -> TableFile:
    folder.mkdir(exist_ok=True)
    data = encoded(values)
    (folder / name).write_bytes(data)
    return TableFile(name, len(values), len(data), hashlib.sha256(data).hexdigest())


def write_all(folder: Path, counts: list[int]) -> Manifest:
    """Files of so many rows, numbered through."""
    files, at = [], 0
    for number, count in enumerate(counts):
        files.append(write_file(folder, f"train-{number:05d}.parquet", list(range(at, at + count))))
        at += count
    heldout = (write_file(folder, "heldout-00000.parquet", [0]),)
    manifest = Manifest("toy", "there", "MIT", {"train": tuple(files), "heldout": heldout}, {"a": 1}, (), 0, "f")
    (folder / MANIFEST).write_text(manifest.to_json())
    return manifest


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


def test_a_file_that_cannot_be_read_stops_with_what_to_do(tmp_path):
    with pytest.raises(
        DataError, match=r"train-00000.parquet cannot be read: .*; prepare the data again with --verify"
    ):
        FileCache(tmp_path / "c", 10**9, 4).table(described(encoded([1]), 1), Folder(str(tmp_path)).read)


class Store:
    """Where files are fetched from; counts, and gives other bytes for the first few times."""

    def __init__(self, data: bytes, bad: int = 0) -> None:
        self.data, self.bad, self.fetched = data, bad, 0

    def __call__(self, name: str) -> bytes:
        self.fetched += 1
        return self.data[:-1] + b"!" if self.fetched <= self.bad else self.data


def described(data: bytes, rows: int, name: str = "train-00000.parquet") -> TableFile:
    return TableFile(name, rows, len(data), hashlib.sha256(data).hexdigest())


def test_a_file_is_fetched_once_for_all_processes(tmp_path):
    data = encoded([1, 2])
    store = Store(data)
    for _ in range(3):
        cache = FileCache(tmp_path / "c", 10**9, 4)
        assert cache.table(described(data, 2), store).column("x").to_pylist() == [1, 2]
    assert store.fetched == 1


def test_a_damaged_file_is_fetched_again_once(tmp_path):
    data = encoded([1, 2])
    store = Store(data, bad=1)
    assert FileCache(tmp_path / "c", 10**9, 4).table(described(data, 2), store).num_rows == 2
    assert store.fetched == 2


def test_a_copy_that_a_power_cut_left_empty_is_fetched_again(tmp_path):
    data = encoded([1, 2])
    store, file = Store(data), described(data, 2)
    cache = FileCache(tmp_path / "c", 10**9, 4)
    cache.ensure(file, store).write_bytes(b"")
    assert cache.table(file, store).column("x").to_pylist() == [1, 2]
    assert store.fetched == 2


def test_a_copy_that_another_process_threw_away_is_fetched_again(tmp_path, monkeypatch):
    data, ensure = encoded([1, 2]), FileCache.ensure
    store, file = Store(data), described(data, 2)

    def thrown_away_at_first(*given):
        path = ensure(*given)
        if store.fetched < 3:
            path.unlink()
        return path

    monkeypatch.setattr(FileCache, "ensure", thrown_away_at_first)
    assert FileCache(tmp_path / "c", 10**9, 4).table(file, store).num_rows == 2
    assert store.fetched == 3
    monkeypatch.setattr(FileCache, "ensure", lambda *_: tmp_path / "never")
    with pytest.raises(DataError, match="give a larger --data-cache"):
        FileCache(tmp_path / "c", 10**9, 4).table(file, store)


def test_a_file_that_stays_damaged_stops_with_its_name(tmp_path):
    data = encoded([1, 2])
    store = Store(data, bad=9)
    with pytest.raises(DataError, match=r"train-00000.parquet is damaged") as stop:
        FileCache(tmp_path / "c", 10**9, 4).table(described(data, 2), store)
    assert store.fetched == 2
    assert "\n" not in str(stop.value)
    assert not list((tmp_path / "c").glob("*.arrow"))


def test_the_cache_keeps_its_limit_and_what_was_used_last(tmp_path):
    contents = [encoded(list(range(n * 1000, n * 1000 + 1000))) for n in range(6)]
    files = [described(data, 1000, f"train-{n:05d}.parquet") for n, data in enumerate(contents)]
    each = FileCache(tmp_path / "one", 10**9, 1).ensure(files[5], Store(contents[5])).stat().st_size
    cache = FileCache(tmp_path / "c", 3 * each, keep_open=1)
    for file, data in zip(files, contents, strict=True):
        cache.ensure(files[0], Store(contents[0]))  # used again and again
        cache.ensure(file, Store(data))
    kept = {path.stem for path in (tmp_path / "c").glob("*.arrow")}
    assert sum(path.stat().st_size for path in (tmp_path / "c").glob("*.arrow")) <= 3 * each
    assert {files[0].sha256, files[5].sha256} <= kept
    assert files[1].sha256 not in kept


def test_what_was_thrown_away_while_it_was_open_can_still_be_read(tmp_path):
    manifest = write_all(tmp_path / "d", [2000, 2000, 2000])
    found = table(tmp_path / "d", manifest, cache_gb=1e-6)
    order = np.random.default_rng(0).permutation(6000)
    assert found.rows(order, ["x"])["x"].to_pylist() == list(order)


def test_the_next_files_are_fetched_ahead(tmp_path):
    manifest = write_all(tmp_path / "d", [10] * 6)
    found = table(tmp_path / "d", manifest, window=1)
    first = int(found.order.opened(0, 0).blocks[0])
    found.fetch_ahead(0, 0, first * 10)
    wanted = {manifest.files["train"][n].sha256 for n in found.order.opened(0, 0).blocks[:2]}
    for thread in threading.enumerate():
        if thread.name == "fetch-ahead":
            thread.join(30)
    assert {path.stem for path in (tmp_path / "cache/tables").glob("*.arrow")} == wanted


def test_the_manifest_is_plain_json(tmp_path):
    write_all(tmp_path / "d", [2])
    content = json.loads((tmp_path / "d" / MANIFEST).read_text())
    assert content["files"]["train"][0]["sha256"]
    assert content["licence"] == "MIT"
    assert content["samples"] == {"train": 2, "heldout": 1}


def test_what_killed_processes_left_does_not_stay(tmp_path):
    """They wrote beside the place; the limit does not count such files."""
    (tmp_path / "c").mkdir()
    for name, age_s in ((".old.arrow.1a2b3c4d", 7200), (".new.arrow.1a2b3c4d", 1)):
        (tmp_path / "c" / name).write_text("part")
        os.utime(tmp_path / "c" / name, (time.time() - age_s,) * 2)
    data = encoded([1, 2])
    FileCache(tmp_path / "c", 10**9, 4).ensure(described(data, 2), Store(data))
    assert [path.name for path in (tmp_path / "c").glob(".*arrow*")] == [".new.arrow.1a2b3c4d"]
