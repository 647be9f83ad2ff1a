"""Ray Train's worker group on TPUs: workers start, and are replaced, a whole slice at a time.

A whole slice that nobody uses is chosen by its nodes' labels, and Ray's SlicePlacementGroup claims all its chips;
as in worker_group.py the workers are then plain actors on the hosts. Left to itself, Ray claims the head of any slice,
also of one that has lost a host, and waits for the host.
"""

import logging
import time
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.worker_group.placement_group_handle import PlacementGroupHandle
from ray.train.v2._internal.execution.worker_group.poll import WorkerStatus
from ray.util.tpu import SlicePlacementGroup

from orchestrator.cluster_fit import Node
from orchestrator.halting import wait
from orchestrator.leader import ElasticController
from orchestrator.openings import Filled, Opening
from orchestrator.seats import OVER
from orchestrator.slices import SLICE_NAME, SliceShape, idle, shape_of, whole_slices
from orchestrator.worker_group import RAY_NODE_ID_KEY, ElasticWorkerGroup

CLAIM_S = 10.0  # after which a slice that was not to be had after all, for somebody was quicker, is let go
LOOK_S = 1.0
START_S = 60.0  # for all processes of a slice whose chips are ours
log = logging.getLogger("ray.train")


def free_slices(shape: SliceShape) -> list[dict[str, str]]:
    """The label that tells each slice which is whole and idle."""
    free = available_resources_per_node()
    nodes = [
        Node(n["Resources"], n.get("Labels") or {}, n["NodeID"], free.get(n["NodeID"], n["Resources"]))
        for n in ray.nodes()
        if n["Alive"]
    ]
    return [
        {RAY_NODE_ID_KEY: hosts[0].name} if shape.hosts == 1 else {SLICE_NAME: hosts[0].labels[SLICE_NAME]}
        for hosts in whole_slices(nodes, shape)
        if idle(hosts)
    ]


class SliceRooms(PlacementGroupHandle):  # type: ignore[misc]
    """Room for the workers of some slices.

    Args:
        labels: that tell them.
    """

    def __init__(self, shape: SliceShape, resources: dict[str, float], labels: list[dict[str, str]]) -> None:
        self._claimed = [
            SlicePlacementGroup(
                shape.topology,
                shape.version,
                resources_per_bundle=resources,
                strategy="PACK",
                bundle_label_selector=[label] * shape.chips,
            )
            for label in labels
        ]
        self.since_s = time.monotonic()

    @property
    def placement_group(self) -> Any:
        """What SliceWorkerGroup takes for one."""
        return self

    def ready(self) -> Any:
        return [one.placement_group.ready() for one in self._claimed]

    def wait(self, timeout_seconds: float = 30) -> bool:
        asked = self.ready()
        return wait(lambda s: len(ray.wait(asked, num_returns=len(asked), timeout=s)[0]) == len(asked), timeout_seconds)

    def nodes(self) -> list[str]:
        """The node for each worker, slice after slice."""
        tables = [ray.util.placement_group_table(one.placement_group)["bundles_to_node_id"] for one in self._claimed]
        return [table[number] for table in tables for number in range(len(table))]

    def shutdown(self) -> None:
        for one in self._claimed:
            one.shutdown()
        self._claimed = []


