"""A worker's notes on their way to the coordinator: rank 0 sends them, the others keep theirs in case it dies."""

import logging
import threading
from collections import deque
from typing import Any

from orchestrator.events import Evaluated, Event

REPORT_EVERY_S = 0.5  # a call takes the coordinator's process a millisecond
KEPT = 8192  # steps; more than what a lost coordinator has not put into storage yet
log = logging.getLogger("orchestrator.reporter")


class Reporter:
    """Sends what rank 0 notes in batches, off the training thread."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._kept: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._records: list[dict[str, Any]] = []
        self._events: list[Event] = []
        self._evaluated: list[Evaluated] = []  # the newest evaluation, if any
        self._closing = False
        self._hurry = threading.Event()
        self._speaks = False
        self._turns = 0  # how often it was settled anew what is to be sent
        self._thread = threading.Thread(target=self._loop, name="reporter", daemon=True)
        self._thread.start()

    def take_over(self, speaks: bool, recorded: int) -> None:
        """A new generation begins.

        Args:
            speaks: whether this worker is rank 0, and sends.
            recorded: the newest step that the coordinator has: later ones that this worker kept are sent again.
        """
        with self._lock:
            self._speaks, self._turns = speaks, self._turns + 1
            self._records = [r for r in self._kept if r["step"] > recorded] if speaks else []
            # The one before may have been lost before it told of the evaluation that all had done.
            self._events = [*self._events, *self._evaluated] if speaks else []

    def forget(self, step: int = -1) -> None:
        """The steps that were taken after `step` are void: the run goes on from there, or (-1) from a checkpoint."""
        with self._lock:
            while self._kept and self._kept[-1]["step"] > step:
                self._kept.pop()
            self._evaluated = [event for event in self._evaluated if event.step <= step]
            self._events = [e for e in self._events if not isinstance(e, Evaluated) or e.step <= step]
            self._records, self._turns = [r for r in self._records if r["step"] <= step], self._turns + 1

    def step(self, record: dict[str, Any], hurry: bool) -> None:
        """A committed step; `hurry` sends it at once."""
        with self._lock:
            self._kept.append(record)
            if self._speaks:
                self._records.append(record)
        if hurry:
            self._hurry.set()

    def event(self, event: Event) -> None:
        with self._lock:
            if isinstance(event, Evaluated):
                self._evaluated = [event]
            if self._speaks:
                self._events.append(event)

    def flush(self) -> None:
        """Send what is left, and wait for it."""
        self._send()

    def keep(self) -> None:
        """Send what is left, and wait until storage has all that was sent, or is known to be away."""
        self._send()
        keep_logs(self._coordinator)

    def close(self) -> None:
        """Send what is left and end."""
        self._closing = True
        self._hurry.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._closing:
            self._hurry.wait(REPORT_EVERY_S)
            self._hurry.clear()
            self._send()

    def _send(self) -> None:
        import ray

        with self._sending:
            with self._lock:
                records, events, turns = self._records, self._events, self._turns
                self._records, self._events = [], []
            if not records and not events:
                return
            try:
                ray.get(self._coordinator.report.remote(records, events))
            except ray.exceptions.RayError:
                log.warning("the coordinator did not take a report of %d steps", len(records), exc_info=True)
                with self._lock:  # it will be restarted: what it does not know is sent again
                    if self._speaks:
                        self._events = events + self._events
                    if turns == self._turns:  # else these steps are among the others already, or void
                        self._records = records + self._records


def keep_logs(coordinator: Any) -> None:
    """Wait until storage has all that was sent to the coordinator, or is known to be away."""
    import ray

    try:
        ray.get(coordinator.report.remote([], [], True))
    except ray.exceptions.RayError:
        log.warning("the logs are not in storage yet", exc_info=True)
