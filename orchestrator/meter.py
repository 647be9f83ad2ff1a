"""A run in numbers for Prometheus: records of the run folder come in, readings go out. There is no clock here.

Names and units follow Prometheus's conventions (https://prometheus.io/docs/practices/naming): base units, counters end
in _total, a moment is its Unix time, from which a query has the age even when nobody reports any more. A rate is a
query's business. Ray puts ray_ before every name.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.values import Cadence

RUN_LABELS = ("run", "workload")
INCIDENTS = (
    "worker_killed", "worker_failed", "worker_frozen", "worker_stuck", "connection_lost", "node_lost", "node_drained",
    "workers_joined", "worker_unreachable", "coordinator_lost", "server_lost", "rebalanced",
    "straggler_left",
)  # fmt: skip
TOGETHER_S = 1.0  # workers that one machine loses at once are told of within it
ORDERLY = ("node_drained", "straggler_left")  # a worker that leaves so was not lost
STEP_PHASES = {"data": "data_share", "forward_backward": "compute_share", "reduction": "reduce_share"}
RECOVERY_PHASES = ("detect", "regroup", "restore", "recompute")


@dataclass(frozen=True)
class Metric:
    """A metric of one run.

    Attributes:
        help: what it counts or says, one line.
        counts: whether it is a counter, which only grows; else it is a gauge.
        labels: beside RUN_LABELS; each has few values, for every combination is a time series.
        known: combinations that will be there anyhow: they begin at 0, for an increase from nothing cannot be seen.
    """

    name: str
    help: str
    counts: bool = False
    labels: tuple[str, ...] = ()
    known: tuple[tuple[str, ...], ...] = ((),)


def _gauge(name: str, text: str) -> Metric:
    return Metric(f"orchestrator_{name}", text)


def _counter(name: str, text: str, labels: tuple[str, ...] = (), known: Iterable[tuple[str, ...]] = ((),)) -> Metric:
    return Metric(f"orchestrator_{name}_total", text, True, labels, tuple(known))


STARTED = _gauge("run_start_timestamp_seconds", "When the command began or took up the run, Unix time.")
TRAINING = _gauge("training_start_timestamp_seconds", "When workers of this command first began to train, Unix time.")
ENDED = _gauge("run_end_timestamp_seconds", "When it ended, Unix time; 0: it goes on.")
PLANNED_STEPS = _gauge("planned_steps", "Optimizer steps from the run's beginning to its end.")
COMMITTED_STEP = _gauge("committed_step", "The newest step that every worker of its generation had the gradient of.")
STEP_AT = _gauge("last_step_timestamp_seconds", "When that step was committed, Unix time.")
LOSS = _gauge("training_loss", "Loss of the newest committed step.")
STALENESS_MEAN = _gauge("staleness_mean", "Updates by which gradients of the newest step were late; 0 with allreduce.")
STALENESS_MAX = _gauge("staleness_max", "The same of the latest gradient of the newest steps.")
WORKERS = _gauge("workers", "Workers of the newest generation.")
MISSING = _gauge("missing_workers", "Workers without which the run does not go on, and that it waits for.")
GENERATION = _gauge("generation", "Number of the newest generation, a stretch of steps with a fixed set of workers.")
STEPS = _counter("steps", "Committed steps, those that had to be taken again included.")
SAMPLES = _counter("samples", "Samples in committed steps.")
STEP_SECONDS = _counter(
    "step_seconds",
    "Where the time of steps went on rank 0; checkpoint is what training waited for the copy, not its writing.",
    ("phase",),
    ((phase,) for phase in (*STEP_PHASES, "rest", "checkpoint")),
)
CHECKPOINTS = _counter("checkpoints", "Checkpoints written.")
CHECKPOINT_SECONDS = _counter("checkpoint_write_seconds", "Seconds in which checkpoints were written, beside training.")
CHECKPOINT_AT = _gauge("last_checkpoint_timestamp_seconds", "When the newest checkpoint was whole, Unix time.")
CHECKPOINT_STEP = _gauge("checkpoint_step", "Step of the newest checkpoint, or 0: where a lost run would go on from.")
CHECKPOINT_WRITE = _gauge("last_checkpoint_write_seconds", "Seconds that writing the newest checkpoint took.")
CHECKPOINT_BYTES = _gauge("last_checkpoint_size_bytes", "Size of the newest checkpoint.")
EVERY_SECONDS = _gauge("checkpoint_interval_seconds", "The configured cadence; only if it is given in seconds.")
EVERY_STEPS = _gauge("checkpoint_interval_steps", "The configured cadence; only if it is given in steps.")
INCIDENT = _counter("incidents", "What ended generations before the run's end.", ("kind",), ((k,) for k in INCIDENTS))
RECOVERY_SECONDS = _counter(
    "recovery_seconds",
    "From the last sign of life until the next committed step, by incident and by what was done.",
    ("kind", "phase"),
    ((kind, phase) for kind in INCIDENTS for phase in RECOVERY_PHASES),
)
LOST_STEPS = _counter("lost_steps", "Committed steps that had to be taken again after incidents.")
HOST_LOSSES = _counter("host_losses", "Generations that lost workers of this host, without notice.", ("host",), ())

METRICS = (
    STARTED, TRAINING, ENDED, PLANNED_STEPS, COMMITTED_STEP, STEP_AT, LOSS, STALENESS_MEAN, STALENESS_MAX, WORKERS,
    MISSING, GENERATION, STEPS, SAMPLES, STEP_SECONDS, CHECKPOINTS, CHECKPOINT_SECONDS, CHECKPOINT_AT, CHECKPOINT_STEP,
    CHECKPOINT_WRITE, CHECKPOINT_BYTES, EVERY_SECONDS, EVERY_STEPS, INCIDENT, RECOVERY_SECONDS, LOST_STEPS, HOST_LOSSES,
)  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """A gauge's new value, or by how much a counter grows; `labels` are the values of metric.labels."""

    metric: Metric
    value: float
    labels: tuple[str, ...] = ()


