"""One parameter server: the Ray actor around a ServerPart, its checkpoints included.

What the dispatcher asks are calls of the actor, one at a time; workers pull and push through a wire of their own
(orchestrator.wire), each in a thread. A lock keeps them apart.
"""

import functools
import logging
import os
import threading
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from orchestrator.build import prepare_torch
from orchestrator.checkpoint import BackgroundWriter, CheckpointStore
from orchestrator.errors import UserError
from orchestrator.handout import Unit
from orchestrator.microbatch import Flat
from orchestrator.plan import Plan
from orchestrator.reporter import keep_logs
from orchestrator.samefolder import check_same_storage
from orchestrator.served import Restored
from orchestrator.server_part import ServerPart
from orchestrator.storage import Folder
from orchestrator.wire import Answer, Asked, Hatch
from workloads.registry import WORKLOADS

log = logging.getLogger("orchestrator.server")


def _keep_logs(dispatcher: Any, _: int) -> None:
    """Of a checkpoint that is about to be whole, what was said of its steps is in storage."""
    keep_logs(dispatcher)


class Server:
    """See the module. What is said of another era than the server's is void: None is answered."""

    def __init__(self, plan: Plan, uri: str, token: str, number: int, dispatcher: Any, loopback: bool) -> None:
        import ray

        prepare_torch(plan.config.threads, same_bits=True)
        host = "127.0.0.1" if loopback else ray.util.get_node_ip_address()
        self._plan, self._number = plan, number
        self._run = (uri, token, ray.util.get_node_ip_address(), plan.config.storage_patience)
        self._workload = WORKLOADS[plan.workload].build(plan.config)
        folder = Folder(uri, patience_s=plan.config.storage_patience).child("checkpoints")
        told = functools.partial(_keep_logs, dispatcher)
        self._store = CheckpointStore(folder, plan.identity(), plan.config.keep_checkpoints, told)
        self._writer = BackgroundWriter(self._store, lambda saved: dispatcher.saved.remote(saved))
        self._era = 0
        self._part: ServerPart
        self._lock = threading.Lock()
        self._hatch = Hatch(host, self._answer)

    def restore(self, era: int, step: int | None) -> Restored:
        """Begin an era with a checkpoint: of `step`, -1 for the initial state; None: the newest whole one."""
        self._writer.wait()
        rejected: list[str] = []
        try:
            check_same_storage(*self._run)
        except UserError as error:
            return Restored(-1, (), str(error))
        if step is None:
            loaded = self._store.load_newest(rejected.append)
        else:
            loaded = self._store.load(step) if step >= 0 else None
        at = loaded.step if loaded else -1
        try:
            part = ServerPart(self._plan, self._workload, self._number, loaded.tensors if loaded else None, max(0, at))
        except UserError as error:
            return Restored(at, tuple(rejected), str(error))
        with self._lock:
            self._part, self._era = part, era
        return Restored(at, tuple(rejected))

    def address(self) -> tuple[str, int, bytes]:
        """Where workers push and pull: host, port, secret."""
        return self._hatch.address

    def ping(self) -> float:
        """A sign of life; raises what went wrong with the last checkpoint."""
        if not self._writer.busy:
            self._writer.wait()
        return time.time()

    def place(self) -> tuple[str, int]:
        """(node, process id)"""
        import ray

        return ray.get_runtime_context().get_node_id(), os.getpid()

    def _answer(self, asked: Asked) -> Answer | None:
        """See ServerPart.push and pull; in the thread of a worker."""
        with self._lock:
            if asked.era != self._era:
                return None
            stale = 0
            if len(asked.gradient):
                unit = Unit(asked.step, asked.shard)
                stale = self._part.push(unit, asked.version, asked.gradient, asked.statistics, asked.samples)
            version, flat = self._part.pull(asked.version)
            # A copy: others' gradients are applied while it is on its way.
            return Answer(version, stale, None if flat is None else flat.copy())

    def sum_up(self, step: int, count: float) -> Flat:
        """See ServerPart; the dispatcher, which asks, knows the era."""
        with self._lock:
            return self._part.sum_up(step, count)

    def apply(self, step: int, *norms: Flat) -> None:
        """See ServerPart.

        Args:
            norms: those of each server; none without clipping.
        """
        with self._lock:
            self._part.apply(step, np.concatenate(norms) if norms else np.empty(0, np.float32))

    def buffers(self, era: int) -> dict[str, NDArray[Any]] | None:
        """See ServerPart."""
        with self._lock:
            found = self._part.buffers() if era == self._era else None
            return None if found is None else {name: array.copy() for name, array in found.items()}

    def snapshot(self) -> dict[str, NDArray[Any]]:
        """See ServerPart; a copy."""
        with self._lock:
            return {name: array.copy() for name, array in self._part.snapshot().items()}

    def write(self, step: int, *parts: dict[str, NDArray[Any]]) -> None:
        """Write the servers' snapshots as checkpoint `step`, in the background."""
        whole = lambda: {name: torch.tensor(array) for part in parts for name, array in part.items()}  # noqa: E731
        self._writer.submit(step, whole)

    def weights_sha256(self, *parts: dict[str, NDArray[Any]]) -> str:
        """See ServerPart."""
        with self._lock:
            return self._part.weights_sha256(parts)

    def written(self) -> bool:
        """Whether nothing is being written; raises what went wrong with it. Never waits: pings come after it."""
        if self._writer.busy:
            return False
        self._writer.wait()
        return True
