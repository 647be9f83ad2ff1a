"""Logs that storage cannot append to: nothing is lost, and a long run does not send all of them every second."""

import threading
import time
from pathlib import Path

import pytest

from orchestrator import latelogs
from orchestrator.latelogs import LateLogs
from orchestrator.storage import Folder


class Slow(Folder):
    """Notes when it was written to; each writing takes `takes_s`."""

    takes_s = 0.0

    def write(self, name: str, content: bytes) -> None:
        self.written = [*getattr(self, "written", []), (name, time.monotonic())]
        self.reached.acquire(timeout=self.takes_s) if self.takes_s else None
        super().write(name, content)

    reached = threading.Semaphore(0)  # nobody releases it: it waits


def until(condition, seconds: float = 20.0) -> None:
    end, look = time.monotonic() + seconds, threading.Event()
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        look.wait(0.01)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latelogs, "EVERY_S", 0.01)


def test_what_is_appended_and_put_is_written_in_order(quick: None, tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    folder.write("a", b"before\n")
    logs = LateLogs(folder, ("a", "b"), "owner")
    for number in range(100):
        logs.append("a", f"{number}\n")
    whole = "before\n" + "".join(f"{number}\n" for number in range(100))
    assert logs.text("a") == whole
    until(lambda: folder.read_text("a") == whole)
    logs.put("a", "new\n")
    logs.append("a", "end\n")
    logs.flush()
    assert folder.read_text("a") == logs.text("a") == "new\nend\n"
    assert folder.read_text("b") is None, "nothing was said"


def test_what_takes_long_to_write_is_written_seldom(quick: None, tmp_path: Path) -> None:
    folder = Slow(str(tmp_path))
    folder.takes_s = 0.05
    logs = LateLogs(folder, ("a",), "owner")
    logs.append("a", "first\n")
    until(lambda: folder.read_text("a") == "first\n")
    logs.append("a", "second\n")
    until(lambda: folder.read_text("a") == "first\nsecond\n")
    first, second = (at_s for _, at_s in folder.written)
    assert second - first > latelogs.REST * 0.05
    logs.append("a", "third\n")
    logs.flush()
    assert folder.read_text("a") == "first\nsecond\nthird\n", "the end does not wait"


def test_what_another_command_has_written_stays(quick: None, tmp_path: Path) -> None:
    """This one was asleep while that took the run over and ended it."""
    folder = Folder(str(tmp_path))
    folder.write("owner", b"mine")
    logs = LateLogs(folder, ("a",), "owner")
    logs.token = "mine"
    logs.append("a", "of mine\n")
    until(lambda: folder.read_text("a") == "of mine\n")
    folder.write("owner", b"another")
    folder.write("a", b"of mine and another\n")
    logs.append("a", "late\n")
    until(lambda: logs.owned_by == "another")
    logs.flush()
    assert folder.read_text("a") == "of mine and another\n"
