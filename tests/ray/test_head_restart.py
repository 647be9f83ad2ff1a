"""The head goes and comes back under a running job; Ray's store is a Redis on another machine."""

import shutil
from pathlib import Path

import pytest
from commands import REPOSITORY, finish, kept_in, records, result, run, wait_for_step, wait_until
from hosts import built
from machines import NOT_HERE, Machines

REDIS = shutil.which("redis-server")
pytestmark = [
    pytest.mark.skipif(bool(NOT_HERE) or not REDIS, reason=NOT_HERE or "not installed: redis-server"),
    pytest.mark.long,
]

STEPS = ["resnet", "--steps", "1500", "--checkpoint-every", "1000000"]
STORE_PORT, PATIENCE_S = 6390, 120


def ray_start(net: Machines, number: int, cpus: int) -> None:
    """`ray start` there; only the head is told of Redis, only the others of patience with the head."""
    head, limits = number == 0, "--min-worker-port=0 --max-worker-port=0 --object-store-memory=100000000"
    joins = "--head --port=6379 --include-dashboard=false" if head else f"--address={net.address(0)}:6379"
    told = (
        f"RAY_REDIS_ADDRESS={net.address(net.desk)}:{STORE_PORT}"
        if head
        else f"RAY_gcs_rpc_server_reconnect_timeout_s={PATIENCE_S}"
    )
    done = net.ssh(number, f"{told} {everywhere()} ~/venv/bin/ray start {joins} --num-cpus={cpus} {limits}")
    assert done.status == 0, done.out + done.err


def everywhere() -> str:
    """The environment of every command on a machine."""
    return f"RAY_AUTH_MODE=disabled PYTHONPATH={REPOSITORY} PATH=~/venv/bin:$PATH"


@pytest.mark.timeout(400)
def test_a_head_restarts_and_the_run_goes_on(tmp_path: Path) -> None:
    """The command and its coordinator are on a machine of their own: workers train on while the head is away."""
    with built(Machines, 4) as net:
        store = ["--bind", net.address(net.desk), "--port", str(STORE_PORT), "--save", "", "--protected-mode", "no"]
        redis = net.begin([str(REDIS), *store, "--dir", str(tmp_path)])
        for number, cpus in enumerate((0, 0, 1, 1)):
            ray_start(net, number, cpus)
        kept = [*kept_in(net.shared, "run", f"{net.address(0)}:6379"), "--workers", "1:2"]
        command = f"cd {REPOSITORY} && {everywhere()} python -m orchestrator.run {' '.join([*STEPS, *kept])}"
        job = net.begin(net.login(1, command))
        wait_until(lambda: bool(records(net.shared / "run")) or job.poll() is not None, 120, "the first step")
        assert job.poll() is None, finish(job)
        wait_for_step(net.shared / "run", 100)
        assert net.ssh(0, f"{everywhere()} ~/venv/bin/ray stop --force").status == 0
        gone_at = records(net.shared / "run")[-1]["step"]
        wait_for_step(net.shared / "run", gone_at + 100)
        ray_start(net, 0, cpus=0)
        done = finish(job)
        assert done.status == 0, done.out + done.err
        found = result(net.shared / "run")
        redis.kill()
        redis.communicate(timeout=30)
    alone = run(*STEPS, *kept_in(tmp_path, "alone"), "--workers", "1")
    assert alone.status == 0, alone.err
    assert found["weights_sha256"] == result(tmp_path / "alone")["weights_sha256"]
    assert found["incidents"] == []
