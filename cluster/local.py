"""`python -m cluster.local --nodes 3 --cpus 1`: a cluster of several nodes on this machine, with Ray's real autoscaler.

For trying things out: nodes come when a run asks for them and go when they are idle. Each is a raylet with its own
workers. They demand the token of ~/.ray, as any cluster that `ray start` starts does. `python -m cluster.local --stop`
ends it.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from orchestrator.command import Parser, leave, refuse
from orchestrator.errors import OrchestratorError

MARK = "ORCHESTRATOR_LOCAL_CLUSTER"  # in the environment of all its processes
STOP_S = 10.0


def configuration(nodes: int, cpus: float, least: int, idle_s: float, address: str) -> dict[str, Any]:
    """The autoscaler's configuration: Ray's fake_multinode provider, whose nodes are processes of this machine."""
    worker = {"resources": {"CPU": cpus}, "node_config": {}, "min_workers": least, "max_workers": nodes}
    return {
        "cluster_name": "local",
        "max_workers": nodes,
        "idle_timeout_minutes": idle_s / 60,
        "upscaling_speed": 1000,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {
            # The provider knows the head by this name; nothing trains on it.
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": worker,
        },
        "head_node_type": "ray.head.default",
        # Nothing is copied or installed, for every node is this machine; the autoscaler wants to read it all the same.
        **{key: {} for key in ("auth", "docker", "file_mounts", "head_node", "worker_nodes")},
        **{key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands")},
        **{f"{who}setup_commands": [] for who in ("", "head_", "worker_")},
        **{f"{who}_start_ray_commands": [] for who in ("head", "worker")},
    }


def start(nodes: int, cpus: float, least: int, idle_s: float, port: int) -> str:
    """Start the head; nodes follow when they are asked for. Returns the cluster's address."""
    from ray.util import get_node_ip_address

    from orchestrator.nodewatch import node_token

    address = f"{get_node_ip_address()}:{port}"
    folder = Path(tempfile.mkdtemp(prefix="local-cluster-"))
    file = folder / "autoscaler.yaml"
    file.write_text(yaml.safe_dump(configuration(nodes, cpus, least, idle_s, address)))
    node_token()
    environment = os.environ | {
        MARK: str(folder),
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "0",  # the second version has no such provider in Ray's wheel
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--num-cpus=0", f"--port={port}",
        f"--autoscaling-config={file}", "--include-dashboard=false",
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        stop(str(folder))  # not one that runs here already, which may be why
        shutil.rmtree(folder, ignore_errors=True)
        reason = (done.stderr or done.stdout).strip().splitlines()
        raise OrchestratorError(f"Ray did not start: {reason[-1] if reason else 'no reason given'}")
    return address


def stop(mark: str = "") -> int:
    """End all clusters that `start` started here, or the one of this mark; returns how many processes there were."""
    from orchestrator.nodewatch import psutil_of_ray

    psutil = psutil_of_ray()
    found, folders = set(), set()
    for process in psutil.process_iter():
        try:
            folder = process.environ().get(MARK)
            if folder and folder == (mark or folder) and process.pid != os.getpid():
                folders.add(folder)
                # Children too: Ray's agents write their titles over their environment.
                found |= {process, *process.children(recursive=True)}
        except psutil.Error:
            continue
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):  # it went with another one
            process.terminate()
    _, left = psutil.wait_procs(found, STOP_S)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, STOP_S)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return len(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = Parser(prog="python -m cluster.local", description=(__doc__ or "").split("\n\n")[1], allow_abbrev=False)
    parser.add_argument("--nodes", type=int, default=3, help="most nodes beside the head [3]")
    parser.add_argument("--cpus", type=float, default=1, help="CPUs that each declares [1]")
    parser.add_argument("--least", type=int, default=0, help="nodes that stay also when they are idle [0]")
    parser.add_argument("--idle", type=float, default=60, help="seconds after which an idle node goes [60]")
    parser.add_argument("--port", type=int, default=6379, help="of Ray's control store [6379]")
    parser.add_argument("--stop", action="store_true", help="end it")
    try:
        given = parser.parse_args(arguments)
        if given.stop:
            count = stop()
            print(f"ended {count} processes" if count else "there was none")
            return 0
        if not (0 <= given.least <= given.nodes and given.nodes > 0 and given.cpus > 0 and given.idle > 0):
            parser.error("--nodes, --cpus and --idle have to be above 0, and --least from 0 to --nodes")
        if given.cpus % 1:  # the autoscaler would try to start such a node for ever
            parser.error(f"--cpus {given.cpus:g}: Ray's nodes have whole ones; give 1 or more")
        address = start(given.nodes, given.cpus, given.least, given.idle, given.port)
    except OrchestratorError as error:
        return refuse(error)
    print(f"a cluster of up to {given.nodes} nodes at {address}; nodes come when they are asked for")
    print("next: python -m orchestrator.run resnet --workers 1:2")
    print("stop: python -m cluster.local --stop")
    return 0


if __name__ == "__main__":
    leave(main)
