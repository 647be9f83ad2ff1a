"""What Ray knows of nodes: who is alive, who is being drained; and a way to end a process that does not answer."""

import asyncio
import contextlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

DUMP_S = 20.0


class NodeWatch:
    """Looks at Ray's node table; in an actor or a driver."""

    every_s = 0.5

    def __init__(self) -> None:
        self._addresses: dict[str, tuple[str, int]] = {}

    def look(self) -> tuple[set[str], dict[str, float]]:
        """(ids of living nodes, id of each draining node -> its deadline in seconds since 1970, 0: unknown)."""
        import ray
        from ray._private.state import state

        nodes: list[dict[str, Any]] = ray.nodes()
        for node in nodes:
            self._addresses[node["NodeID"]] = (node["NodeManagerAddress"], node["NodeManagerPort"])
        alive = {node["NodeID"] for node in nodes if node["Alive"]}
        draining = {node: deadline_ms / 1000 for node, deadline_ms in state.get_draining_nodes().items()}
        return alive, {node: deadline for node, deadline in draining.items() if node in alive}

    def host(self, node: str) -> str:
        """The node's address, "" while it is not known."""
        return self._addresses.get(node, ("", 0))[0]

    async def reachable(self, node: str) -> bool:
        """Whether the node's raylet answers: Ray itself takes many seconds to miss one that was killed."""
        address = self._addresses.get(node)
        if address is None:
            return True
        with contextlib.suppress(OSError, TimeoutError):
            _, writer = await asyncio.wait_for(asyncio.open_connection(*address), 1.0)
            writer.close()
            return True
        return False


def node_token() -> None:
    """Give the nodes that this process starts a token, as ray.init does for its own."""
    from ray._private.authentication import authentication_token_setup as setup

    os.environ.setdefault("RAY_AUTH_MODE", "token")
    setup.Config.initialize("")
    setup.ensure_token_if_auth_enabled(None, create_token_if_missing=True)


def all_stacks() -> str:
    """What every thread of this process does."""
    frames = sys._current_frames().items()
    return "\n".join(f"thread {ident}:\n{''.join(traceback.format_stack(frame))}" for ident, frame in frames)


def psutil_of_ray() -> Any:
    """The psutil that Ray's wheel brings along, importable once Ray is."""
    import ray  # noqa: F401

    return importlib.import_module("psutil")


def actor_lost() -> tuple[type[Exception], ...]:
    """What Ray raises when an actor's process is gone; its memory monitor has a word of its own."""
    import ray

    return ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError


def interface_of(address: str) -> str:
    """The network interface of this machine that has `address`, "" if none has.

    gloo would take the one that the host's name stands for, which on many machines is 127.0.1.1.
    """
    addresses = psutil_of_ray().net_if_addrs()
    return next((name for name, known in addresses.items() if any(a.address == address for a in known)), "")


def _end(pid: int) -> str:
    """The stack of process `pid` of this node, as far as it can be had; then SIGKILL."""
    text = "py-spy is not installed"
    try:
        if spy := shutil.which("py-spy") or _beside_python("py-spy"):
            command = [spy, "dump", "--nonblocking", "--pid", str(pid)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=DUMP_S, check=False)
            text = (done.stdout or done.stderr).strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        text = f"py-spy: {error}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return text


def _beside_python(name: str) -> str | None:
    path = os.path.join(os.path.dirname(sys.executable), name)
    return path if os.path.exists(path) else None


def on_node(function: Callable[..., Any], node: str) -> Any:
    """A Ray task of a function that runs on one node, without resources, and is not tried again."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(function).options(num_cpus=0, scheduling_strategy=there, max_retries=0)


async def end_process(node: str, pid: int) -> str:
    """Kill a process of another node with SIGKILL; returns its stack, or why there is none."""
    import ray

    try:
        return str(await asyncio.wait_for(on_node(_end, node).remote(pid), 2 * DUMP_S))
    except (ray.exceptions.RayError, TimeoutError) as error:
        return f"not to be had: {type(error).__name__}: {error}".splitlines()[0]


def drain_node(address: str, node: str, seconds: float, reason: str) -> str:
    """Ask the cluster at `address` to drain a node within `seconds`; returns why it refused, or ""."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated import autoscaler_pb2

    preemption = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    client: Any = GcsClient(address=address)
    accepted, why = client.drain_node(node, preemption, reason, int((time.time() + seconds) * 1000))
    return "" if accepted else str(why) or "it gives no reason"
