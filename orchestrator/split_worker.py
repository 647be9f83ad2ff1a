"""A worker that holds a part of the model (--parallel other than ddp).

Torch's parallel modules belong to one process group: every generation builds the model anew and takes over what this
worker held, if it has the same part again. At a planned pause two workers of each replica group take the whole state
along, so that any regrouping can begin with it; where their hosts have no room for that, and when the run is to stop,
the replica group writes a checkpoint in parts instead.
"""

from dataclasses import dataclass
from typing import Any

from orchestrator.errors import NonFiniteLossError
from orchestrator.layout import Layout, layout_of, room_for_whole, unit_placement
from orchestrator.recovery import Holding
from orchestrator.seats import OVER, Order, Seat
from orchestrator.worker import Worker, train_worker


def train_split_worker(task: dict[str, Any]) -> str:
    """See train_worker."""
    return train_worker(task, SplitWorker)


@dataclass
class Kept:
    """What a worker takes from one generation to the next.

    Attributes:
        pieces: what it holds.
        whole: the whole state, if it carries that: in the host's memory, as much again as a worker of ddp needs for it.
        sha256: of the weights, if a checkpoint was written.
        evaluated_step: see TrainingState.
    """

    step: int
    holds: Holding
    pieces: dict[str, Any]
    whole: dict[str, Any]
    sha256: str
    evaluated_step: int


class SplitWorker(Worker):
    """One worker process; see Worker."""

    def __init__(self, task: dict[str, Any], coordinator: Any) -> None:
        super().__init__(task, coordinator)
        self._kept: Kept | None = None
        self._restored = False
        self._whole: dict[str, Any] = {}
        self._sha256 = ""

    def _new_state(self, workload: Any, device: Any) -> str:
        from orchestrator.devices import kind_of

        return kind_of(device)  # every generation makes its own state

    @property
    def step(self) -> int:
        return self._kept.step if self._kept is not None and not self._restored else super().step

    def _sit(self, seat: Seat, workload: Any, device: Any, has_state: bool) -> tuple[bool, bool]:
        """See Worker; what this worker holds at the end is kept."""
        self._restored, self._whole, self._sha256 = False, {}, ""
        self._workload, self._device = workload, device
        try:
            over, _ = super()._sit(seat, workload, device, has_state)
            return over, self._restored or has_state
        finally:
            if self._restored:
                self._keep(seat)

    def _keep(self, seat: Seat) -> None:
        state = self._state
        pieces = state.pieces() if state.split else {}
        whole = self._whole if state.split else state.tensors()
        self._holds = Holding(seat.rank % seat.size, seat.size, bool(whole), bool(self._sha256))
        self._kept = Kept(state.step, self._holds, pieces, whole, self._sha256, state.evaluated_step)

    def _restore(self, group: Any, seat: Seat) -> None:
        """See Worker; first builds this worker's part of the model, and fills it with what it held."""
        from orchestrator.build import build_state
        from orchestrator.split_build import build_part

        kept = self._kept if seat.step >= 0 else None
        layout = layout_of(self._plan.config.parallel, group.world)
        self._state = None
        whole = build_state(self._plan, self._workload, group.device) if layout.size == 1 else None
        state: Any = whole or build_part(self._plan, self._workload, group)
        self._state = state
        self._recorder.join(state, seat.rank < layout.size)
        if kept is not None and kept.step == seat.step:
            self._take_over(kept, Holding(layout.part_of(seat.rank), layout.size))
        super()._restore(group, seat)
        if state.split:
            state.handing = {}
        self._kept, self._restored = None, True

    def _take_over(self, kept: Kept, now: Holding) -> None:
        state = self._state
        state.evaluated_step = kept.evaluated_step
        if state.split:
            state.handing = kept.whole
        if state.split and (kept.holds.part, kept.holds.parts) == (now.part, now.parts):
            state.load_pieces(kept.pieces, kept.step)
        elif kept.whole:
            state.load(kept.whole, kept.step)

    def _train(self, workload: Any, group: Any, seat: Seat) -> bool:
        """See Worker; what concerns the whole state is done by whole replica groups."""
        import ray

        from orchestrator.evaluate import evaluate
        from orchestrator.rounds import train
        from orchestrator.state import memory_bytes

        plan, state, recorder = self._plan, self._state, self._recorder
        if not state.split:
            return super()._train(workload, group, seat)
        placement = unit_placement(plan.config.parallel, Layout(seat.workers, seat.size), seat.placement)
        try:
            finished = train(plan, workload, state, group, placement, recorder)
        except NonFiniteLossError:  # found by all at the same step
            recorder.checkpoint_now(state, recorder.leads)
            group.broadcast_object(None)  # the first who tells ends the generation: rank 0's group writes until here
            raise
        if not finished:
            self._leave(group)
            return False
        recorder.trained(state)
        memory = memory_bytes(state)
        recorder.checkpoint_now(state, recorder.leads)
        using, among, in_step = state.evaluation(workload, group)
        metrics = evaluate(using, state.model, state.precision, among, plan.config.loader_processes, in_step)
        recorder.evaluated(state.step, metrics)
        if seat.rank < seat.size:
            self._save_parts(workload, group)
        recorder.reporter.flush()
        arguments = (self.id, seat.generation, state.sha256(), metrics, memory)
        with group.others_wait():  # rank 0 may still be saving
            return bool(ray.get(self._coordinator.finish.remote(*arguments)))

    def _leave(self, group: Any) -> None:
        """The generation ends at a step boundary: take the state along, or write it down."""
        state, recorder = self._state, self._recorder
        held = sum(t.numel() * t.element_size() for t in state.pieces().values())
        told = group.gather_objects((recorder.stopping, (self._host, state.carries, held, available_bytes())))
        stops, hosts = any(stop for stop, _ in told), [host for _, host in told]
        if not stops and room_for_whole(hosts, state.seating.layout):
            self._whole = state.tensors()
            return
        recorder.checkpoint_now(state, recorder.leads)
        sha256 = state.sha256()
        group.broadcast_object(None)  # rank 0 has it written; not before that is anything saved
        self._sha256 = sha256

    def _save_parts(self, workload: Any, group: Any) -> None:
        """Put the model together, which rank 0 saves."""
        from orchestrator.recorder import save_trained

        weights = {name: t.detach().cpu().clone() for name, t in self._state.whole_weights() if self._recorder.leads}
        if not self._recorder.leads:
            return
        model = workload.build_model()
        model.load_state_dict(weights)
        with group.others_wait(), group.clock.away():
            save_trained(self._plan, self._task["uri"], workload, model)

    def _obey(self, order: Order) -> str:
        """See Worker; the state of a stop is in storage, written by the whole replica group before it parted."""
        import ray

        from orchestrator.build import build_state

        kept, stop = self._kept, order.word == "stop"
        if stop and kept is not None and kept.holds.parts > 1:
            if order.lead:
                ray.get(self._coordinator.stopped.remote(kept.step, kept.sha256))
            return OVER
        if stop and kept is not None and not self._restored:  # a generation broke while it built another state
            self._state = build_state(self._plan, self._workload, self._device)
            self._state.load(kept.whole, kept.step)
            self._recorder.join(self._state, True)
        if stop and self._state is None:  # a newcomer
            return OVER
        return super()._obey(order)


def available_bytes() -> int:
    """Memory that can still be used: of this host, and of the container that this is, which /proc does not know."""
    from ray._private.utils import estimate_available_memory

    from orchestrator.nodewatch import psutil_of_ray

    return int(min(psutil_of_ray().virtual_memory().available, estimate_available_memory()))
