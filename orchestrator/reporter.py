"""Rank 0's notes on their way to the coordinator."""

import logging
import threading
from typing import Any

from orchestrator.events import Event

REPORT_EVERY_S = 0.2
log = logging.getLogger("orchestrator.reporter")


class Reporter:
    """Sends what rank 0 notes to the coordinator in batches, off the training thread."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator
        self._lock = threading.Lock()
        self._records: list[dict[str, Any]] = []
        self._events: list[Event] = []
        self._closing = threading.Event()
        self.stop = False
        self._thread = threading.Thread(target=self._loop, name="reporter", daemon=True)
        self._thread.start()

    def step(self, record: dict[str, Any]) -> None:
        with self._lock:
            self._records.append(record)

    def event(self, event: Event) -> None:
        with self._lock:
            self._events.append(event)

    def close(self) -> None:
        """Send what is left."""
        self._closing.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._closing.wait(REPORT_EVERY_S):
            self._send()
        self._send()

    def _send(self) -> None:
        import ray

        with self._lock:
            records, events = self._records, self._events
            self._records, self._events = [], []
        try:
            self.stop = ray.get(self._coordinator.report.remote(records, events)) or self.stop
        except ray.exceptions.RayError:
            log.exception("the coordinator did not take a report of %d steps", len(records))
