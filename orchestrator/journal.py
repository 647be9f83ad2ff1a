"""What a run writes down: steps, events, incidents with their phases, and the result. The coordinator's memory."""

import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from orchestrator.accelerators import SeenDevices
from orchestrator.errors import StorageError
from orchestrator.events import (
    CheckpointLoaded,
    CheckpointRejected,
    CheckpointSaved,
    CoordinatorRestarted,
    Evaluated,
    Event,
    GenerationStarted,
    Incident,
    Listener,
    RunEnded,
    RunStarted,
    record,
)
from orchestrator.failure import Failure
from orchestrator.incident import KILLED, PAUSES, OpenIncident
from orchestrator.jsonlines import dumps, lines, parse_line
from orchestrator.outcome import Course, result_of
from orchestrator.pace import Pace
from orchestrator.plan import Plan
from orchestrator.runfolder import EVENTS, METRICS, RunFolder
from orchestrator.storage import Folder
from orchestrator.values import Parallel

OWNER_EVERY_S = 1.0
log = logging.getLogger("orchestrator.journal")


class Journal:
    """The run folder's logs and the figures of the result."""

    def __init__(
        self, plan: Plan, uri: str, token: str, description: str, started_s: float, again: bool,
        listener: Listener | None = None, closing: bool = False,
    ) -> None:  # fmt: skip
        """Args:
        uri: of the run folder.
        token: of the command that the run belongs to.
        description: of the data, for people.
        started_s: when the command was typed, seconds since 1970.
        again: whether an earlier coordinator of the same command was lost.
        listener: hears what is written down.
        closing: the earlier coordinator does not come back; only the end is to be written.
        """
        self._plan, self._token, self._started_s = plan, token, started_s
        self._listener = listener or Listener()
        self._folder = RunFolder(Folder(uri, patience_s=plan.config.storage_patience), late=True)
        self.flush = self._folder.flush
        # One that was lost before it had taken the run over has left nothing to go on from; nor has anybody since then.
        mine, taken = self._folder.belongs(token), [event["time_s"] for event in self._folder.every("run_started")]
        self.again = again = again and (mine or closing or max(taken, default=-math.inf) >= started_s)
        self.superseded, self._check_at_s = False, 0.0
        self.recorded = 0  # newest step in metrics.jsonl
        self.best = 0  # the most it ever was
        self.first_step, self._saved_s = -1, time.monotonic()
        self.saved = int((self._folder.newest("checkpoint_saved", "checkpoint_loaded") or {"step": -1})["step"])
        self.generation, self.stepped, self.loss = 0, 0, float("nan")  # `stepped`: the generation of the newest step
        self.workers = 0  # of the newest generation of an earlier coordinator
        self.nodes: dict[str, None] = {}  # of all generations, in the order in which they came
        self.fired: set[int] = set()  # faults of a schedule that have happened
        self.incidents: list[Incident] = []
        self.open: OpenIncident | None = None
        self._unsettled: list[tuple[Incident, set[str]]] = []
        self.pace = Pace()
        self._told: set[str] | None = None  # evaluations that are written down; None: not looked up yet
        # An earlier coordinator may have been lost after the end.
        self.result: dict[str, Any] | None = self._folder.result() if again else None
        self.figures: dict[str, Any] = {}  # more for the result
        config, self.devices = plan.config, SeenDevices()
        ways = [Parallel.parse(event.get("parallel", "ddp")) for event in self._folder.every("run_started")]
        self._exact = plan.deterministic and all(way.exact for way in ways)  # steps of an earlier command count too
        self.devices.see(0, (self.newest("generation_started") or {}).get("devices", []), earlier=True)
        if again:
            self._recover()
            self.log(*([] if closing else [CoordinatorRestarted(self.recorded)]))
            return
        resumed = bool(self._folder.text(EVENTS))
        self.loss = self._folder.last_loss()  # none of this command's steps may be left to take
        self._folder.take_ownership(token)
        begun = (plan.workload, plan.total_steps, config.shards, config.batch_size, description, resumed)
        self.log(RunStarted(*begun, os.getpid(), str(config.parallel)))

    def _recover(self) -> None:
        """Read back what the earlier coordinator of this command wrote."""
        self._folder.mend_logs()
        newest, mine = dict[str, Any](), list[dict[str, Any]]()
        events = [event for line in lines(self._folder.text(EVENTS) or "") if (event := parse_line(line)) is not None]
        events = [event for event in events if event["time_s"] >= self._started_s]
        begun = [event["step"] for event in events if event["event"] == "generation_started"]
        first = min(begun, default=math.inf)  # steps have the clock of another machine
        for line in lines(self._folder.text(METRICS) or ""):  # one after the other: there may be millions
            if (found := parse_line(line)) is None:
                continue
            newest = found
            if newest["step"] > first:
                self.first_step = newest["step"] - 1 if self.first_step < 0 else self.first_step
                mine = [newest]
                self.pace.take(mine)
        self.recorded = newest.get("step", 0)
        self.loss = newest.get("loss", self.loss)
        fields = {f.name for f in dataclasses.fields(Incident)}
        self._listener.recall(events, mine)
        for event in events:
            if event["event"] == "incident":
                self.incidents.append(Incident(**{k: v for k, v in event.items() if k in fields}))
            elif event["event"] == "generation_started":
                self.generation, self.workers = event["generation"], event["workers"]
                self.nodes |= dict.fromkeys(event["nodes"])
            elif event["event"] == "fault_fired":
                self.fired.add(event["fault"])
        silent_s = max(0.0, time.time() - newest["time_s"]) if newest else 0.0
        self.break_off("coordinator_lost", "its process ended and was started anew", self.workers, silent_s)

    def log(self, *events: Event) -> None:
        """Append events, unless another command owns the run by now; an evaluation that is told of twice once."""
        events = tuple(event for event in events if not self._told_before(event))
        if events and not self.check_owner():
            self._folder.events(events)
            for event in events:
                self._listener.event(record(event, time.time()))
                if isinstance(event, CheckpointSaved | CheckpointLoaded):
                    self.saved, self._saved_s = event.step, time.monotonic()

    def _told_before(self, event: Event) -> bool:
        if not isinstance(event, Evaluated):
            return False
        if self._told is None:
            self._told = {dumps([e["step"], e["metrics"]]) for e in self._folder.every("evaluated")}
        known = len(self._told)
        self._told.add(dumps([event.step, event.metrics]))
        return len(self._told) == known

    @property
    def problem(self) -> str:
        """Why nothing can be written down any more, "" while all is well."""
        return self._folder.problem

    def error(self, text: str) -> None:
        """Append to logs/errors.log, unless that is another command's by now."""
        if not self.check_owner():
            self._folder.error(text)

    def check_owner(self) -> bool:
        """Whether another command has taken the run over (the driver of this one may have been killed)."""
        if not self.superseded and time.monotonic() >= self._check_at_s:
            self._check_at_s = time.monotonic() + OWNER_EVERY_S
            with contextlib.suppress(OSError, StorageError):  # a storage that is away; asked again in a second
                owner = self._folder.owner()
                self.superseded = owner is not None and owner != self._token
        return self.superseded

    def unsaved_s(self) -> float:
        """Seconds since the newest checkpoint, or since this command began to train."""
        return time.monotonic() - self._saved_s if self.first_step >= 0 else 0.0

    def pause_seconds(self) -> float:
        """What the newest pause at a step boundary cost without handing the state to who joined; 0: there was none."""
        return next((i.recovery_s - i.restore_s for i in reversed(self.incidents) if i.kind in PAUSES), 0.0)

    def step_seconds(self) -> list[float]:
        """Seconds of the newest steps."""
        return self.pace.newest(50)

    def break_off(self, kind: str, detail: str, workers: int, detect_s: float) -> None:
        """A generation of `workers` has ended; a fault during recovery belongs to the incident that is open."""
        if self.open is None:
            self.open = OpenIncident(kind, detail, workers, self.recorded, detect_s, time.time())
        else:
            self.open.another(kind, detail, detect_s)

    def generation_begins(self, started: GenerationStarted, load_s: float, restore_s: float, bad: list[str]) -> None:
        """Rank 0 of a new generation has its state and is about to train.

        Args:
            load_s: seconds that a checkpoint took to load; 0 where none was loaded.
            restore_s: seconds in which state was loaded and handed over.
            bad: checkpoints that were passed over, a line each.
        """
        if self.check_owner():  # the logs are another command's; with the next report this run ends
            return
        self.log(*(CheckpointRejected(reason) for reason in bad))
        if load_s and started.step:
            self.log(CheckpointLoaded(started.step, round(load_s, 3)))
        if load_s:
            self.go_back(started.step)
        if self.open is not None:
            found, now = self.open, time.time()
            # A step that rank 0 alone had taken was not committed: the same bits are computed again.
            found.lost(self.recorded - started.step - self._plan.steps_per_commit)
            found.restore_s = restore_s
            found.connected_s, found.begun_s = now - restore_s, now
            found.workers_after, found.generation = started.workers, started.generation
        self.log(started, *self.devices.see(started.generation, started.devices))
        self.nodes |= dict.fromkeys(started.nodes)
        self.generation = started.generation
        if self.first_step < 0:
            self.first_step, self._saved_s = started.step, time.monotonic()
        self.pace.begin()

    def go_back(self, step: int) -> None:
        """The state is that of a checkpoint, or a new one: the steps after it are taken anew."""
        if self.check_owner():  # the logs are another command's
            return
        if self.open is not None:
            self.open.lost(self.recorded - step)
        self._folder.cut_metrics(step)
        self.pace.cut(step)
        self.recorded, self.loss = step, self._folder.last_loss()
        self.best = max(self.best, step)
        self.saved = step or -1  # newer ones could not be read

    def steps(self, records: list[dict[str, Any]]) -> None:
        """Committed steps in order; those that are known already are dropped."""
        new = [r for r in records if r["step"] > self.recorded]
        if not new:
            return
        if new[0]["step"] != self.recorded + 1:
            log.error("steps %d to %d were not reported", self.recorded + 1, new[0]["step"] - 1)
        self._folder.metrics(new)
        self._listener.steps(new)
        self.recorded, self.loss, self.stepped = (new[-1][key] for key in ("step", "loss", "generation"))
        self.best = max(self.best, self.recorded)
        self.pace.take(new)
        if self.open is not None and self.open.begun_s and new[-1]["generation"] >= self.open.generation:
            self.close_incident()

    def close_incident(self, over: bool = False) -> None:
        """The first step after an incident is committed, or there is none left to take, as when the run is over."""
        found, now = self.open, time.time()
        if found is None or not (found.begun_s or (over and found.kind not in PAUSES)):
            return
        self.open = None
        self._unsettled.append((found.closed(now), found.nodes))

    async def settle(self, reachable: Callable[[str], Awaitable[bool]]) -> None:
        """Write closed incidents down; what killed a worker was its node if that is not reachable any more."""
        while self._unsettled:
            incident, nodes = self._unsettled[0]
            if incident.kind in KILLED and not all(await asyncio.gather(*map(reachable, nodes))):
                incident = dataclasses.replace(incident, kind="node_lost")
            if self._unsettled:
                del self._unsettled[0]
                self._write(incident)

    def _write(self, incident: Incident) -> None:
        self.incidents.append(incident)
        self.log(incident)

    def blame(self, node: str) -> None:
        """The open incident took a worker on `node`."""
        if self.open is not None:
            self.open.nodes.add(node)

    def newest(self, *kinds: str) -> dict[str, Any] | None:
        """The last event of these kinds; None: there is none."""
        return self._folder.newest(*kinds)

    def ended_as(self) -> tuple[str, str, int]:
        """Outcome, message and exit status of a run that an earlier coordinator has ended; "": it has not."""
        if self.result is None:
            return "", "", 0
        status, told = str(self.result["status"]), self.newest("run_ended") or {}
        return status, str(told.get("reason", "")), {"finished": 0, "stopped": 130}.get(status, 1)

    def end(
        self, status: str, message: str, sha256: str, metrics: Mapping[str, float], failure: Failure | None = None
    ) -> None:
        """Write the end into the run folder, result.json last; raises StorageError where that cannot be done."""
        self.close_incident(over=True)
        for incident, _ in self._unsettled:
            self._write(incident)
        self._unsettled.clear()
        steps, loss, spent_s = self.recorded, self.loss, (time.time() - self._started_s, self.pace.seconds)
        if self.first_step < 0 and (self.newest("run_started") or {}).get("resumed"):
            steps = min(self._folder.last_step(), max(0, self.saved))  # what came after it is as good as gone
            loss = self._folder.loss_of(steps)
        course = Course(steps, loss, self.first_step, *spent_s, self.generation, self.incidents)
        self.log(RunEnded(status, steps, message))
        self.result = result_of(self._plan, status, course, sha256, metrics, failure, self._exact) | self.figures
        if not self.superseded:
            self._folder.write_result(self.result)
