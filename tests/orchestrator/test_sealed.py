"""Files with a checksum at their end are read whole once, and not by everybody who opens them."""

import os
import sys
from pathlib import Path

from table_files import Store, described, encoded

from orchestrator import sealed
from orchestrator.filecache import FileCache


def test_many_processes_read_a_copy_once(tmp_path, monkeypatch):
    """All of it, that is, to see whether it is whole; again when it has changed, and when the machine has started."""
    content = encoded([1, 2])
    store, file = Store(content), described(content, 2)
    copy, digest, read = Path(FileCache(tmp_path / "c", 10**9, 4).ensure(file, store)), sealed._digest, []
    monkeypatch.setattr(sealed, "_digest", lambda path, count: (read.append(path), digest(path, count))[1])

    def reads() -> int:
        """By a process that opens it now."""
        before = len(read)
        assert FileCache(tmp_path / "c", 10**9, 4).table(file, store).column("x").to_pylist() == [1, 2]
        return len(read) - before

    assert [reads() for _ in range(4)] == [1, 0, 0, 0]
    whole = copy.read_bytes()
    os.utime(copy, ns=(1, 1))
    assert [reads(), reads()] == [1, 0], "something was done to it"
    monkeypatch.setattr(sealed, "_boot", lambda: "the next one")
    assert [reads(), reads()] == [1, 0], "a power cut may leave a name without its content"
    monkeypatch.setattr(sealed, "_boot", lambda: "")
    assert [reads(), reads()] == [1, 1], "it does not know"
    assert store.fetched == 1
    copy.write_bytes(whole[:20] + bytes([whole[20] ^ 1]) + whole[21:])
    assert reads() == 3, "it was found damaged, fetched, sealed, and found whole"
    assert store.fetched == 2


def test_files_that_come_and_go_leave_nothing_in_the_table_of_interned_strings(tmp_path, monkeypatch):
    """It grows by what is added to it, also where that is taken out again: a process that opens files for hours."""
    contents = [encoded([n]) for n in range(12)]
    files = [described(data, 1) for data in contents]
    folder = tmp_path / "c"
    cache = FileCache(folder, 4000, keep_open=1)
    cache.table(files[0], Store(contents[0]))
    interned, intern = set(), sys.intern
    monkeypatch.setattr(sys, "intern", lambda text: interned.add(text) or intern(text))
    for file, data in zip(files, contents, strict=True):
        assert cache.table(file, Store(data)).num_rows == 1
    assert len(list(folder.iterdir())) < 12, "some are thrown away"
    assert not [text for text in interned if "*" not in text]