class SliceWorkerGroup(ElasticWorkerGroup):
    """See the module."""

    def _start_impl(self, builder: Any) -> None:
        self._claim: SliceRooms | None = None
        self._asked_ready: list[Any] = []
        self._starting: list[Opening] = []
        self._start_by_s = 0.0
        self._looked_s = 0.0
        super()._start_impl(builder)

    @property
    def _shape(self) -> SliceShape:
        scaling = self._train_run_context.scaling_config
        return shape_of(scaling.accelerator_type, scaling.topology)

    def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> SliceRooms:
        """See WorkerGroup; Ray Train comes back while there are too few slices, which an autoscaler is asked for."""
        workers = worker_group_context.num_workers
        shape = shape_of(scaling_config.accelerator_type, scaling_config.topology)
        labels: list[dict[str, str]] = []

        def found(rest_s: float) -> bool:
            labels[:] = free_slices(shape)[: workers // shape.chips]
            enough = bool(len(labels) * shape.chips >= workers)
            if not enough:
                time.sleep(rest_s)
            return enough

        if not wait(found, self._worker_group_start_timeout_s):
            raise WorkerGroupStartupTimeoutError(num_workers=workers)
        try:
            return SliceRooms(shape, worker_group_context.resources_per_worker, labels)
        except Exception as error:
            raise WorkerGroupStartupFailedError(f"no TPU slice could be claimed: {error}") from error

    def _room(self, placement_group: Any) -> list[str]:
        nodes: list[str] = placement_group.nodes()
        placement_group.shutdown()
        return nodes

    def _vacate(self, filled: Filled, status: WorkerStatus) -> None:
        """See ElasticWorkerGroup; the other workers of its slice cannot go on without it."""
        super()._vacate(filled, status)
        if status.error and status.return_value != OVER:
            slices = {node["NodeID"]: node["Labels"].get(SLICE_NAME, node["NodeID"]) for node in ray.nodes()}
            mine = slices.get(filled.worker.metadata.node_id)
            for mate in self._filled:
                if mate is not filled and slices.get(mate.worker.metadata.node_id) == mine:
                    ray.kill(mate.worker.actor)

    def _tend_all(self) -> None:
        """See ElasticWorkerGroup; openings are filled when there are a slice of them, and a free slice."""
        now, shape = time.monotonic(), self._shape
        if self._starting:
            self._look_at_start()
        elif self._claim is not None:
            self._look_at_claim(now)
        elif now - self._looked_s > LOOK_S:
            self._looked_s = now
            due = sum(now >= opening.not_before_s for opening in self._openings)
            labels = free_slices(shape)[:1] if due >= shape.chips else []
            if labels:
                self._claim = SliceRooms(shape, self._worker_group_context.resources_per_worker, labels)
                self._asked_ready = self._claim.ready()

    def _look_at_claim(self, now: float) -> None:
        """Start the slice's workers when all its chips are ours."""
        assert self._claim is not None
        if not ray.wait(self._asked_ready, timeout=0)[0]:
            if now - self._claim.since_s > CLAIM_S:
                self._claim.shutdown()
                self._claim = None
            return
        nodes = self._room(self._claim)
        self._claim = None
        due = [opening for opening in self._openings if now >= opening.not_before_s]
        self._starting = due[: len(nodes)]
        for opening, node in zip(self._starting, nodes, strict=True):
            opening.actor = self._actor({RAY_NODE_ID_KEY: node}, "DEFAULT")
            opening.asked, opening.asked_s = opening.actor.get_metadata.remote(), time.time()
        self._start_by_s = now + START_S

    def _look_at_start(self) -> None:
        """The slice's processes all start, or none."""
        asked = [opening.asked for opening in self._starting]
        there = ray.wait(asked, num_returns=len(asked), timeout=0)[0]
        if len(there) < len(asked):
            if time.monotonic() > self._start_by_s:  # a host is gone, or another run has taken the chips
                log.warning("%d of %d workers of a slice have not started", len(asked) - len(there), len(asked))
                for opening in self._starting:
                    ray.kill(opening.actor)
                    opening.actor = None
                self._starting = []
            return
        starting, self._starting = self._starting, []
        for opening in starting:
            self._openings.remove(opening)
        try:
            ray.get(asked)
            for opening in starting:
                self._fill(opening)
        except Exception:
            log.warning("the workers of a slice did not start", exc_info=True)
            there = {filled.worker.actor for filled in self._filled}  # these leave openings when they are found dead
            for opening in starting:
                ray.kill(opening.actor)
                if opening.actor not in there:
                    self._open(opening.failures + 1)

    def _cancel_openings(self) -> None:
        if self._claim is not None:
            self._claim.shutdown()
            self._claim = None
        self._starting = []
        super()._cancel_openings()


class SliceController(ElasticController):
    """Ray Train's controller with such a worker group."""

    worker_group_cls = SliceWorkerGroup
