"""A cluster that grows and shrinks by itself: Ray's real autoscaler, whose nodes are processes of this machine."""

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import RAY, call, events, kept_in, ray_processes, result, run, wait_until


@pytest.fixture
def autoscaling() -> Iterator[str]:
    """Address of a cluster with no node but its head, that may have two of one CPU."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    local, before = [sys.executable, "-m", "cluster.local"], ray_processes()
    started = call([*local, "--nodes", "2", "--cpus", "1", "--idle", "3", "--port", str(port)], 120)
    assert started.status == 0, started.out + started.err
    again = call([*local, "--port", str(port)], 120)  # typed twice: the first one goes on
    assert again.status == 1
    assert "error: Ray did not start: " in again.err
    yield started.out.split(" at ")[1].split(";")[0]
    assert "ended" in call([*local, "--stop"], 60).out
    wait_until(lambda: not ray_processes() - before, 30, "the cluster's processes to end")


def has_workers(address: str) -> bool:
    """Whether the autoscaler keeps any node beside the head."""
    shown = call([RAY, "status", "--address", address], 60, RAY_AUTH_MODE="token").out
    return " worker" in shown.split("Active:")[1].split("Pending:")[0]


@pytest.mark.timeout(400)
def test_from_no_node_to_the_minimum_to_the_maximum_and_back(autoscaling: str, tmp_path: Path) -> None:
    refused = run("resnet", "--resources-per-worker", "GPU=1", *kept_in(tmp_path, "gpu", autoscaling))
    assert refused.status == 2
    assert "the autoscaler could add 2 x CPU=1; no worker fits" in refused.err
    assert not (tmp_path / "gpu" / "config.toml").exists(), "the name stays free"
    steps = ["--steps", "400", "--balance", "even"]
    done = run("resnet", *steps, "--workers", "1:2", *kept_in(tmp_path, "run", autoscaling))
    assert done.status == 0, done.err
    assert "waiting for workers: 1 more needed, 0 there" in done.err
    assert [g["workers"] for g in events(tmp_path / "run", "generation_started")] == [1, 2]
    wait_until(lambda: not has_workers(autoscaling), 60, "idle nodes to go")
    score = ["-m", "orchestrator.score", str(tmp_path / "run"), "--address", autoscaling, "--json"]
    scored = call([sys.executable, *score], 120)
    assert scored.status == 0, scored.err
    assert json.loads(scored.out)["metrics"] == result(tmp_path / "run")["metrics"]
    fixed = run("resnet", *steps, "--workers", "1", *kept_in(tmp_path, "fixed"))
    assert fixed.status == 0, fixed.err
    assert result(tmp_path / "run")["weights_sha256"] == result(tmp_path / "fixed")["weights_sha256"]
