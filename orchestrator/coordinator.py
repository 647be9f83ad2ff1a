"""The coordinator: one actor a run that knows who trains, keeps the run's logs and decides its end.

It imports neither torch nor the workload, so it is up before the workers are.
"""

import asyncio
import contextlib
import dataclasses
import math
import time
import uuid
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.events import (
    CheckpointLoaded,
    CheckpointRejected,
    Event,
    GenerationStarted,
    Incident,
    RunEnded,
    RunStarted,
    WorkerFailed,
)
from orchestrator.plan import Plan
from orchestrator.runfolder import RunFolder
from orchestrator.shards import Placement, even_placement
from orchestrator.storage import Folder

NAMESPACE = "orchestrator"
RATE_WINDOW_S = 10.0
PATIENCE_S = 1.0


@dataclass(frozen=True)
class Seat:
    """A worker's place in a generation."""

    generation: int
    rank: int
    placement: Placement


@dataclass(frozen=True)
class Status:
    """What the driver shows. `outcome` is "" while the run goes on."""

    joined: int
    workers: int
    generation: int
    step: int
    loss: float
    samples_per_s: float
    steps_per_s: float
    phase: str
    outcome: str
    message: str
    exit_status: int
    result: dict[str, Any] | None


class Coordinator:
    """State of one run as its workers report it. An asyncio actor: methods never block."""

    def __init__(self, plan: Plan, uri: str, workers: int, description: str, started_s: float) -> None:
        """Args:
        uri: of the run folder.
        workers: how many form a generation.
        started_s: when the command was typed, seconds since 1970.
        """
        self._plan, self._workers, self._started_s = plan, workers, started_s
        self._folder = RunFolder(Folder(uri))
        self._joining: dict[int, tuple[str, int, str]] = {}
        self._changed = asyncio.Condition()
        self._over = asyncio.Event()
        self._generation = 0
        self._store: dict[int, tuple[str, int]] = {}
        self._step = self._first_step = -1
        self._best_step = 0
        self._loss = float("nan")
        self._recent: deque[tuple[float, int]] = deque(maxlen=4096)
        self._training_s = 0.0
        self._lost_at: float | None = None
        self._incidents: list[Incident] = []
        self._errors: dict[tuple[int, str], int] = {}
        self._hashes: dict[int, str] = {}
        self._stop = False
        self._phase = "starting workers"
        self._outcome, self._message, self._exit_status = "", "", 0
        self._result: dict[str, Any] | None = None
        self._superseded = False
        self._token = uuid.uuid4().hex
        config = plan.config
        resumed = self._folder.folder.read_text("events.jsonl") is not None
        self._folder.take_ownership(self._token)
        self._log(RunStarted(plan.workload, plan.total_steps, config.shards, config.batch_size, description, resumed))

    def _log(self, *events: Event) -> None:
        if not self._superseded:
            self._folder.events(events)

    def _check_owner(self) -> None:
        """A command whose driver was killed may outlive it for seconds: the run belongs to the newest command."""
        if not self._superseded and self._folder.owner() != self._token:
            self._superseded = True
            self._end("failed", "another command has taken this run over", 1)

    async def join(self, rank: int, node: str, pid: int, device: str) -> Seat | None:
        """A worker is there; answers when all of the generation are. None: the run is over."""
        async with self._changed:
            if self._outcome:
                return None
            if self._joining.get(rank) is not None or len(self._joining) == self._workers:
                self._joining = {}
            self._joining[rank] = (node, pid, device)
            if len(self._joining) == self._workers:
                self._generation += 1
                self._phase = "loading data and model"
                self._changed.notify_all()
            generation = self._generation + (0 if len(self._joining) == self._workers else 1)
            await self._changed.wait_for(lambda: self._generation >= generation)
        return Seat(self._generation, rank, even_placement(self._plan.config.shards, self._workers))

    async def publish_store(self, generation: int, host: str, port: int) -> None:
        """Rank 0 serves the generation's TCPStore at host:port."""
        async with self._changed:
            self._store[generation] = (host, port)
            self._changed.notify_all()

    async def store_address(self, generation: int) -> tuple[str, int]:
        """Where the generation's TCPStore is; waits for rank 0 to publish it."""
        async with self._changed:
            await self._changed.wait_for(lambda: generation in self._store)
            return self._store[generation]

    async def begin(self, generation: int, step: int, load_s: float, rejected: list[str]) -> None:
        """Rank 0 of a new generation: training begins with `step` steps done."""
        self._log(*(CheckpointRejected(reason) for reason in rejected))
        if step:
            self._log(CheckpointLoaded(step, round(load_s, 3)))
        self._folder.cut_metrics(step)
        if self._lost_at is not None:
            lost, recovery = max(0, self._best_step - step), time.time() - self._lost_at
            incident = Incident("worker_lost", self._best_step, self._workers, self._workers, lost, round(recovery, 3))
            self._incidents.append(incident)
            self._log(incident)
            self._lost_at = None
        ranges = [[r.start, r.stop] for r in even_placement(self._plan.config.shards, self._workers)]
        nodes, pids, devices = zip(*(self._joining[rank] for rank in sorted(self._joining)), strict=True)
        self._log(GenerationStarted(generation, step, self._workers, ranges, [*nodes], [*pids], devices[0]))
        if self._first_step < 0:
            self._first_step = step
        self._step, self._phase = step, "training"
        self._recent.clear()

    async def report(self, records: list[dict[str, Any]], events: list[Event]) -> bool:
        """Committed steps and events of rank 0, in order; answers whether training should stop."""
        self._check_owner()
        if self._superseded:
            return True
        if records:
            self._folder.metrics(records)
            last = records[-1]
            self._step, self._loss = last["step"], last["loss"]
            self._best_step = max(self._best_step, self._step)
            self._recent.extend((r["time_s"], r["samples"]) for r in records)
            self._training_s += sum(r["step_s"] for r in records)
        if events:
            self._log(*events)
        return self._stop

    async def phase(self, text: str) -> None:
        """What the workers are doing, for people."""
        self._phase = text

    async def worker_failed(self, rank: int, step: int, error: str, traceback: str) -> bool:
        """A worker raised; answers whether trying again makes sense (not if the same step failed the same way)."""
        self._folder.error(f"rank {rank}, step {step}:\n{traceback}")
        self._log(WorkerFailed(rank, step, error))
        if self._lost_at is None:
            self._lost_at = time.time()
            self._phase = "restarting workers"
        if not self._outcome:
            # Who lost a connection may be quicker than the worker that knows why: give that one a moment.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), PATIENCE_S)
        before = self._errors.setdefault((step, error), self._generation)
        if before < self._generation and not self._outcome:
            self._end("failed", f"step {step} failed twice in the same way: {error}", 1)
        return not self._outcome

    async def fail(self, message: str, exit_status: int, traceback: str) -> None:
        """The run cannot go on."""
        self._folder.error(traceback)
        if not self._outcome:
            self._end("failed", message, exit_status)

    async def request_stop(self) -> None:
        """Ask the workers to checkpoint and stop after the current step."""
        self._stop = True

    async def finish(self, rank: int, finished: bool, sha256: str, step: int, metrics: dict[str, float]) -> None:
        """A worker is done; the run's end is written when all are, and only if all hold the same weights."""
        self._hashes[rank] = sha256
        if len(self._hashes) < self._workers or self._outcome:
            return
        if len(set(self._hashes.values())) > 1:
            self._end("failed", f"workers disagree on the final weights: {self._hashes}", 1)
            return
        self._step = step
        if finished:
            self._end("finished", "", 0, sha256, metrics)
        else:
            total = self._plan.total_steps
            self._end("stopped", f"on request, after step {step} of {total} and a checkpoint", 130, sha256)

    def _summary(self, status: str, sha256: str, metrics: dict[str, float]) -> dict[str, Any]:
        schedule = self._plan.schedule
        trained = schedule.samples_before(max(0, self._step)) - schedule.samples_before(max(0, self._first_step))
        return {
            "status": status,
            "workload": self._plan.workload,
            "steps": max(0, self._step),
            "samples": schedule.samples_before(max(0, self._step)),
            "loss": None if math.isnan(self._loss) else self._loss,
            "metrics": metrics,
            "weights_sha256": sha256,
            "wall_s": round(time.time() - self._started_s, 3),
            "samples_per_s": round(trained / self._training_s, 3) if self._training_s else 0.0,
            "generations": self._generation,
            "incidents": [dataclasses.asdict(incident) for incident in self._incidents],
        }

    def _end(
        self,
        outcome: str,
        message: str,
        exit_status: int,
        sha256: str = "",
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Write the end into the run folder, result.json last."""
        self._message, self._exit_status = message, exit_status
        self._log(RunEnded(outcome, max(0, self._step), message))
        self._result = self._summary(outcome, sha256, dict(metrics or {}))
        if not self._superseded:
            self._folder.write_result(self._result)
        self._outcome = outcome
        self._over.set()

    async def status(self) -> Status:
        now = time.time()
        recent = [(t, n) for t, n in self._recent if now - t < RATE_WINDOW_S]
        span = recent[-1][0] - recent[0][0] if len(recent) > 1 else 0.0
        rate = sum(n for _, n in recent[1:]) / span if span else 0.0
        steps_rate = (len(recent) - 1) / span if span else 0.0
        return Status(
            len(self._joining),
            self._workers,
            self._generation,
            max(0, self._step),
            self._loss,
            rate,
            steps_rate,
            self._phase,
            self._outcome,
            self._message,
            self._exit_status,
            self._result,
        )
