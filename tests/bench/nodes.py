"""A Ray cluster of several nodes on this machine, and ways to take one away: what recovery.py breaks.

Made as Ray's own tests make it (ray.cluster_utils): a head without CPUs, which the driver and the coordinator are
on, and nodes of one CPU, each a raylet of its own with its agents and workers.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import commands
import paired

OBJECT_STORE_BYTES = 80 * 2**20  # Ray's least is 75 MiB
GONE_TIMEOUT_S = 30.0


class Nodes:
    """The cluster's nodes by their ids; must be used in the main thread, whose end ends Ray's processes."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster()
        self._by_id: dict[str, Any] = {}
        self._start(num_cpus=0, include_dashboard=False)

    def _start(self, **arguments: Any) -> Any:
        ours = signal.getsignal(signal.SIGTERM)  # Ray takes the signal for itself
        try:
            return self._cluster.add_node(object_store_memory=OBJECT_STORE_BYTES, **arguments)
        finally:
            signal.signal(signal.SIGTERM, ours)

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self) -> None:
        """One more node of one CPU."""
        node = self._start(num_cpus=1)
        self._by_id[node.node_id] = node

    def cut(self, node_id: str) -> float:
        """What a power cut does: SIGKILL to all processes of a node; returns when, in seconds since 1970."""
        node = self._by_id.pop(node_id)
        raylet = node.all_processes["raylet"][0].process
        processes, at_s = family(raylet.pid), time.time()
        for pid in processes:
            kill(pid, signal.SIGKILL)
        raylet.wait(GONE_TIMEOUT_S)
        self._cluster.worker_nodes.discard(node)
        return at_s

    def drain(self, node_id: str, deadline_s: float) -> None:
        """What a spot notice does: the node will be taken away in so many seconds (as `ray drain-node` says it)."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int((time.time() + deadline_s) * 1000)
        accepted, why = GcsClient(address=self.address).drain_node(node_id, reason, "tests/bench", deadline_ms)
        if not accepted:
            raise RuntimeError(f"Ray does not drain node {node_id}: {why}")

    def remove(self, node_id: str) -> None:
        """Shut a node down in order, unless it is gone already."""
        if node := self._by_id.pop(node_id, None):
            self._cluster.remove_node(node)

    def shut_down(self) -> None:
        """All nodes, the head last."""
        self._cluster.shutdown()


@contextmanager
def cluster(folder: Path, count: int) -> Iterator[Nodes]:
    """`count` nodes and a head, with token authentication as any local Ray has; nothing of it is left at the end.

    Args:
        folder: of a `commands.visit`: Ray's sessions are in it, and its processes are known by it.
    """
    before = dict(os.environ)
    for name in commands.DROPPED:
        os.environ.pop(name, None)
    os.environ.update({"RAY_TMPDIR": str(folder), "PYTHONPATH": str(commands.ROOT), "RAY_USAGE_STATS_ENABLED": "0"})
    made = None
    try:
        _authenticate()
        made = Nodes()
        for _ in range(count):
            made.add()
        yield made
    finally:
        if made is not None:
            try:
                made.shut_down()
            except Exception as error:
                paired.say(f"Ray did not shut down in order: {type(error).__name__}: {error}")
        commands.wait_until(lambda: not sweep(folder), GONE_TIMEOUT_S)
        os.environ.clear()
        os.environ.update(before)


def _authenticate() -> None:
    """What ray.init does before it starts a cluster: clients on this machine come with the token of ~/.ray."""
    from ray._private.authentication import authentication_token_setup as setup

    setup.enable_token_auth_by_default()
    setup.ensure_token_if_auth_enabled()


def sweep(folder: Path) -> list[int]:
    left = commands.processes(folder)
    for pid in left:
        kill(pid, signal.SIGKILL)
    return left


def kill(pid: int, number: int) -> None:
    """Send a signal; to a process that is gone is fine."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def family(pid: int) -> list[int]:
    """A process, its children, their children and so on."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                # PID (NAME) STATE PARENT ...; a name may hold blanks and brackets
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found
