"""What runs in a Ray Train worker: take a seat, train until the generation ends, come back for the next seat."""

import logging
import os
import threading
import time
import uuid
from typing import Any

from orchestrator.channel import Beat, Line
from orchestrator.cluster_fit import declared_speed
from orchestrator.errors import OrchestratorError
from orchestrator.failure import Place
from orchestrator.injector import Saboteur
from orchestrator.lastwords import tell_failure
from orchestrator.nodewatch import actor_lost, all_stacks
from orchestrator.plan import Plan
from orchestrator.recovery import Holding, Member
from orchestrator.seats import LEFT, NAMESPACE, OVER, READ_BACK_S, Order, Seat
from orchestrator.worker_device import Door, Spot, take_device

log = logging.getLogger("orchestrator.worker")
COORDINATOR_BACK_S = 120.0


class GivenUpError(RuntimeError):
    """The coordinator has given this worker up, or cannot be reached: another process takes its place."""


def train_worker(task: dict[str, Any], kind: "type[Worker] | None" = None) -> str:
    """The train function given to TorchTrainer; returns OVER or LEFT.

    Args:
        task: "plan", "uri" and "token" of the run folder, "coordinator" name, "group_timeout_s", "loopback", "faults".

    Some errors of ours end the run (see tell_failure); others end this worker, and the others go on.
    """
    import ray

    coordinator = ray.get_actor(task["coordinator"], namespace=NAMESPACE)
    worker = (kind or Worker)(task, coordinator)
    try:
        return worker.run()
    except GivenUpError:
        raise
    except Exception as error:
        if tell_failure(coordinator, worker.id, worker.place, error):
            return OVER
        raise
    finally:
        worker.close()


