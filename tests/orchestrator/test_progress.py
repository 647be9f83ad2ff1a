"""What a person sees of long work: a bar on a terminal, lines elsewhere; its rate is that of steps of late."""

import io
import sys

import pytest

from orchestrator import measured
from orchestrator.measured import counted
from orchestrator.progress import Progress
from orchestrator.seats import Status


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def status(step: int, rate: float) -> Status:
    return Status(
        joined=2, workers=2, missing=0, generation=3, step=step, loss=0.5, samples_per_s=64 * rate, steps_per_s=rate,
        phase="training", outcome="", message="", exit_status=0, result=None, notice="",
    )  # fmt: skip


def test_the_bar_of_a_resumed_run_tells_the_rate_of_its_steps_of_late(monkeypatch):
    """90,000 steps were there already: they are in the bar, and in no rate."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    with Progress(100_000, lambda: 2) as progress:
        progress.show(status(90_000, 4.0), stopping=False)
        progress.show(status(90_004, 4.0), stopping=False)
    shown = terminal.getvalue().split("\r")[-1]
    assert "90004/100000" in shown
    assert "256 samples/s" in shown
    assert "41:39 left" in shown
    assert "step/s" not in shown


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

    found = Clock()
    monkeypatch.setattr(measured, "time", found)
    return found


def test_lines_elsewhere_are_few_and_tell_what_is_left(clock, capsys):
    for _ in counted(range(100), 100, "fine-tuning: step"):
        clock.now += 2.0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "fine-tuning: step 3 of 100  3:14 left"
    assert lines[1] == "fine-tuning: step 6 of 100  3:08 left"
    assert len(lines) == 33
    assert "\r" not in "".join(lines)


def test_what_is_over_soon_is_not_told_of(clock, capsys):
    assert list(counted(iter("abc"), 3, "fine-tuning: step")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(counted(range(3), 3, "fine-tuning: step")) == [0, 1, 2]
    assert "fine-tuning: step" in terminal.getvalue()