class Meter:
    """Reads the records of one run in their order, as they stand in metrics.jsonl and events.jsonl."""

    def __init__(self, checkpoint_every: Cadence) -> None:
        self._cadence, self._training = checkpoint_every, False
        self._blamed: dict[str, float] = {}  # hosts that this generation lost workers of, and when

    def steps(self, records: list[dict[str, Any]]) -> list[Reading]:
        """Committed steps that have come together: what they add up to, and the newest one's state."""
        if not records:
            return []
        newest = records[-1]
        spent = dict.fromkeys((*STEP_PHASES, "rest"), 0.0)
        for step in records:
            parts = {phase: step["step_s"] * step.get(share, 0.0) for phase, share in STEP_PHASES.items()}
            parts["rest"] = max(0.0, step["step_s"] - sum(parts.values()))
            for phase, seconds in parts.items():
                spent[phase] += seconds
        return [
            Reading(COMMITTED_STEP, newest["step"]),
            Reading(STEP_AT, newest["time_s"]),
            Reading(LOSS, newest["loss"]),
            Reading(STALENESS_MEAN, newest.get("staleness_mean", 0)),
            Reading(STALENESS_MAX, max(step.get("staleness_max", 0) for step in records)),
            Reading(WORKERS, newest["workers"]),
            Reading(GENERATION, newest["generation"]),
            Reading(STEPS, len(records)),
            Reading(SAMPLES, sum(step["samples"] for step in records)),
            *(Reading(STEP_SECONDS, seconds, (phase,)) for phase, seconds in spent.items()),
        ]

    def event(self, record: Mapping[str, Any]) -> list[Reading]:
        """An event; most say nothing in numbers."""
        match record["event"]:
            case "run_started":
                return self._run_started(record)
            case "phase_began":
                return [Reading(MISSING, record["missing"])]
            case "generation_started":
                # Parameter servers' workers have a new generation for each of several that are lost at once.
                now_s = record["time_s"]
                self._blamed = {host: at_s for host, at_s in self._blamed.items() if now_s - at_s < TOGETHER_S}
                now_there = ((COMMITTED_STEP, "step"), (WORKERS, "workers"), (GENERATION, "generation"))
                begun, self._training = [] if self._training else [Reading(TRAINING, now_s)], True
                return [*begun, *(Reading(metric, record[key]) for metric, key in now_there)]
            case "checkpoint_saved":
                return _checkpoint_saved(record)
            case "checkpoint_loaded":
                return [Reading(CHECKPOINT_STEP, record["step"])]
            case "incident":
                return _incident(record)
            case "worker_left":
                return self._worker_left(record)
            case "run_ended":
                return [Reading(ENDED, record["time_s"])]
        return []

    def _run_started(self, record: Mapping[str, Any]) -> list[Reading]:
        cadence, self._training = self._cadence, False
        every = Reading(EVERY_STEPS, cadence.steps) if cadence.steps else Reading(EVERY_SECONDS, cadence.seconds)
        readings = [
            Reading(STARTED, record["time_s"]),
            Reading(ENDED, 0),
            Reading(PLANNED_STEPS, record["total_steps"]),
            every,
        ]
        return readings if record["resumed"] else [*readings, Reading(CHECKPOINT_STEP, 0)]

    def _worker_left(self, record: Mapping[str, Any]) -> list[Reading]:
        """A host that loses eight workers at once has failed once."""
        host = record.get("host") or record["node"]
        if record["why"] in ORDERLY or host in self._blamed:
            return []
        self._blamed[host] = record["time_s"]
        return [Reading(HOST_LOSSES, 1, (host,))]


def _checkpoint_saved(record: Mapping[str, Any]) -> list[Reading]:
    return [
        Reading(CHECKPOINTS, 1),
        Reading(CHECKPOINT_SECONDS, record["write_s"]),
        Reading(STEP_SECONDS, record["stall_s"], ("checkpoint",)),
        Reading(CHECKPOINT_AT, record["time_s"]),
        Reading(CHECKPOINT_STEP, record["step"]),
        Reading(CHECKPOINT_WRITE, record["write_s"]),
        Reading(CHECKPOINT_BYTES, record["bytes"]),
    ]


def _incident(record: Mapping[str, Any]) -> list[Reading]:
    kind = record["kind"]
    return [
        Reading(INCIDENT, 1, (kind,)),
        *(Reading(RECOVERY_SECONDS, record[f"{phase}_s"], (kind, phase)) for phase in RECOVERY_PHASES),
        Reading(LOST_STEPS, record["steps_lost"]),
    ]
