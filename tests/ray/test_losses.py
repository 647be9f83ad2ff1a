"""What a schedule cannot do: all workers at once, the coordinator, too few machines, a machine that comes late."""

import os
import signal
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import (
    REPOSITORY,
    Done,
    begin,
    events,
    finish,
    kept_in,
    ray_processes,
    records,
    result,
    run,
    start,
    wait_for_step,
    wait_until,
)

from orchestrator.rehearse import stage

STEPS = 400
MEMORY_GROUPS = Path("/sys/fs/cgroup/memory")


def command(storage: Path, *extra: str) -> list[str]:
    settings = ["--steps", str(STEPS), "--batch-size", "64", "--checkpoint-every", "20", "--balance", "even"]
    return ["resnet", *settings, *kept_in(storage), *extra]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster whose head has no CPU; tests add nodes of one CPU and take them away."""
    before = ray_processes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")  # the stage sets it, and nobody else should have it
        with stage("", nodes=0, cpus=1) as where:
            yield where.cluster
    wait_until(lambda: not ray_processes() - before, 30, "the cluster's processes to end")


@pytest.fixture
def node_pair(nodes: Any) -> Iterator[list[Any]]:
    pair = [nodes.add_node(wait=False, num_cpus=1, include_dashboard=False) for _ in range(2)]
    nodes.wait_for_nodes(60)
    yield pair
    for node in list(nodes.worker_nodes):
        nodes.remove_node(node)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, nodes: Any) -> str:
    storage = tmp_path_factory.mktemp("undisturbed")
    node = nodes.add_node(wait=True, num_cpus=1, include_dashboard=False)
    done = run(*command(storage, "--workers", "1", "--address", nodes.address))
    nodes.remove_node(node)
    assert done.status == 0, done.err
    return str(result(storage / "run")["weights_sha256"])


def assert_as_undisturbed(done: Done, storage: Path, undisturbed: str) -> dict[str, Any]:
    assert done.status == 0, done.err
    found = result(storage / "run")
    assert found["weights_sha256"] == undisturbed
    assert [r["step"] for r in records(storage / "run")] == list(range(1, STEPS + 1))
    return found


def generations(storage: Path) -> list[dict[str, Any]]:
    return events(storage / "run", "generation_started")


def test_a_worker_is_lost_when_it_is_given_what_to_do(
    nodes: Any, node_pair: Any, undisturbed: str, tmp_path: Path
) -> None:
    """Before there is a group that it could be replaced in: the group is started once more."""
    done = with_late_losses(nodes, tmp_path, 1)
    assert (tmp_path / "lost").read_text() == ".", "nobody was lost"
    assert_as_undisturbed(done, tmp_path, undisturbed)


def test_workers_that_are_lost_each_time_end_the_run(nodes: Any, node_pair: Any, tmp_path: Path) -> None:
    done = with_late_losses(nodes, tmp_path, 99, "--max-incidents", "1")
    assert done.status == 1, done.err
    assert len((tmp_path / "lost").read_text()) >= 2
    assert result(tmp_path / "run")["status"] == "failed"


def with_late_losses(nodes: Any, tmp_path: Path, times: int, *extra: str) -> Done:
    """The run, with so many processes lost when they are given the train function."""
    driver = str(REPOSITORY / "tests/ray/late_loss_driver.py")
    arguments = command(tmp_path, "--address", nodes.address, "--workers", "2", *extra)
    words = [sys.executable, driver, str(tmp_path / "lost"), str(times), *arguments]
    return finish(begin(words, PYTHONPATH=str(REPOSITORY)))


def test_all_workers_lost_at_once(nodes: Any, node_pair: Any, undisturbed: str, tmp_path: Path) -> None:
    """The newest checkpoint is loaded; what is lost is bounded by its cadence."""
    process = start(command(tmp_path, "--address", nodes.address, "--workers", "2"))
    wait_for_step(tmp_path / "run", 50)
    for pid in generations(tmp_path)[0]["pids"]:
        os.kill(pid, signal.SIGKILL)
    found = assert_as_undisturbed(finish(process), tmp_path, undisturbed)
    assert found["incidents"][0]["kind"] == "worker_killed"
    assert 0 <= found["incidents"][0]["steps_lost"] <= 40, "the cadence, and a checkpoint that was being written"
    assert events(tmp_path / "run", "checkpoint_loaded")[0]["step"] >= 20


@pytest.mark.skipif(not os.access(MEMORY_GROUPS, os.W_OK), reason=f"{MEMORY_GROUPS} (cgroup v1) cannot be written to")
@pytest.mark.long  # CI has 40 minutes; a kill of another sender
def test_the_kernel_kills_a_worker_for_want_of_memory(
    nodes: Any, node_pair: Any, undisturbed: str, tmp_path: Path
) -> None:
    """The kernel's own out-of-memory kill: the worker is put into a memory group where the next page is too many."""
    process = start(command(tmp_path, "--address", nodes.address, "--workers", "1:2"))
    wait_for_step(tmp_path / "run", 50)
    group = MEMORY_GROUPS / f"orchestrator-test-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text("4096")
        (group / "cgroup.procs").write_text(str(generations(tmp_path)[0]["pids"][1]))
        found = assert_as_undisturbed(finish(process), tmp_path, undisturbed)
        assert "oom_kill 1" in (group / "memory.oom_control").read_text().splitlines()
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text(), 30, "the kernel to have killed it")
        group.rmdir()
    incident = found["incidents"][0]  # a second one is the replacement that joins
    assert incident["kind"] == "worker_killed"
    assert incident["steps_lost"] == 0
    assert not events(tmp_path / "run", "checkpoint_loaded"), "the other worker had the state"


