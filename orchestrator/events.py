"""The records of events.jsonl: one frozen dataclass a kind, units in the keys."""

import dataclasses
import re
from collections.abc import Mapping
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
    coordinator_pid: int
    parallel: str = "ddp"


@dataclass(frozen=True)
class PhaseBegan:
    """What the run is about, and whom it waits for: workers that are there, and that are missing."""

    phase: str
    joined: int
    missing: int


@dataclass(frozen=True)
class ModelCompiled:
    """A worker has compiled the model, and will ask for a seat (--compile).

    Attributes:
        machine: what compiled bits depend on: the CPU's vector unit and the compiler, or the GPU.
        compile_s: seconds, waiting for another worker of the machine included.
        cached: whether all of it was there from an earlier time.
    """

    node: str
    pid: int
    machine: str
    compile_s: float
    cached: bool


@dataclass(frozen=True)
class PrecisionChosen:
    """--precision auto was settled; `seconds` of forward and backward of a microbatch in each."""

    precision: str
    seconds: dict[str, float]


@dataclass(frozen=True)
class GenerationStarted:
    """A fixed set of workers begins to train; by rank: first and last + 1 shard, node, process id, device.

    `device`, of rank 0: its kind and what else bits depend on: the vector unit of a CPU, the model of a GPU or TPU;
    where the model is compiled, ModelCompiled's `machine`.
    """

    generation: int
    step: int
    workers: int
    ranges: list[list[int]]
    nodes: list[str]
    pids: list[int]
    device: str
    devices: list[str] = dataclasses.field(default_factory=list)


@dataclass(frozen=True)
class DevicesMixed:
    """Workers of another kind of device than before: bits are promised for one kind. By rank, and all kinds so far."""

    generation: int
    devices: list[str]
    kinds: list[str]


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
    """What ended a generation before the run's end.

    Attributes:
        kind: worker_killed, worker_failed (it raised), worker_frozen, worker_stuck, connection_lost, node_lost,
            node_drained, workers_joined, worker_unreachable (by the others), coordinator_lost, server_lost,
            rebalanced, straggler_left.
        step: the last committed one.
        detail: what is known of the cause, one line.
        steps_lost: committed steps that had to be taken again.
        detect_s: from the last sign of life to the generation's end.
        regroup_s: from there until the next generation is connected.
        restore_s: state handed to who has none, or loaded from a checkpoint.
        recompute_s: until the next step is committed.
        recovery_s: from the generation's end to the next committed step.
    """

    kind: str
    step: int
    workers_before: int
    workers_after: int
    steps_lost: int
    recovery_s: float
    detect_s: float
    regroup_s: float
    restore_s: float
    recompute_s: float
    generation: int
    detail: str


@dataclass(frozen=True)
class WorkerFailed:
    """A worker raised an error; its traceback is in logs/errors.log."""

    rank: int
    step: int
    error: str


@dataclass(frozen=True)
class WorkerLeft:
    """A worker is no longer in the run; `why` is an incident's kind, `host` stays when a node comes back."""

    why: str
    rank: int
    node: str
    pid: int
    detail: str
    host: str


@dataclass(frozen=True)
class NodeDraining:
    """A node will be taken away; `deadline_s` since 1970, 0 if it was not said."""

    node: str
    deadline_s: float


@dataclass(frozen=True)
class FaultFired:
    """A fault of the schedule happens now; `fault` counts from 0."""

    fault: int
    kind: str
    rank: int
    node: str
    step: int
    problem: str


@dataclass(frozen=True)
class CoordinatorRestarted:
    """The coordinator's process was lost and started anew."""

    step: int


@dataclass(frozen=True)
class StragglerFound:
    """A worker needs much longer for a shard than the others do.

    Attributes:
        shard_s: seconds that it computes for a shard.
        slower: times the median of the others.
        cost: share of a step's time that it costs with the best shares.
        since_s: when it began, seconds since 1970.
    """

    rank: int
    node: str
    pid: int
    shard_s: float
    slower: float
    cost: float
    since_s: float


@dataclass(frozen=True)
class Rebalanced:
    """Shards move between workers; `ranges` by rank, `gain`: the share of a step's time that this should save."""

    step: int
    ranges: list[list[int]]
    gain: float


@dataclass(frozen=True)
class RunEnded:
    """The command's end: finished, stopped or failed."""

    status: str
    step: int
    reason: str


Event = (
    RunStarted
    | PhaseBegan
    | ModelCompiled
    | PrecisionChosen
    | GenerationStarted
    | DevicesMixed
    | CheckpointSaved
    | CheckpointRejected
    | CheckpointLoaded
    | Evaluated
    | Incident
    | WorkerFailed
    | WorkerLeft
    | NodeDraining
    | CoordinatorRestarted
    | FaultFired
    | StragglerFound
    | Rebalanced
    | RunEnded
)


def record(event: Event, time_s: float) -> dict[str, Any]:
    """One line of events.jsonl: `time_s` (seconds since 1970), `event` (run_started, ...), the event's own keys."""
    kind = re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()
    return {"time_s": round(time_s, 3), "event": kind, **dataclasses.asdict(event)}


class Listener:
    """Hears at once what a run writes down, as it stands in its folder; a plain one does nothing."""

    def steps(self, records: list[dict[str, Any]]) -> None:
        """New lines of metrics.jsonl."""

    def event(self, record: Mapping[str, Any]) -> None:
        """A new line of events.jsonl."""

    def recall(self, events: list[dict[str, Any]], newest: list[dict[str, Any]]) -> None:
        """What a coordinator that was lost had written for this command: events, and its last step if it had one."""
