"""cluster/onprem.yaml as its comments say: `ray up` over SSH, a job, a machine that is cut off, and down again."""

import os
import signal
from pathlib import Path

import pytest
import yaml
from commands import RAY, REPOSITORY, events, finish, kept_in, records, result, run, wait_for_step, wait_until
from hosts import built
from machines import NOT_HERE, Machines

pytestmark = pytest.mark.skipif(bool(NOT_HERE), reason=NOT_HERE)

SMALL = ["--steps", "800", "--sequence-length", "16", "--hidden-size", "32", "--shards", "4", "--batch-size", "16"]
SELDOM = ["--checkpoint-every", "1000000"]


def as_changed(net: Machines) -> Path:
    """The file with what it says to change changed, and nothing else."""
    text = (REPOSITORY / "cluster/onprem.yaml").read_text()
    workers = ", ".join(net.address(number) for number in range(1, net.desk))
    for old, new in (
        ("head_ip: 10.0.0.10 ", f"head_ip: {net.address(0)} "),
        ("worker_ips: [10.0.0.11, 10.0.0.12, 10.0.0.13] ", f"worker_ips: [{workers}] "),
        ("min_workers: 3 ", f"min_workers: {net.desk - 1} "),
        ("max_workers: 3 ", f"max_workers: {net.desk - 1} "),
        ("ssh_user: ubuntu ", "ssh_user: root "),
        ("ssh_private_key: ~/.ssh/id_ed25519 ", f"ssh_private_key: {net.key} "),
    ):
        assert text.count(old) == 1, f"{old} is not in the file once"
        text = text.replace(old, new)
    changed = [line for line in text.splitlines() if "# CHANGE" in line]
    assert len(changed) == 6, "there is something else to change"
    file = net.home(net.desk) / "onprem.yaml"
    file.write_text(text)
    assert yaml.safe_load(text)["provider"]["head_ip"] == net.address(0)
    return file


@pytest.mark.long  # CI has 40 minutes; test_hosts.py cuts a host off
@pytest.mark.timeout(600)
def test_machines_over_ssh(tmp_path: Path) -> None:
    """Up, a job on two machines, one of them cut off, the weights of an undisturbed run, down."""
    with built(Machines, 3) as net:
        file = str(as_changed(net))
        token = net.call([RAY, "get-auth-token", "--generate"], 60)
        assert token.status == 0, token.out + token.err
        up = net.call([RAY, "up", "--yes", "--no-config-cache", file], 240)
        assert up.status == 0, up.out + up.err
        tunnel = net.begin([RAY, "dashboard", file])
        wait_until(lambda: net.call(["bash", "-c", "</dev/tcp/localhost/8265"], 10).status == 0, 60, "the tunnel")
        kept, workers = net.shared / "job", ["--workers", "2", "--placement", "strict-spread"]
        command = ["python", "-m", "orchestrator.run", "bert", *SMALL, *SELDOM, *kept_in(net.shared, "job"), *workers]
        submit = [RAY, "job", "submit", "--address", "http://localhost:8265", "--working-dir", ".", "--", *command]
        job = net.begin(submit)
        wait_until(lambda: bool(records(kept)) or job.poll() is not None, 240, "the job's first step")
        assert job.poll() is None, finish(job).out
        wait_for_step(kept, 100)
        net.plug(2, "down")
        done = finish(job)
        assert done.status == 0, done.out + done.err
        assert "finished: 800 steps" in done.out
        assert records(kept)[-1]["workers"] == 1
        os.killpg(tunnel.pid, signal.SIGKILL)
        tunnel.communicate(timeout=30)
        net.plug(2, "up")
        down = net.call([RAY, "down", "--yes", file], 120)
        assert down.status == 0, down.out + down.err
        alone = run("bert", *SMALL, *SELDOM, *kept_in(tmp_path, "alone"), "--workers", "1")
        assert alone.status == 0, alone.out + alone.err
        for number in range(3):  # a worker's Ray ends by itself, a minute after the head's
            gone = lambda n=number: "raylet" not in net.ssh(n, "ps -e -o args").out  # noqa: E731
            wait_until(gone, 120, f"Ray to end on machine {number}")
        assert result(kept)["weights_sha256"] == result(tmp_path / "alone")["weights_sha256"]
        assert [(i["kind"], i["steps_lost"]) for i in result(kept)["incidents"]] == [("node_lost", 0)]
        assert len(set(events(kept, "generation_started")[0]["nodes"])) == 2
        secret = token.out.strip().splitlines()[-1]
        logged = [f for f in kept.rglob("*") if f.is_file() and secret.encode() in f.read_bytes()]
        assert not logged, "the token is in the run folder"
