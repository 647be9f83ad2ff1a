"""Files with a checksum at their end are read whole once, and not by everybody who opens them."""

import os

from table_files import Store, described, encoded

from orchestrator import sealed
from orchestrator.filecache import FileCache


def test_many_processes_read_a_copy_once(tmp_path, monkeypatch):
    """All of it, that is, to see whether it is whole; again when it has changed, and when the machine has started."""
    content = encoded([1, 2])
    store, file = Store(content), described(content, 2)
    copy, digest, read = FileCache(tmp_path / "c", 10**9, 4).ensure(file, store), sealed._digest, []
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
