"""Places for workers in Ray Train's worker group: those that are filled, and those that wait for a process."""

import time
from dataclasses import dataclass, field
from typing import Any

from ray.train.v2._internal.execution.worker_group.worker import Worker

from orchestrator.errors import last_line

NODE_DIED = "its node has died"  # GenNodeDiedCause in Ray's gcs_actor_manager.cc


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


def tell_ended(coordinator: Any, came_s: float, error: Exception) -> None:
    """A worker's process has ended; one that ended with its node says nothing of what may be wrong with the run."""
    if NODE_DIED not in str(error):
        coordinator.process_ended.remote(came_s, last_line(error))
