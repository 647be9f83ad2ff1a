"""The records of events.jsonl: one frozen dataclass a kind, units in the keys."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RunStarted:
    """A command began or took up the run."""

    workload: str
    total_steps: int
    shards: int
    batch_size: int
    data: str
    resumed: bool


@dataclass(frozen=True)
class GenerationStarted:
    """A fixed set of workers begins to train; by rank: first and last + 1 shard, node, process id."""

    generation: int
    step: int
    workers: int
    ranges: list[list[int]]
    nodes: list[str]
    pids: list[int]
    device: str


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint is whole. `stall_s`: how long training waited; `write_s`: in the background."""

    step: int
    bytes: int
    stall_s: float
    write_s: float


@dataclass(frozen=True)
class CheckpointRejected:
    """A checkpoint could not be used and was passed over."""

    reason: str


@dataclass(frozen=True)
class CheckpointLoaded:
    """Training goes on from this checkpoint."""

    step: int
    load_s: float


@dataclass(frozen=True)
class Evaluated:
    """Held-out metrics after `step` steps."""

    step: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Incident:
    """What ended a generation before the run's end."""

    kind: str
    step: int
    workers_before: int
    workers_after: int
    steps_lost: int
    recovery_s: float


@dataclass(frozen=True)
class WorkerFailed:
    """A worker raised an error; its traceback is in logs/errors.log."""

    rank: int
    step: int
    error: str


@dataclass(frozen=True)
class RunEnded:
    """The command's end: finished, stopped or failed."""

    status: str
    step: int
    reason: str


Event = (
    RunStarted
    | GenerationStarted
    | CheckpointSaved
    | CheckpointRejected
    | CheckpointLoaded
    | Evaluated
    | Incident
    | WorkerFailed
    | RunEnded
)


def record(event: Event, time_s: float) -> dict[str, Any]:
    """One line of events.jsonl: `time_s` (seconds since 1970), `event` (run_started, ...), the event's own keys."""
    kind = re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()
    return {"time_s": round(time_s, 3), "event": kind, **dataclasses.asdict(event)}
