"""A Ray cluster of four declared CPUs that the tests of this folder share, started as a user starts one."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator

import pytest
from commands import RAY, environment, ray_processes


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """Address of a running cluster; stopped by its processes' ids at the end."""
    # Ray's sockets live in it, and a socket's path must be short.
    temp = tempfile.mkdtemp(prefix="rayt-", dir="/tmp")
    command = [RAY, "start", "--head", "--num-cpus=4", "--port=0", f"--temp-dir={temp}", "--include-dashboard=false"]
    before = ray_processes()
    started = subprocess.run(
        [*command, "--min-worker-port=0", "--max-worker-port=0"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert started.returncode == 0, started.stdout + started.stderr
    address = next(
        w
        for line in (started.stdout + started.stderr).splitlines()
        if "--address=" in line
        for w in [line.split("--address='")[1].split("'")[0]]
    )
    yield address
    for pid in ray_processes() - before:
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            continue
    shutil.rmtree(temp, ignore_errors=True)
