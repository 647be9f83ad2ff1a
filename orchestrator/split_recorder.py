"""The notes of a worker that holds a part of the model: the first replica group writes checkpoints together.

At a step boundary each of its workers makes a file of what it holds, in memory (partfiles.py), and trains on while that
is written. At later boundaries they tell each other what is written; when all of it is, rank 0 writes the manifest that
makes it a checkpoint. What a generation leaves unfinished the next one finishes, if all who write it are in its first
replica group; else it is none, and the next one begins with writing one.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

from orchestrator.checkpoint import PARTS, Entries, refuse_to_begin_anew
from orchestrator.errors import CheckpointError, UnreadableError
from orchestrator.events import CheckpointSaved
from orchestrator.group import Group
from orchestrator.injector import Saboteur
from orchestrator.plan import Plan
from orchestrator.recorder import Recorder
from orchestrator.seats import Seat
from orchestrator.state import TrainingState


@dataclass
class Pending:
    """A checkpoint whose files are being written; alike in all workers that write it, but for `files`.

    Attributes:
        attempt: its step, its folder, and how many workers write it.
        stall_s: how long training waited for it.
        since_s: when writing began, time.perf_counter.
    """

    attempt: tuple[int, str, int]
    files: Future[Entries]
    stall_s: float
    since_s: float

    @property
    def step(self) -> int:
        return self.attempt[0]


class Told(NamedTuple):
    """What a worker says of a checkpoint that is being written.

    Attributes:
        due: at rank 0 the folder of one that is to begin, or "".
        attempt: see Pending; None: it writes none.
        entries: of its files; None: they are not written yet.
        spent_s: since it began; `stall_s` as in Pending.
    """

    due: str
    attempt: tuple[int, str, int] | None = None
    entries: Entries | None = None
    stall_s: float = 0.0
    spent_s: float = 0.0


class SplitRecorder(Recorder):
    """See Recorder.

    Attributes:
        group: inside the first replica group; None elsewhere, and where a worker holds all.
    """

    def __init__(self, plan: Plan, uri: str, coordinator: Any, saboteur: Saboteur) -> None:
        super().__init__(plan, uri, coordinator, saboteur)
        self.group: Group | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Pending | None = None
        self._others_write = False  # a checkpoint of which this worker has no part
        self._finishing: Future[None] | None = None  # rank 0's
        self._saved_step = -1

    @property
    def writing(self) -> bool:
        """See Recorder."""
        busy = self._pending is not None or self._others_write or self._finishing is not None
        return super().writing or busy

    def take_seat(self, seat: Seat) -> None:
        """See Recorder."""
        super().take_seat(seat)
        self._saved_step = min(self._saved_step, seat.step)
        if self._pending is not None and self._pending.step > seat.step:
            self._drop()

    def join(self, state: Any, first: bool) -> None:
        """A generation begins with a state that this worker has built.

        Args:
            first: whether it is in the first replica group.
        """
        self.group = state.seating.inside if state.split and first else None
        self._others_write = False
        if self.group is None:
            self._drop()

    def _drop(self) -> None:
        """What this worker has written, or was to write, is of no checkpoint."""
        if self._pending is not None:
            self._pending.files.cancel()  # if it waits for another one that was dropped
            self._pending, self.checkpoint_asked = None, True

    def load_newest(self, state: TrainingState, group: Group, on_bad: Callable[[str], None]) -> float:
        """See Recorder: each worker reads what it holds; one that cannot speaks for all.

        A checkpoint of a run that held the model whole is one file, which every worker reads, and keeps its part of.
        """
        started, self._saved_step, unreadable = time.perf_counter(), -1, ""
        for step in reversed(group.broadcast_object(self.store.steps() if group.rank == 0 else [])):
            loaded, problem, cannot = None, "", False
            try:
                with group.others_wait(), group.clock.away():
                    loaded = self.store.load(step, state.room)
            except CheckpointError as error:
                problem, cannot = str(error), isinstance(error, UnreadableError)
            self.sabotage("restore", step)
            problems = sorted((told for told in group.gather_objects((cannot, problem)) if told[1]), reverse=True)
            if problems:
                on_bad(problems[0][1])
                unreadable = unreadable or (problems[0][1] if problems[0][0] else "")
                continue
            assert loaded is not None
            state.take_checkpoint(loaded)
            self._saved_step = step
            break
        else:
            refuse_to_begin_anew(unreadable)
        return time.perf_counter() - started

    def _checkpoint_if_due(self, state: TrainingState, steps: int) -> None:
        self._look_after_manifest()  # of this worker's group, which may have become smaller since then
        if not state.split:
            super()._checkpoint_if_due(state, steps)
        elif self.group is not None:
            name = self._exchange(_new_name() if self.leads and self._is_due(state, steps) else "")
            if name:
                self._begin(state, name)

    def _begin(self, state: Any, name: str) -> None:
        """Make this worker's file and have it written into the folder `name`."""
        from orchestrator.partfiles import stage

        state.check_finite()
        assert self.group is not None
        started = time.perf_counter()
        files = {f"{name}/{file}": content for file, content in stage(state.parts(), self.group).items()}
        now = time.perf_counter()
        attempt = (state.step, name, self.group.world)
        self._pending = Pending(attempt, self._pool.submit(self.store.write, state.step, files), now - started, now)

    def _exchange(self, name: str) -> str:
        """Tell each other what is written; returns the `name` of rank 0: of a checkpoint that is to begin, or ""."""
        assert self.group is not None
        told: list[Told] = self.group.gather_objects(self._tell(name))
        due, attempts = told[0].due, [each.attempt for each in told if each.attempt is not None]
        newest = max(attempts, default=None)  # others are left over from earlier generations
        if self._pending is not None and self._pending.attempt != newest:
            self._drop()
        self._others_write = False
        if newest is None:
            return due
        parts = [each for each in told if each.attempt == newest]
        if len(parts) < newest[2]:  # who has the rest is gone
            self._drop()
            self.checkpoint_asked |= self.leads and not due
            return due
        if any(each.entries is None for each in parts):
            self._others_write = self._pending is None
            self.checkpoint_asked |= bool(name)  # a newcomer that leads did not know
            return ""
        self._pending, self._saved_step = None, newest[0]
        if self.leads:
            self._finishing = self._pool.submit(self._finish, newest[0], parts, time.perf_counter())
        return due

    def _tell(self, name: str) -> Told:
        pending = self._pending
        if pending is None:
            return Told(name)
        written = pending.files.result() if pending.files.done() else None
        return Told(name, pending.attempt, written, pending.stall_s, time.perf_counter() - pending.since_s)

    def _finish(self, step: int, parts: Sequence[Told], since_s: float) -> None:
        size = self.store.finish(step, {file: entry for each in parts for file, entry in (each.entries or {}).items()})
        write_s = max(each.spent_s for each in parts) + time.perf_counter() - since_s
        stall_s = max(each.stall_s for each in parts)
        self.reporter.event(CheckpointSaved(step, size, round(stall_s, 6), round(write_s, 6)))

    def _look_after_manifest(self, until_done: bool = False) -> None:
        """Re-raise what went wrong with the last one."""
        if self._finishing is not None and (until_done or self._finishing.done()):
            self._finishing.result()
            self._finishing = None

    def _settle(self) -> None:
        """Until what is being written is a checkpoint."""
        assert self.group is not None
        with self.group.others_wait():
            if self._pending is not None:
                with self.group.clock.away():
                    wait([self._pending.files])
            self._exchange("")
            with self.group.clock.away():
                self._look_after_manifest(until_done=True)
            self.group.broadcast_object(None)  # rank 0 has done it

    def checkpoint_now(self, state: TrainingState, lead: bool) -> None:
        """See Recorder; every worker of the first replica group calls it."""
        if not state.split:
            super().checkpoint_now(state, lead)
            return
        if self.group is not None:
            self._settle()
            name = self.group.broadcast_object(_new_name() if state.step > self._saved_step else "")
            if name:
                self._begin(state, name)
                self._settle()
        self.reporter.flush()


def _new_name() -> str:
    """Of a folder that no other attempt at a checkpoint writes to."""
    return PARTS + uuid.uuid4().hex[:8]


def recorder_for(plan: Plan, uri: str, coordinator: Any, saboteur: Saboteur) -> Recorder:
    """The recorder of the run's --parallel."""
    kind = SplitRecorder if plan.config.parallel.splits else Recorder
    return kind(plan, uri, coordinator, saboteur)
