"""What a person sees of a run: a live bar on a terminal, one line every few seconds elsewhere."""

import math
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from orchestrator.pace import clock
from orchestrator.seats import Status

LINE_EVERY_S = 5.0
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"  # tqdm's own rate counts waiting, and steps of before


class Progress:
    """Shows Status after Status; on a terminal with tqdm, else in lines without control characters."""

    def __init__(self, total_steps: int, nodes: Callable[[], int]) -> None:
        """Args:
        nodes: asked for the number of the cluster's nodes while workers are waited for.
        """
        self._total, self._nodes = total_steps, nodes
        self._waiting_since = time.monotonic()
        self._bar: Any = None
        self._last_line_s = 0.0
        self._phase = self._notice = ""

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._total, dynamic_ncols=True, leave=True, bar_format=BAR)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, status: Status, stopping: bool) -> None:
        """Show where the run is."""
        if status.notice and status.notice != self._notice:
            self._notice = status.notice
            self._say(f"note: {status.notice}")
        phase = "stopping after a checkpoint" if stopping and not status.outcome else status.phase
        if not status.missing:
            self._waiting_since = time.monotonic()
        if self._bar is not None:
            self._show_bar(status, phase)
        else:
            self._show_line(status, phase)

    def _say(self, line: str) -> None:
        """A line that stays, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def _show_bar(self, status: Status, phase: str) -> None:
        self._bar.n = status.step
        if phase == "training":
            self._bar.set_description(f"generation {status.generation}")
            self._bar.set_postfix_str(_figures(status) + self._left(status), refresh=False)
        else:
            self._bar.set_description(self._waiting_for(status, phase))
        self._bar.refresh()

    def _show_line(self, status: Status, phase: str) -> None:
        """A line when the phase changes, and every few seconds."""
        now = time.monotonic()
        if phase == self._phase and now - self._last_line_s < LINE_EVERY_S:
            return
        if phase == "training":
            line = f"step {status.step}/{self._total}  {_figures(status)}{self._left(status)}"
        else:
            line = self._waiting_for(status, phase)
        print(line, file=sys.stderr, flush=True)
        self._phase, self._last_line_s = phase, now

    def _waiting_for(self, status: Status, phase: str) -> str:
        """One line on what is being waited for."""
        if not (status.missing and phase.startswith("waiting")):
            return phase
        asked_s = time.monotonic() - self._waiting_since
        there = f"{status.missing} more needed, {status.joined} there, {self._nodes()} nodes up"
        return f"{phase}: {there}; Ray was asked for them {asked_s:.0f} s ago"

    def _left(self, status: Status) -> str:
        if not status.steps_per_s or status.step >= self._total:
            return ""
        return f"  {clock((self._total - status.step) / status.steps_per_s)} left"


def _figures(status: Status) -> str:
    loss = "" if math.isnan(status.loss) else f"loss {status.loss:.4f}  "
    return f"{loss}{status.samples_per_s:.0f} samples/s  {status.workers} workers"