class Worker:
    """One worker process, through all the generations that it sits in."""

    def __init__(self, task: dict[str, Any], coordinator: Any) -> None:
        import ray

        self._plan: Plan = task["plan"]
        self._task, self._coordinator = task, coordinator
        context = ray.get_runtime_context()
        self._node, self._host = context.get_node_id(), ray.util.get_node_ip_address()
        self._speed = declared_speed(context.get_node_labels() or {})
        self.id = uuid.uuid4().hex
        self._seat: Seat | None = None
        self._group: Any = None
        self._ended, self._aborting = 0, threading.Lock()  # the first: newest generation that the coordinator has ended
        self._line: Line | None = None
        self._line_broke, self._why = False, ""  # why the last generation ended, as this worker saw it
        self._saboteur = Saboteur(task["faults"], self._may_fire, coordinator.fault_failed.remote)
        self._state: Any = None
        self._recorder: Any = None
        self._holds, self._spot = Holding(), Spot()
        self._door = Door("127.0.0.1" if task["loopback"] else self._host)

    @property
    def rank(self) -> int:  # in the last generation it sat in; -1: in none
        return self._seat.rank if self._seat else -1

    @property
    def step(self) -> int:
        return self._state.step if self._state is not None else 0

    @property
    def place(self) -> Place:
        return Place(self.rank, self._node, os.getpid(), self.step, member=self.id)

    def close(self) -> None:
        """Hang up."""
        if self._line is not None:
            self._line.close()
        if self._recorder is not None:
            self._recorder.close()

    def run(self) -> str:
        """From the first line to the last."""
        self._connect_line()
        from orchestrator.build import check_same_data, prepare_torch, settle_loader
        from orchestrator.samefolder import check_same_storage
        from orchestrator.split_recorder import recorder_for
        from workloads.registry import WORKLOADS

        prepare_torch(self._plan.config.threads, same_bits=self._plan.config.reduce == "fixed")
        device, self._spot = take_device(self._plan.config)
        workload = WORKLOADS[self._plan.workload].build(self._plan.config)
        check_same_data(self._plan, workload, self._host)
        check_same_storage(self._task["uri"], self._task["token"], self._host, self._plan.config.storage_patience)
        self._plan = settle_loader(self._plan, workload)
        self._recorder = recorder_for(self._plan, self._task["uri"], self._coordinator, self._saboteur)
        kind, has_state = self._new_state(workload, device), False
        while not isinstance(answer := self._ask_for_seat(kind, self.step if has_state else -1), Order):
            over, has_state = self._sit(answer, workload, device, has_state)
            if over:
                return OVER
        return self._obey(answer)

    def _new_state(self, workload: Any, device: Any) -> str:
        """Build what is trained; returns what its bits depend on."""
        from orchestrator.build import build_state
        from orchestrator.compiled import compile_for

        self._state = build_state(self._plan, workload, device)
        return compile_for(self._plan, workload, self._state, device, self._node, self._coordinator.report.remote)

    def _connect_line(self) -> None:
        """Join the coordinator's wire; waits for a coordinator that is being restarted."""
        import ray

        until = time.monotonic() + COORDINATOR_BACK_S + max(0, self.step) * READ_BACK_S
        while True:
            try:
                found = ray.get(self._coordinator.enlist.remote(self.id), timeout=COORDINATOR_BACK_S)
                if found is None:
                    raise GivenUpError("the coordinator does not expect this worker any more")
                if self._line is not None:
                    self._line.close()
                self._line_broke = False
                self._line = Line(found[:2], found[2], self.id, self._look, self._told)
                return
            except (ray.exceptions.RayError, OSError) as error:
                if time.monotonic() > until:
                    raise GivenUpError(f"the coordinator cannot be reached: {error}") from error
                time.sleep(0.2)

    def _may_fire(self, number: int) -> bool:
        import ray

        return bool(ray.get(self._coordinator.may_fire.remote(number, self.rank)))

    def _look(self) -> Beat:
        group, generation = self._group, self._seat.generation if self._seat else 0
        if group is None:
            return Beat(generation, self.step, 0, waiting=True)
        return Beat(generation, self.step, waiting=group.waiting, **group.clock.told(group.place))

    def _told(self, word: str, generation: int) -> None:
        """An order from the coordinator, in the wire's thread."""
        if word in ("pause", "stop") and self._seat and generation == self._seat.generation:
            self._recorder.pause, self._recorder.stopping = True, word == "stop"
        elif word == "fault":
            self._saboteur.do(generation)
        elif word == "checkpoint" and self._recorder and self._recorder.leads:  # not one that leads when it is written
            self._recorder.checkpoint_asked = True
        elif word == "dump":
            self._coordinator.stack.remote(self.rank, all_stacks())
        elif word in ("end", "gone"):
            self._line_broke |= word == "gone"
            self._ended = max(self._ended, generation, self._seat.generation if word == "gone" and self._seat else 0)
            with self._aborting:
                if self._group is not None and self._seat and self._seat.generation <= self._ended:
                    self._group.abort()

    def _ask_for_seat(self, device: str, step: int) -> Seat | Order:
        """Ask until a coordinator answers: it may have been restarted."""
        import ray

        while True:
            if self._line_broke:
                self._connect_line()
            store = self._door.serve().address
            here = (store, self._host, self._speed, self._holds, self._spot.slice, self._spot.place)
            member = Member(self.id, self._node, os.getpid(), device, step, self.rank, *here)
            try:
                answer: Seat | Order = ray.get(self._coordinator.join.remote(member, self._why))
                if isinstance(answer, Seat) or answer.word != "save":
                    return answer
                self._save()
            except ray.exceptions.RayError:
                log.exception("the coordinator was lost; waiting for it to come back")
                self._line_broke = True

    def _sit(self, seat: Seat, workload: Any, device: Any, has_state: bool) -> tuple[bool, bool]:
        """One generation; returns (whether the run is over, whether this worker has the state)."""
        from orchestrator.group import Group

        self._seat, self._why = seat, ""
        self._recorder.take_seat(seat)
        self._group = group = Group(seat.rank, seat.workers, device, drag=self._saboteur.drag)
        try:
            if self._ended >= seat.generation:
                group.abort()
            group.connect(self._door.of(seat), seat.generation, self._task["group_timeout_s"])
            self._plan = self._recorder.settle_precision(workload, self._state, group)
            self._restore(group, seat)
            has_state = True
            return self._train(workload, group, seat), True
        except Exception as error:
            group.broken = True  # others wait for this worker, and it for none of them
            lost = isinstance(error, actor_lost())  # the coordinator, which will be back
            excused = isinstance(error, RuntimeError) and group.excuses(error)
            if isinstance(error, GivenUpError) or not (lost or excused):
                raise
            self._line_broke |= lost
            log.warning("generation %d ended at step %d: %s", seat.generation, self.step, error)
            self._why = str(error).partition("\n")[0]
            return False, has_state
        finally:
            with self._aborting:  # one that has begun ends before `close`, and before `over` is read
                self._group = None
            group.close()
            if group.over:
                self._door.close()  # its connection to itself was shut down with the others

    def _restore(self, group: Any, seat: Seat) -> None:
        """All get the state of rank 0, or the newest whole checkpoint if nobody has any."""
        import ray

        started, load_s, rejected = time.perf_counter(), 0.0, list[str]()
        if seat.step < 0:
            load_s = self._recorder.load_newest(self._state, group, rejected.append)
        elif seat.rank == 0:
            self._recorder.reporter.flush()  # a joiner may be the last one left, and has not kept earlier steps
        if seat.share and seat.step >= 0 and group.world > 1:
            self._state.receive(group, lambda step: self._recorder.sabotage("restore", step))
        # One that broke off in an evaluation may not know that it was done.
        self._state.evaluated_step = group.broadcast_object(self._state.evaluated_step)
        if seat.rank == 0:
            arguments = (seat, self._state.step, load_s, time.perf_counter() - started, rejected)
            ray.get(self._coordinator.begin.remote(*arguments))
        self._recorder.begin(self._state.step)

    def _train(self, workload: Any, group: Any, seat: Seat) -> bool:
        """Train to the end or to the generation's; returns whether the run is over."""
        import ray

        from orchestrator.evaluate import evaluate
        from orchestrator.recorder import save_trained
        from orchestrator.rounds import train
        from orchestrator.state import memory_bytes, weights_sha256

        plan, state, recorder = self._plan, self._state, self._recorder
        try:
            finished = train(plan, workload, state, group, seat.placement, recorder)
        except OrchestratorError:
            with group.others_wait(), group.clock.away():
                recorder.broke_off(state)
            raise
        if not finished:
            return False
        recorder.trained(state)
        if recorder.leads:
            self._coordinator.phase.remote("evaluating and saving")
            with group.others_wait(), group.clock.away():  # storage may be slow, which is not this worker's fault
                recorder.checkpoint_now(state, lead=True)
        metrics = evaluate(workload, state.model, state.precision, group, plan.config.loader_processes)
        recorder.evaluated(state.step, metrics)
        if recorder.leads:
            with group.others_wait(), group.clock.away():
                save_trained(plan, self._task["uri"], workload, state.model)
        recorder.reporter.flush()
        arguments = (self.id, seat.generation, weights_sha256(state.model), metrics, memory_bytes(state))
        with group.others_wait():  # rank 0 may still be saving
            return bool(ray.get(self._coordinator.finish.remote(*arguments)))

    def _save(self) -> None:
        """Write the state down outside a generation: rank 0 may be gone, with steps that nobody was told of."""
        import ray

        self._recorder.reporter.take_over(True, ray.get(self._coordinator.status.remote()).step)
        self._recorder.checkpoint_now(self._state, lead=True)

    def _obey(self, order: Order) -> str:
        """Not a seat: the end of the run, or of this worker's part in it."""
        import ray

        from orchestrator.state import weights_sha256

        if order.word == "excluded":
            raise GivenUpError("the coordinator has given this worker up")
        if order.word == "leave":
            self._recorder.finish()
        elif order.word == "stop" and order.lead:
            self._save()
            ray.get(self._coordinator.stopped.remote(self._state.step, weights_sha256(self._state.model)))
        elif order.word == "stop":
            self._recorder.checkpoint_now(self._state, lead=False)
        return LEFT if order.word == "leave" else OVER
