"""A Ray cluster of four declared CPUs that the tests of this folder share, started as a user starts one."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator

import pytest
from commands import RAY, call, ray_processes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the shared cluster come last: others say `ray start --head` and `ray stop`, which ends all of Ray.

    Before them, when the tests without Ray in the other process of pytest are done, come those that compute.
    """
    items.sort(key=lambda item: ("cluster" in getattr(item, "fixturenames", ()), bool(item.get_closest_marker("busy"))))


@pytest.fixture(scope="session")
def metrics_port() -> int:
    """Where the shared cluster serves its metrics."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture(scope="session")
def cluster(metrics_port: int) -> Iterator[str]:
    """Address of a running cluster; stopped by its processes' ids at the end."""
    # Ray's sockets live in it, and a socket's path must be short.
    temp = tempfile.mkdtemp(prefix="rayt-", dir="/tmp")
    command = [RAY, "start", "--head", "--num-cpus=4", "--port=0", f"--temp-dir={temp}", "--include-dashboard=false"]
    before = ray_processes()
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--metrics-export-port={metrics_port}"]
    started = call(command, 120, RAY_metrics_report_interval_ms="1000")
    assert started.status == 0, started.out + started.err
    address = (started.out + started.err).split("--address='")[1].split("'")[0]
    yield address
    for pid in ray_processes() - before:
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            continue
    shutil.rmtree(temp, ignore_errors=True)
