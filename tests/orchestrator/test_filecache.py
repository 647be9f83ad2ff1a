"""The cache of prepared files: fetched once, checked whenever they are opened, bounded, and of use on a full disk."""

import errno
import fcntl
import hashlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from table_files import Store, described, encoded

from orchestrator import filecache
from orchestrator.errors import DataError, MachineError
from orchestrator.filecache import FileCache
from orchestrator.storage import Folder

WAIT_S = 30


def test_a_file_that_cannot_be_read_stops_with_what_to_do(tmp_path):
    with pytest.raises(
        DataError, match=r"train-00000.parquet cannot be read: .*; prepare the data again with --verify"
    ):
        FileCache(tmp_path / "c", 10**9, 4).table(described(encoded([1]), 1), Folder(str(tmp_path)).read)


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
    Path(cache.ensure(file, store)).write_bytes(b"")
    assert cache.table(file, store).column("x").to_pylist() == [1, 2]
    assert store.fetched == 2


def flipped(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: flipped(raw, len(raw) // 2),
        lambda raw: flipped(raw, len(raw) - 1),
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-1],
        lambda raw: raw[:-32],  # as older versions wrote it
        lambda raw: raw[:20],
        lambda raw: raw[-32:],
        lambda raw: raw + raw[-32:],
        lambda raw: hashlib.sha256(b"").digest(),
    ],
)
def test_a_damaged_copy_is_fetched_again_when_it_is_opened(tmp_path, damage):
    data = encoded([1, 2])
    store, file = Store(data), described(data, 2)
    copy = Path(FileCache(tmp_path / "c", 10**9, 4).ensure(file, store))
    whole = copy.read_bytes()
    assert hashlib.sha256(whole[:-32]).digest() == whole[-32:]
    copy.write_bytes(damage(whole))
    found = FileCache(tmp_path / "c", 10**9, 4).table(file, store)
    assert found.to_pydict() == {"x": [1, 2], "name": ["n1", "n2"]}
    assert (store.fetched, copy.read_bytes()) == (2, whole)


@given(st.data())
def test_any_byte_of_a_copy_is_checked(tmp_path_factory, data):
    content = encoded([1, 2])
    store, file = Store(content), described(content, 2)
    folder = tmp_path_factory.mktemp("cache")
    copy = Path(FileCache(folder, 10**9, 4).ensure(file, store))
    whole = copy.read_bytes()
    copy.write_bytes(flipped(whole, data.draw(st.integers(0, len(whole) - 1))))
    assert FileCache(folder, 10**9, 4).table(file, store).column("x").to_pylist() == [1, 2]
    assert store.fetched == 2


def test_a_copy_that_cannot_be_touched_is_used_all_the_same(tmp_path, monkeypatch):
    """Another user's."""
    data = encoded([1, 2])
    store, file = Store(data), described(data, 2)
    FileCache(tmp_path / "c", 10**9, 4).ensure(file, store)

    def not_ours(*_, **__):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "utime", not_ours)
    monkeypatch.setattr(FileCache, "_alone", not_ours)
    assert FileCache(tmp_path / "c", 10**9, 4).table(file, store).num_rows == 2
    assert store.fetched == 1


def test_a_copy_that_another_process_threw_away_is_fetched_again(tmp_path, monkeypatch):
    data, ensure = encoded([1, 2]), FileCache.ensure
    store, file = Store(data), described(data, 2)

    def thrown_away_at_first(*given):
        path = ensure(*given)
        if store.fetched < 3:
            os.remove(path)
        return path

    monkeypatch.setattr(FileCache, "ensure", thrown_away_at_first)
    assert FileCache(tmp_path / "c", 10**9, 4).table(file, store).num_rows == 2
    assert store.fetched == 3
    monkeypatch.setattr(FileCache, "ensure", lambda *_: str(tmp_path / "never"))
    with pytest.raises(DataError, match="give a larger --data-cache"):
        FileCache(tmp_path / "c", 10**9, 4).table(file, store)


def test_a_copy_may_be_thrown_away_while_it_is_looked_at(tmp_path, monkeypatch):
    """Where the cache is small beside what the processes of a node have open."""
    data = encoded([1, 2])
    store, file = Store(data), described(data, 2)
    cache = FileCache(tmp_path / "c", 10**9, 4)
    path, look = cache.ensure(file, store), filecache.whole_since_boot

    def slow(*given):
        os.remove(path)
        return look(*given)

    monkeypatch.setattr(filecache, "whole_since_boot", slow)
    assert cache.table(file, store).column("x").to_pylist() == [1, 2]
    assert store.fetched == 1


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
    each = os.path.getsize(FileCache(tmp_path / "one", 10**9, 1).ensure(files[5], Store(contents[5])))
    cache = FileCache(tmp_path / "c", 3 * each, keep_open=1)
    for file, data in zip(files, contents, strict=True):
        cache.ensure(files[0], Store(contents[0]))  # used again and again
        cache.ensure(file, Store(data))
    kept = {path.stem for path in (tmp_path / "c").glob("*.arrow")}
    assert sum(path.stat().st_size for path in (tmp_path / "c").glob("*.arrow")) <= 3 * each
    assert {files[0].sha256, files[5].sha256} <= kept
    assert files[1].sha256 not in kept


def test_what_killed_processes_left_does_not_stay(tmp_path):
    """They wrote beside the place; the limit does not count such files."""
    (tmp_path / "c").mkdir()
    for name, age_s in ((".old.arrow.1a2b3c4d", 7200), (".new.arrow.1a2b3c4d", 1)):
        (tmp_path / "c" / name).write_text("part")
        os.utime(tmp_path / "c" / name, (time.time() - age_s,) * 2)
    data = encoded([1, 2])
    FileCache(tmp_path / "c", 10**9, 4).ensure(described(data, 2), Store(data))
    assert [path.name for path in (tmp_path / "c").glob(".*arrow*")] == [".new.arrow.1a2b3c4d"]


