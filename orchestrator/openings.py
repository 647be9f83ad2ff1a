"""Places for workers in Ray Train's worker group: those that are filled, and those that wait for a process."""

import time
from dataclasses import dataclass, field
from typing import Any

from ray.train.v2._internal.execution.worker_group.worker import Worker


@dataclass
class Opening:
    """A worker that is missing.

    Attributes:
        failures: workers in a row that ended here soon.
        not_before_s: monotonic time before which nobody is asked for.
        actor, asked, asked_s: the one that is awaited, since when (seconds since 1970).
        node: what was asked of the id of its node.
    """

    failures: int = 0
    not_before_s: float = 0.0
    actor: Any = None
    asked: Any = None
    asked_s: float = 0.0
    node: str = ""


@dataclass
class Filled:
    """A worker that was started, when, and how often others ended soon in its place."""

    worker: Worker
    failures: int = 0
    since_s: float = field(default_factory=time.monotonic)
    poll: Any = None
    asked_s: float = 0.0

    def ask(self) -> None:
        """How it is, unless an answer is still awaited."""
        if self.poll is None:
            self.poll, self.asked_s = self.worker.actor.poll_status.remote(), time.monotonic()


def last_line(error: Exception) -> str:
    """Of its text, which may be a traceback."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