def test_the_coordinator_is_killed(nodes: Any, node_pair: Any, undisturbed: str, tmp_path: Path) -> None:
    process = start(command(tmp_path, "--address", nodes.address, "--workers", "2"))
    wait_for_step(tmp_path / "run", 50)
    os.kill(events(tmp_path / "run", "run_started")[0]["coordinator_pid"], signal.SIGKILL)
    assert_as_undisturbed(finish(process), tmp_path, undisturbed)
    (restarted,) = events(tmp_path / "run", "coordinator_restarted")
    assert restarted["step"] >= 40
    first, *later = generations(tmp_path)
    assert set(later[-1]["pids"]) == set(first["pids"]), "workers were restarted with the coordinator"
    wait_until(lambda: lost_once_and_finished(nodes.head_node.metrics_export_port), 15, "its metrics")


@pytest.mark.long  # the command looks for 90 s
def test_a_coordinator_that_stands_still_is_started_anew(
    nodes: Any, node_pair: Any, undisturbed: str, tmp_path: Path
) -> None:
    """Nobody else would notice: Ray does not watch a process that is stopped."""
    process = start(command(tmp_path, "--address", nodes.address, "--workers", "2"))
    wait_for_step(tmp_path / "run", 50)
    os.kill(events(tmp_path / "run", "run_started")[0]["coordinator_pid"], signal.SIGSTOP)
    assert_as_undisturbed(finish(process), tmp_path, undisturbed)
    assert len(events(tmp_path / "run", "coordinator_restarted")) == 1
    assert not events(tmp_path / "run", "checkpoint_loaded"), "the workers have kept the state"


def lost_once_and_finished(port: int) -> bool:
    """Whether the new coordinator's metrics go on where the old one's were; Ray keeps those of processes for 20 s."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        lines = [line for line in page.read().decode().splitlines() if 'run="run"' in line]
    lost = [line for line in lines if 'kind="coordinator_lost"' in line and line.endswith(" 1.0")]
    if not lost:
        return False
    assert len(lost) == 1
    process = lost[0].split('WorkerId="')[1].split('"')[0]
    own = [line.removeprefix("ray_orchestrator_") for line in lines if process in line]
    found = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in own}
    assert found["planned_steps"] == STEPS, "the command's start is known to the new one"
    assert 0 < found["steps_total"] < STEPS, "what the old one counted is not counted again"
    return found["committed_step"] == STEPS and found["run_end_timestamp_seconds"] > 0


@pytest.mark.long  # test_autoscaling.py and the README's rehearsal have machines that come late
def test_a_machine_that_comes_late_is_used(nodes: Any, undisturbed: str, tmp_path: Path) -> None:
    """From the minimum up, without restarting who trains already."""
    nodes.add_node(wait=True, num_cpus=1, include_dashboard=False)
    try:
        process = start(command(tmp_path, "--address", nodes.address, "--workers", "1:2"))
        wait_for_step(tmp_path / "run", 20)
        nodes.add_node(wait=False, num_cpus=1, include_dashboard=False)
        found = assert_as_undisturbed(finish(process), tmp_path, undisturbed)
    finally:
        for node in list(nodes.worker_nodes):
            nodes.remove_node(node)
    first, second = generations(tmp_path)
    assert second["pids"][0] == first["pids"][0]
    assert len({*second["nodes"]}) == 2
    incident = found["incidents"][0]  # a second one is the replacement that joins
    assert (incident["kind"], incident["workers_after"], incident["steps_lost"]) == ("workers_joined", 2, 0)


@pytest.mark.long  # CI has 40 minutes; test_autoscaling.py waits for its minimum too
def test_fewer_than_the_minimum_wait_and_say_so(nodes: Any, node_pair: Any, undisturbed: str, tmp_path: Path) -> None:
    process = start(command(tmp_path, "--address", nodes.address, "--workers", "2:3"))
    wait_for_step(tmp_path / "run", 30)
    nodes.remove_node(node_pair[1], allow_graceful=False)
    wait_until(lambda: bool(events(tmp_path / "run", "worker_left")), 60, "the loss")
    nodes.add_node(wait=False, num_cpus=1, include_dashboard=False)
    done = finish(process)
    found = assert_as_undisturbed(done, tmp_path, undisturbed)
    assert "waiting for workers: 1 more needed, 1 there" in done.err
    assert [len(g["pids"]) for g in generations(tmp_path)] == [2, 2]
    assert found["incidents"][0]["kind"] == "node_lost"
    assert found["incidents"][0]["steps_lost"] == 0