def test_what_a_process_left_that_was_killed_at_the_same_file_goes_at_once(tmp_path):
    data = encoded([1, 2])
    file = described(data, 2)
    (tmp_path / "c").mkdir()
    for sha256 in (file.sha256, "0" * 64):  # another process may be writing the other
        (tmp_path / "c" / f".{sha256}.arrow.1a2b3c4d").write_text("part")
    assert FileCache(tmp_path / "c", 10**9, 4).table(file, Store(data)).num_rows == 2
    left = {path.name for path in (tmp_path / "c").iterdir()}
    assert left == {f"{file.sha256}.arrow", f".{'0' * 64}.arrow.1a2b3c4d"}


def disk_fails(monkeypatch, number: int, times: int) -> None:
    """The next times that a file is written."""
    write, asked = FileCache._write, []

    def fails(data, path):
        asked.append(path)
        if len(asked) <= times:
            raise OSError(number, os.strerror(number))
        write(data, path)

    monkeypatch.setattr(FileCache, "_write", staticmethod(fails))


@pytest.fixture
def three(tmp_path):
    """(a cache that holds two of three files, the files, where each is fetched from)"""
    contents = [encoded([n, n]) for n in range(3)]
    files, stores = [described(data, 2) for data in contents], [Store(data) for data in contents]
    cache = FileCache(tmp_path / "c", 10**9, 4)
    opened = [cache.table(file, store) for file, store in zip(files[:2], stores, strict=False)]
    assert [table.column("x").to_pylist() for table in opened] == [[0, 0], [1, 1]]
    return cache, files, stores


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_on_a_full_disk_a_file_takes_the_place_of_the_others(tmp_path, monkeypatch, three, number):
    cache, files, stores = three
    disk_fails(monkeypatch, number, 1)
    assert cache.table(files[2], stores[2]).column("x").to_pylist() == [2, 2]
    assert [path.name for path in (tmp_path / "c").iterdir()] == [f"{files[2].sha256}.arrow"]
    assert cache.table(files[0], stores[0]).column("x").to_pylist() == [0, 0], "open maps stay good"
    assert [store.fetched for store in stores] == [1, 1, 1]


@pytest.mark.parametrize(
    ("number", "times", "kept"),
    [(errno.ENOSPC, 2, 0), (errno.EDQUOT, 2, 0), (errno.EROFS, 1, 2), (errno.EACCES, 1, 2), (errno.EIO, 1, 2)],
)
def test_a_disk_that_cannot_be_used_is_named(tmp_path, monkeypatch, three, number, times, kept):
    """The other files go where room is what is missing, and only there."""
    cache, files, stores = three
    disk_fails(monkeypatch, number, times)
    with pytest.raises(MachineError) as stop:
        cache.table(files[2], stores[2])
    line = f"the data cache {tmp_path / 'c'} cannot be used ({os.strerror(number)}); "
    assert str(stop.value) == line + "make room there, or name another folder in ORCHESTRATOR_CACHE"
    assert len(list((tmp_path / "c").iterdir())) == kept


def test_a_cache_that_is_no_folder_is_named(tmp_path):
    (tmp_path / "c").write_text("")
    data = encoded([1])
    with pytest.raises(
        MachineError, match=rf"the data cache {tmp_path}/c/tables cannot be used \(.*ORCHESTRATOR_CACHE$"
    ):
        FileCache(tmp_path / "c" / "tables", 10**9, 4).table(described(data, 1), Store(data))


def test_a_file_that_is_being_written_is_not_taken_for_one_of_a_killed_process(tmp_path, monkeypatch):
    """One waits for another, who then cannot fetch it; a third comes when the one has begun to write."""
    data = encoded([1, 2])
    file, cache = described(data, 2), FileCache(tmp_path / "c", 10**9, 4)
    fetching, give_up, writing, go_on = (threading.Event() for _ in range(4))
    waits = {"one": threading.Event(), "other": threading.Event()}
    flock, fsync = fcntl.flock, os.fsync

    def locked(held, how):
        try:
            flock(held, how | fcntl.LOCK_NB)
        except BlockingIOError:
            waits[threading.current_thread().name.split("_")[0]].set()
            flock(held, how)

    def flushed(number):
        if threading.current_thread().name.startswith("one"):
            writing.set()
            assert go_on.wait(WAIT_S)
        fsync(number)

    def away(_):
        fetching.set()
        assert give_up.wait(WAIT_S)
        raise OSError("away")

    monkeypatch.setattr(fcntl, "flock", locked)
    monkeypatch.setattr(os, "fsync", flushed)
    with ThreadPoolExecutor(1, "one") as one, ThreadPoolExecutor(1, "other") as other:
        failed = other.submit(cache.ensure, file, away)
        assert fetching.wait(WAIT_S)
        made = one.submit(cache.ensure, file, Store(data))
        assert waits["one"].wait(WAIT_S)
        give_up.set()
        with pytest.raises(DataError, match="away"):
            failed.result(WAIT_S)
        assert writing.wait(WAIT_S)
        third = other.submit(cache.ensure, file, Store(data))
        third.add_done_callback(lambda _: waits["other"].set())
        assert waits["other"].wait(WAIT_S)
        go_on.set()
        assert made.result(WAIT_S) == third.result(WAIT_S)
