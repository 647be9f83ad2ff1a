"""What a worker notes while it trains: committed steps, checkpoints, evaluations. The loop's observer."""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from orchestrator.checkpoint import BackgroundWriter, CheckpointStore
from orchestrator.events import CheckpointSaved, Evaluated, PrecisionChosen
from orchestrator.group import Group
from orchestrator.injector import Saboteur
from orchestrator.plan import Plan
from orchestrator.precision import Precision
from orchestrator.reporter import Reporter
from orchestrator.rounds import Observer
from orchestrator.runfolder import RunFolder
from orchestrator.seats import Seat
from orchestrator.state import TrainingState
from orchestrator.step import StepTotals
from orchestrator.stepbook import step_record
from orchestrator.storage import Folder
from orchestrator.trial import choose, measure
from workloads.workload import Workload


class Recorder(Observer):
    """Notes of one worker, through all its generations; rank 0's go to the coordinator and to storage."""

    def __init__(self, plan: Plan, uri: str, coordinator: Any, saboteur: Saboteur) -> None:
        self._plan, self._saboteur = plan, saboteur
        self._folder = RunFolder(Folder(uri, patience_s=plan.config.storage_patience))
        self._open = plan.config.precision == "auto"
        folder = self._folder.folder.child("checkpoints")
        self.store = CheckpointStore(folder, plan.identity(), plan.config.keep_checkpoints, self._halfway)
        self.reporter = Reporter(coordinator)
        self._writer = BackgroundWriter(self.store, lambda saved: self.reporter.event(CheckpointSaved(**saved)))  # type: ignore[arg-type]
        self.pause = self.stopping = False  # asked for at the next step boundary: a pause, the stop of the run
        self.checkpoint_asked = False
        self._seat: Seat | None = None
        self._first, self._step = False, 0
        self._checkpointed_s = self._stepped_s = time.monotonic()

    @property
    def leads(self) -> bool:
        """Whether this worker is rank 0."""
        return self._seat is not None and self._seat.rank == 0

    def take_seat(self, seat: Seat) -> None:
        """A new generation begins."""
        if self._seat is None or (seat.rank == 0 and not self.leads):
            self._checkpointed_s = time.monotonic() - seat.unsaved_s
        self._seat, self.pause, self.stopping = seat, False, False
        # Steps after those of the state, or of a checkpoint, are taken anew: this worker may have waited since then.
        self.reporter.forget(seat.step)
        self._writer.newest_step = min(self._writer.newest_step, seat.step)
        self.reporter.take_over(seat.rank == 0, seat.recorded)

    def settle_precision(self, workload: Workload, state: TrainingState, group: Group) -> Plan:
        """The plan without --precision auto; every worker of a generation calls it before it takes the state over.

        What rank 0 has, else what config.toml has, else what it measures now: that is written there first, so that
        it is measured once in a run's life, and a checkpoint never is of another precision than config.toml.
        """
        if not self._open:
            return self._plan
        kind = self._plan.config.precision
        if group.rank == 0 and kind == "auto":
            with group.others_wait():
                kind = self._folder.precision()
            if kind == "auto":
                seconds = measure(self._plan, workload, state.model, group)
                kind = choose(seconds)
                self.reporter.event(PrecisionChosen(kind, {k: round(s, 6) for k, s in seconds.items()}))
                with group.others_wait():
                    self._folder.settle_precision(kind)
        kind = group.broadcast_object(kind)
        if kind != self._plan.config.precision:
            self._plan = self._plan.with_config(precision=kind)
            self.store.identity = self._plan.identity()
            state.precision = Precision(kind, group.device.type)
        return self._plan

    def load_newest(self, state: TrainingState, group: Group, on_bad: Callable[[str], None]) -> float:
        """All workers take over the newest whole checkpoint, if there is one; every worker of the group calls it.

        Args:
            on_bad: gets a line for each checkpoint that had to be passed over.

        Returns:
            Seconds that it took to load.
        """
        started = time.perf_counter()
        if group.rank == 0:
            with group.others_wait(), group.clock.away():
                loaded = self.store.load_newest(on_bad)
            if loaded:
                state.load(loaded.tensors, loaded.step)
        load_s = time.perf_counter() - started
        if group.world > 1:
            state.receive(group, lambda step: self.sabotage("restore", step))
        return load_s

    def begin(self, step: int) -> None:
        """The first step of a generation is about to be taken, with `step` done."""
        self._first, self._step = True, step
        self._stepped_s = time.monotonic()

    def sabotage(self, moment: str, step: int) -> None:
        """Do what a rehearsal has for this worker at a moment other than a step's begin."""
        if self._seat is not None:
            self._saboteur.at(moment, self._seat.rank, self._seat.workers, step)

    def _halfway(self, step: int) -> None:
        """A checkpoint is about to be whole; what was said of the steps before it is in storage then."""
        self.sabotage("checkpoint", step)
        self.reporter.keep()

    def stop_wanted(self) -> bool:
        """See Observer; a step is about to begin."""
        if self._seat is not None:
            seat = self._seat
            self._saboteur.before_step(seat.rank, seat.workers, self._step, seat.placement.shards)
            if not self._first:  # which is timed, for it ends a recovery
                self._saboteur.hold(seat.workers, self._step, seat.fired)
        return self.pause

    def trained(self, state: TrainingState) -> None:
        """All steps are taken; a rehearsal may have something for this moment too. Raises as check_finite."""
        state.check_finite()
        self.stop_wanted()

    def broke_off(self, state: TrainingState) -> None:
        """Training cannot go on; raises NonFiniteWeightsError where that is why."""
        self.checkpoint_now(state, self.leads)
        state.check_finite()

    def committed(self, state: TrainingState, totals: StepTotals, lr: float) -> None:
        """See Observer: every worker keeps the record, rank 0 sends it and starts a checkpoint when one is due."""
        record = self._record(state.step, totals, lr, time.time(), time.monotonic() - self._stepped_s)
        self.reporter.step(record, hurry=self._first)
        self._first, self._step = False, state.step
        self._checkpoint_if_due(state, 1)
        self._stepped_s = time.monotonic()

    def round_committed(self, state: TrainingState, totals: Sequence[StepTotals], lrs: Sequence[float]) -> None:
        """See rounds.Observer: a record for each step, with how many its shards had taken alone before it."""
        now = time.time()
        step_s = (time.monotonic() - self._stepped_s) / len(totals)
        for number, (total, lr) in enumerate(zip(totals, lrs, strict=True)):
            alone = {"staleness_mean": number, "staleness_max": number}
            step = state.step - len(totals) + number + 1
            self.reporter.step(self._record(step, total, lr, now, step_s) | alone, hurry=self._first)
        self._first, self._step = False, state.step
        self._checkpoint_if_due(state, len(totals))
        self._stepped_s = time.monotonic()

    def _record(self, step: int, totals: StepTotals, lr: float, now: float, step_s: float) -> dict[str, Any]:
        """A line of metrics.jsonl."""
        assert self._seat is not None
        shares = [part_s / max(step_s, 1e-9) for part_s in (totals.data_s, totals.compute_s, totals.reduce_s)]
        about = step_record(self._plan, step, totals.loss, lr, totals.samples, totals.ledger, step_s, shares)
        return {
            **about,
            "workers": self._seat.workers,
            "generation": self._seat.generation,
            "time_s": round(now, 3),
        }

    def _checkpoint_if_due(self, state: TrainingState, steps: int) -> None:
        """One is due if a multiple of the cadence is among the last `steps` steps; rank 0 writes it."""
        if self.leads and self._is_due(state, steps):
            self._writer.submit(state.step, state.snapshot)

    def _is_due(self, state: TrainingState, steps: int) -> bool:
        every = self._plan.config.checkpoint_every
        due = (every.steps and state.step % every.steps < steps) or (
            every.seconds and time.monotonic() - self._checkpointed_s >= every.seconds
        )
        self.checkpoint_asked |= bool(due)
        if not self.checkpoint_asked or self.writing:  # with slow storage the next one waits, not training
            return False
        self.checkpoint_asked = False
        self._checkpointed_s = time.monotonic()
        return True

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._writer.busy

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """See Observer."""
        self.reporter.event(Evaluated(step, metrics))
        self._stepped_s = time.monotonic()

    def checkpoint_now(self, state: TrainingState, lead: bool) -> None:
        """Write what is not written yet, if this worker leads, wait for what is being written, and report it."""
        if lead and state.step > self._writer.newest_step:
            self._writer.submit(state.step, state.snapshot)
        self.finish()

    def finish(self) -> None:
        """Wait for what is being written, and report it."""
        self._writer.wait()
        self.reporter.flush()

    def close(self) -> None:
        """Send what is left."""
        self.reporter.close()


def save_trained(plan: Plan, uri: str, workload: Workload, model: nn.Module) -> None:
    """Write the trained model into the run folder at `uri`."""
    with tempfile.TemporaryDirectory() as folder:
        workload.save(model, Path(folder))
        RunFolder(Folder(uri, patience_s=plan.config.storage_patience)).save_model(Path(folder))
