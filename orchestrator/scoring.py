"""Evaluates a model's held-out split with workers all over the cluster, which may come and go."""

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.cluster_fit import capacity
from orchestrator.errors import OrchestratorError, TrainingError, UserError
from orchestrator.evaluate import CHUNK
from orchestrator.launch import nodes
from orchestrator.nodewatch import actor_lost, end_process
from orchestrator.offer import offer
from orchestrator.scorer import Scorer, Task
from orchestrator.tally import DEATHS, Tally

LOOK_S = 1.0
log = logging.getLogger("orchestrator.scoring")


@dataclass
class Hired:
    """A worker: its actor, and where it is once it is ready."""

    actor: Any
    node: str = ""
    pid: int = 0


@dataclass(frozen=True)
class Scored:
    """What was found.

    Attributes:
        metrics: of the workload.
        workers: that took part, and how many of them were lost.
    """

    metrics: dict[str, float]
    workers: int
    lost: int


class Scoring:
    """One evaluation on the connected cluster: as many workers as there is room for, each with the whole model.

    A worker that is lost, or holds its samples for far too long, is replaced, and what it held is done by others; a
    node that joins gets workers too, unless it lacks what others have. Which worker summed what changes no bit: see
    orchestrator.evaluate.
    """

    def __init__(
        self, task: Task, files: dict[str, bytes], samples: int, most: int, per_worker: Mapping[str, float]
    ) -> None:
        """Args:
        files: of the model, by name.
        samples: of the held-out split.
        most: workers; 0: as many as there is room for.
        per_worker: resources that each reserves.

        Raises:
            UserError: no node has room for a worker.
        """
        import ray

        self._task, self._files, self._samples = task, ray.put(files), samples
        self._most, self._per_worker = most, dict(per_worker)
        self._left_out = set[str]()  # nodes
        self._offered = offer()
        room, coming = self._room(), self._offered.nodes if self._offered else ()
        known = self._offered is None or self._offered.known
        if known and not capacity([*nodes(), *coming], self._per_worker, "spread", {}):
            needed = ",".join(f"{name}={amount:g}" for name, amount in per_worker.items())
            raise UserError(
                f"--resources-per-worker {needed}: no node of the cluster has that; give less (the trained model was "
                f"evaluated with {task.threads} CPU thread(s))"
            )
        if not capacity(nodes(), self._per_worker, "spread", {}):
            needed = ",".join(f"{name}={amount:g}" for name, amount in per_worker.items())
            print(f"no node has {needed} yet; waiting for the autoscaler to add one", file=sys.stderr, flush=True)
        self._tally = Tally(samples, CHUNK, min(room, most or room))
        self._staff: dict[str, Hired] = {}
        self._calls: dict[Any, str] = {}  # what is asked of whom
        self._hired, self._began, self._lost, self._stillborn = 0, 0, 0, 0
        self._metrics: dict[str, float] = {}

    def _room(self) -> int:
        """For workers; an autoscaler makes some for one that is asked for."""
        from ray._raylet import RAY_NODE_ID_KEY  # type: ignore[attr-defined]

        there = [node for node in nodes() if node.labels.get(RAY_NODE_ID_KEY) not in self._left_out]
        return max(capacity(there, self._per_worker, "spread", {}), 0 if self._offered is None else 1)

    def run(self, show: Callable[[int, int], None]) -> Scored:
        """To the end.

        Args:
            show: told of (samples done, workers that are ready) now and then.

        Raises:
            OrchestratorError: it cannot go on; says why.
        """
        import ray

        looked_s = -LOOK_S
        while not self._metrics:
            if time.monotonic() - looked_s >= LOOK_S:
                looked_s = time.monotonic()
                self._end_stuck(looked_s)
                self._hire()
            if not self._calls:  # all nodes are gone
                time.sleep(LOOK_S)
                continue
            done, _ = ray.wait(list(self._calls), num_returns=1, timeout=LOOK_S)
            for reference in done:
                self._hear(reference, self._calls.pop(reference))
            show(self._tally.samples_done, sum(bool(hired.pid) for hired in self._staff.values()))
        return Scored(self._metrics, self._began, self._lost)

    def _hire(self) -> None:
        """More workers, where there is room and something left to do."""
        import ray
        from ray._raylet import RAY_NODE_ID_KEY  # type: ignore[attr-defined]

        others = {RAY_NODE_ID_KEY: f"!in({','.join(sorted(self._left_out))})"} if self._left_out else None
        wanted = min(self._most or self._room(), max(1, self._tally.left))
        while len(self._staff) < wanted:
            actor_class: Any = ray.remote(Scorer).options(
                num_cpus=self._per_worker.get("CPU", 0),
                num_gpus=self._per_worker.get("GPU", 0),
                resources={k: v for k, v in self._per_worker.items() if k not in ("CPU", "GPU", "memory")},
                memory=self._per_worker.get("memory"),
                scheduling_strategy="SPREAD",
                label_selector=others,
                max_restarts=0,
            )
            name = f"worker {self._hired}"
            self._hired += 1
            self._staff[name] = Hired(actor_class.remote(self._task))
            self._calls[self._staff[name].actor.begin.remote(self._files)] = name

    def _hear(self, reference: Any, name: str) -> None:
        """A worker has answered, or is lost."""
        import ray

        if name not in self._staff:
            return
        hired = self._staff[name]
        try:
            answer = ray.get(reference)
        except actor_lost() as error:
            self._lose(name, str(error).splitlines()[0])
            return
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, OrchestratorError) and self._spare(name, getattr(cause, "node", ""), cause):
                return
            if isinstance(cause, OrchestratorError):
                raise cause from None
            log.error("%s", error)
            raise TrainingError(f"{name} (process {hired.pid}): {type(cause).__name__}: {cause}") from None
        if isinstance(answer, dict):
            self._metrics = answer
            return
        if hired.pid:
            names, rows = answer
            self._tally.finish(name, names, rows, time.monotonic())
        else:
            hired.node, hired.pid = answer
            self._began, self._stillborn = self._began + 1, 0
        self._employ()

    def _spare(self, name: str, node: str, why: OrchestratorError) -> bool:
        """Whether others go on, or may, without a worker that could not begin, for its node lacks what theirs have."""
        import ray

        if self._staff[name].pid or not node or len(self._staff) == 1:
            return False
        log.warning("node %s gets no worker: %s", node, why)
        self._left_out.add(node)
        ray.kill(self._staff.pop(name).actor)
        return True

    def _employ(self) -> None:
        """Give everyone who is ready and idle something to do."""
        busy = set(self._calls.values())
        for name, hired in self._staff.items():
            if name in busy or not hired.pid:
                continue
            if self._tally.complete:
                self._calls[hired.actor.metrics.remote(self._tally.names, self._tally.rows())] = name
                return
            chunks = self._tally.take(name, time.monotonic())
            if chunks is not None:
                self._calls[hired.actor.sums.remote(chunks)] = name

    def _lose(self, name: str, why: str) -> None:
        hired = self._staff.pop(name)
        log.warning("%s (process %d) is lost: %s", name, hired.pid, why)
        self._lost += 1
        self._stillborn += not hired.pid
        if self._stillborn >= DEATHS:
            raise TrainingError(f"{DEATHS} workers in a row were lost before they were ready; the last: {why}")
        self._tally.lose(name)
        self._employ()

    def _end_stuck(self, now_s: float) -> None:
        """Kill the processes that hold samples for far longer than others needed for as many."""
        for name in self._tally.stuck(now_s):
            hired = self._staff[name]
            log.warning("%s does not get on; its stack:\n%s", name, asyncio.run(end_process(hired.node, hired.pid)))
