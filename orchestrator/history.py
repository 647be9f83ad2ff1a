"""What a run folder tells of its run, whether that is over, going on, or broke off: read from the files alone."""

import io
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.json
from numpy.typing import NDArray

from orchestrator.failure import Failure
from orchestrator.jsonlines import parse_line, records
from orchestrator.runfolder import EVENTS, METRICS, RunFolder
from orchestrator.storage import Folder

ALIVE_S = 60.0  # a run that has written something so lately is taken to be going on
STEP_PARTS = {"data": "data_share", "forward and backward": "compute_share", "reduction": "reduce_share"}
SLOW_STEPS = 10  # a run whose steps take long writes as seldom
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class History:
    """A run as its folder tells it.

    Attributes:
        uri: of the run folder.
        config: its settings, "workload" among them.
        result: result.json, None where there is none.
        events: the records of events.jsonl in order.
        steps: metrics.jsonl as columns by key, float64 [steps]; a key that a record lacks is NaN there.
        read_s: when it was read, seconds since 1970.
    """

    uri: str
    config: dict[str, Any]
    result: dict[str, Any] | None
    events: list[dict[str, Any]]
    steps: dict[str, Floats]
    read_s: float

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.uri.rstrip("/").rsplit("/", 1)[-1])

    def of_kind(self, *kinds: str) -> list[dict[str, Any]]:
        """The events of these kinds."""
        return [event for event in self.events if event["event"] in kinds]

    @property
    def started_s(self) -> float:
        """When the first command began, seconds since 1970."""
        return float(self.events[0]["time_s"]) if self.events else self.read_s

    @property
    def last_s(self) -> float:
        """When it last wrote something down, seconds since 1970."""
        times = [event["time_s"] for event in self.events[-1:]] + self.column("time_s")[-1:].tolist()
        return float(max(times, default=0.0))

    @property
    def seconds(self) -> float:
        """From the first line of its events to the last; 0: there are none."""
        return max(0.0, self.last_s - self.started_s)

    def column(self, key: str) -> Floats:
        """One column of `steps`; empty where no record has the key."""
        return self.steps.get(key, np.empty(0))

    @property
    def outcome(self) -> str:
        """finished, stopped or failed; "going on", or "broke off" where nothing has been written for a while."""
        if self.result:
            return str(self.result["status"])
        if not self.last_s:
            return "nothing written yet"
        alive_s = max([ALIVE_S, *(SLOW_STEPS * self.column("step_s")[-50:])])
        if self.read_s - self.last_s < alive_s:
            return "going on"
        phases = self.of_kind("phase_began")
        waits = phases and phases[-1]["missing"] and phases[-1] is self.events[-1]
        return "waiting for workers, or broke off" if waits else "broke off"

    def commands(self) -> list[tuple[float, float]]:
        """From when until when each command worked on the run, by what it wrote; seconds since 1970."""
        begun = [float(event["time_s"]) for event in self.of_kind("run_started")]
        ends = [*begun[1:], float("inf")][: len(begun)]
        return [(begin, self.newest_before(end)) for begin, end in zip(begun, ends, strict=True)]

    def newest_before(self, time_s: float) -> float:
        """When it last wrote something down before `time_s`; seconds since 1970."""
        found = [float(event["time_s"]) for event in self.events if event["time_s"] < time_s]
        steps = self.column("time_s")
        return max([*found[-1:], *steps[steps < time_s][-1:].tolist()], default=time_s)

    @property
    def worked_s(self) -> float:
        """Wall time of all commands that worked on the run."""
        *earlier, last = [end - begin for begin, end in self.commands()] or [self.seconds]
        return sum(earlier) + float((self.result or {}).get("wall_s") or last)

    @property
    def failure(self) -> Failure | None:
        """How it failed; None: it did not, or nobody could write that down."""
        told = (self.result or {}).get("failure")
        return Failure(**told) if told else None

    @property
    def total_steps(self) -> int:
        """How many steps the run is to have; 0: not known."""
        started = self.of_kind("run_started")
        return int(started[-1]["total_steps"]) if started else 0

    @property
    def incidents(self) -> list[dict[str, Any]]:
        """Of all commands that worked on the run; result.json has those of the last one."""
        return self.of_kind("incident")


def read_history(uri: str) -> History:
    """Read a run folder, a local one or a URI; raises UserError where there is no run."""
    folder = RunFolder(Folder(uri, "RUN"))
    config = folder.settings()
    events = records(folder.text(EVENTS) or "")
    return History(
        uri, config, folder.result(), events, _columns(folder.folder.tail(METRICS, sys.maxsize)), time.time()
    )


def _columns(data: bytes) -> dict[str, Floats]:
    whole = data[: data.rfind(b"\n") + 1]
    if not whole:
        return {}
    options = pyarrow.json.ReadOptions(block_size=max(2**20, min(len(whole), 2**26)))
    try:
        table = pyarrow.json.read_json(io.BytesIO(whole), read_options=options)
    except pa.ArrowInvalid:  # a line that is none
        good = [line for line in whole.splitlines() if parse_line(line.decode(errors="replace")) is not None]
        if len(good) == len(whole.splitlines()):
            raise
        return _columns(b"".join(line + b"\n" for line in good))
    return {
        name: column.cast(pa.float64()).to_numpy()
        for name, column in zip(table.column_names, table.columns, strict=True)
        if pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    }


@dataclass(frozen=True)
class Curve:
    """A long curve by a few points: for each stretch of it the mean, the smallest and the largest value."""

    x: Floats
    mean: Floats
    low: Floats
    high: Floats


def thin(x: Floats, y: Floats, points: int) -> Curve:
    """At most `points` stretches of equal numbers of values; values that are not finite are left out."""
    known = np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) <= points:
        return Curve(x, y, y, y)
    edges = np.linspace(0, len(x), points + 1).astype(np.int64)
    starts, counts = edges[:-1], np.diff(edges)
    means = np.add.reduceat(y, starts) / counts
    return Curve(x[edges[1:] - 1], means, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts))


def training_shares(history: History) -> dict[str, float]:
    """Where the time of all steps went: shares of data, forward and backward, reduction, optimizer and checkpoints.

    The optimizer's is what is left of a step; checkpoints' is how long training waited for them.
    """
    seconds = history.column("step_s")
    if not len(seconds):
        return {}
    found = {
        name: float(np.nansum(history.column(key) * seconds)) if key in history.steps else 0.0
        for name, key in STEP_PARTS.items()
    }
    found["optimizer and the rest"] = max(0.0, float(seconds.sum()) - sum(found.values()))
    found["checkpoints"] = float(sum(event["stall_s"] for event in history.of_kind("checkpoint_saved")))
    whole = sum(found.values())
    return {name: value / whole for name, value in found.items()}
