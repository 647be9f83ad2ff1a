"""How fast steps were taken: of late, and by one command in all."""

from array import array
from collections import deque
from collections.abc import Sequence
from typing import Any

WINDOW_S = 10.0


def clock(seconds: float) -> str:
    """Minutes and seconds, such as 41:09."""
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"


class Pace:
    """Of committed steps, in order."""

    def __init__(self) -> None:
        self._recent: deque[tuple[float, int]] = deque(maxlen=4096)  # when, and samples
        self._step_s = array("d")  # of this command's steps
        self._first = 0

    def take(self, records: Sequence[dict[str, Any]]) -> None:
        """Lines of metrics.jsonl, each of the step after the one before."""
        if not self._step_s and records:
            self._first = records[0]["step"]
        self._recent.extend((r["time_s"], r["samples"]) for r in records)
        self._step_s.extend(r["step_s"] for r in records)

    def newest(self, count: int) -> list[float]:
        """Seconds of the last `count` steps, or of fewer."""
        return self._step_s[-count:].tolist()

    def cut(self, step: int) -> None:
        """Steps after `step` are void."""
        del self._step_s[max(0, step + 1 - self._first) :]

    def begin(self) -> None:
        """A generation begins: what was before says nothing of its speed."""
        self._recent.clear()

    @property
    def seconds(self) -> float:
        """Of all steps that count, in which they were computed."""
        return sum(self._step_s)

    def rates(self) -> tuple[float, float]:
        """Samples and steps per second of late, by the clock of who took the steps.

        Over ten seconds; where fewer steps than two were taken at different times in them, between the newest two
        times. Steps of one round are there at one time.
        """
        if not self._recent:
            return 0.0, 0.0
        end = self._recent[-1][0]
        earlier = [t for t, _ in self._recent if t < end]
        if not earlier:
            return 0.0, 0.0
        begin = next((t for t in earlier if t >= end - WINDOW_S), earlier[-1])
        samples = [n for t, n in self._recent if begin < t <= end]
        return sum(samples) / (end - begin), len(samples) / (end - begin)
