"""Ways to share what workers learn, through the real command line: bits, losses, staleness."""

import os
import signal
from pathlib import Path

import pytest
from commands import events, finish, kept_in, ray_processes, records, result, run, start, wait_for_step, wait_until

STEPS = 60
ROOM = ["--workers", "2", "--resources-per-worker", "CPU=0.5", "--checkpoint-every", "10"]
RESNET = ["resnet", "--steps", str(STEPS), *ROOM]
BERT = ["bert", "--steps", str(STEPS), "--hidden-size", "32", "--batch-size", "16", "--shards", "4", *ROOM]
SERVED = ["--sync", "parameter-server", "--staleness"]


def servers() -> list[int]:
    """Process ids of the parameter servers on this machine."""
    return sorted(ray_processes(("ray::Server",)))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("settings", [RESNET, pytest.param(BERT, marks=pytest.mark.long)], ids=["resnet", "bert"])
def test_staleness_0_has_the_bits_of_allreduce_whoever_is_lost(
    settings: list[str], cluster: str, tmp_path: Path
) -> None:
    """A worker is killed, then a server: its replacement and all others go back to the last checkpoint."""
    plain = start([*settings, *kept_in(tmp_path, "plain", cluster)])
    assert finish(plain).status == 0
    process, served = start([*settings, *SERVED, "0", *kept_in(tmp_path, "served", cluster)]), tmp_path / "served"
    wait_until(lambda: any(e["workers"] == 2 for e in events(served, "generation_started")), 90, "two workers")
    wait_for_step(served, 12, 180)
    os.kill(events(served, "generation_started")[-1]["pids"][1], signal.SIGKILL)
    wait_until(lambda: len(events(served, "incident")) > 0, 60, "the worker's loss to be over")
    wait_for_step(served, 25)
    assert len(servers()) == 2
    os.kill(servers()[0], signal.SIGKILL)
    done = finish(process)
    assert done.status == 0, done.out + done.err
    here, there = result(served), result(tmp_path / "plain")
    assert here["weights_sha256"] == there["weights_sha256"]
    assert here["metrics"] == there["metrics"]
    assert here["deterministic"]
    assert here["staleness"] == {"mean": 0.0, "max": 0}
    first, second = [i for i in here["incidents"] if i["kind"] != "workers_joined"]
    assert (first["kind"], first["workers_after"], first["steps_lost"]) == ("worker_killed", 1, 0)
    assert second["kind"] == "server_lost"
    assert 0 <= second["steps_lost"] <= 30, "the cadence, and what was being written"
    ledgers = [
        [(r["step"], r["samples"], r["ledger"]) for r in records(tmp_path / name)] for name in ("served", "plain")
    ]
    assert ledgers[0] == ledgers[1]


@pytest.mark.timeout(600)
@pytest.mark.long  # CI has 40 minutes; test_sync_converges.py trains with stale gradients
@pytest.mark.parametrize("staleness", ["2", "inf"])
def test_stale_gradients_train_too_and_a_stop_is_resumed(staleness: str, cluster: str, tmp_path: Path) -> None:
    flags = [*SERVED, staleness, "--eval-every", "2", *kept_in(tmp_path, "run", cluster)]
    process, folder = start([*RESNET, *flags]), tmp_path / "run"
    wait_for_step(folder, 10, 180)
    process.send_signal(signal.SIGINT)
    stopped = finish(process)
    assert stopped.status == 130, stopped.out + stopped.err
    at = len(records(folder))
    assert at < STEPS
    assert (folder / f"checkpoints/step-{at}/manifest.json").exists()
    assert len(result(folder)["weights_sha256"]) == 64
    done = run(*RESNET, *flags, "--servers", "3", "--workers", "1:3")
    assert done.status == 0, done.out + done.err
    found = result(folder)
    assert (found["status"], found["steps"], found["deterministic"]) == ("finished", STEPS, False)
    assert [r["step"] for r in records(folder)] == list(range(1, STEPS + 1))
    assert sum(r["samples"] for r in records(folder)) == found["samples"]
    assert found["staleness"]["max"] == max(r["staleness_max"] for r in records(folder) if r["step"] > at)
    if staleness != "inf":  # begun up to K steps ahead, while others were up to K steps ahead of it: 8 updates a step
        assert max(r["staleness_max"] for r in records(folder)) <= (2 * int(staleness) + 1) * 8
    assert found["metrics"]["accuracy"] > 0.9
    assert (folder / "model/model.safetensors").exists()
    assert [e["step"] for e in events(folder, "evaluated")][-1] == STEPS


@pytest.mark.timeout(600)
@pytest.mark.long  # CI has 40 minutes; test_rounds.py has the bits
def test_rounds_have_the_same_bits_when_a_worker_is_lost(cluster: str, tmp_path: Path) -> None:
    """And with another number of workers; the round that was broken is taken again."""
    settings = [*RESNET, "--sync", "diloco", "--local-steps", "7", "--balance", "even"]
    alone = start([*settings, "--workers", "1", *kept_in(tmp_path, "alone", cluster)])
    assert finish(alone).status == 0
    process, folder = start([*settings, *kept_in(tmp_path, "lossy", cluster)]), tmp_path / "lossy"
    wait_for_step(folder, 14, 180)
    os.kill(events(folder, "generation_started")[-1]["pids"][1], signal.SIGKILL)
    done = finish(process)
    assert done.status == 0, done.out + done.err
    found = result(folder)
    assert found["weights_sha256"] == result(tmp_path / "alone")["weights_sha256"]
    assert found["deterministic"]
    assert (found["incidents"][0]["kind"], found["incidents"][0]["steps_lost"]) == ("worker_killed", 0)
    assert [r["step"] for r in records(folder)] == list(range(1, STEPS + 1))
    assert [r["staleness_max"] for r in records(folder)] == [step % 7 for step in range(STEPS)]


SYNCS = {
    "served": [*SERVED, "0"],
    "local-sgd": ["--sync", "local-sgd"],
    "diloco": ["--sync", "diloco", "--local-steps", "7"],
}


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("sync", SYNCS)
def test_two_stops_and_other_numbers_change_no_bit(sync: str, cluster: str, tmp_path: Path) -> None:
    """Stopped twice, resumed with more and with fewer workers, and with other numbers of servers."""
    settings = [*RESNET, "--steps", "120", *SYNCS[sync]]
    assert finish(start([*settings, *kept_in(tmp_path, "plain", cluster)])).status == 0
    folder, at = tmp_path / "stopped", 0
    for number, (workers, servers) in enumerate((("2", "2"), ("1:3", "3"), ("1", "1"))):
        more = ["--servers", servers] if sync == "served" else []
        process = start([*settings, *kept_in(tmp_path, "stopped", cluster), "--workers", workers, *more])
        if number < 2:
            wait_for_step(folder, at + 10, 180)
            process.send_signal(signal.SIGINT)
        done = finish(process)
        assert done.status == (130 if number < 2 else 0), done.out + done.err
        at = len(records(folder))
    assert result(folder)["weights_sha256"] == result(tmp_path / "plain")["weights_sha256"]
    assert [r["step"] for r in records(folder)] == list(range(1, 121))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_dispatcher_is_killed(cluster: str, tmp_path: Path) -> None:
    """Its servers end with it: all go back to the newest checkpoint, the workers stay."""
    assert finish(start([*RESNET, *kept_in(tmp_path, "plain", cluster)])).status == 0
    process, folder = start([*RESNET, *SERVED, "0", *kept_in(tmp_path, "served", cluster)]), tmp_path / "served"
    wait_for_step(folder, 25, 180)
    os.kill(events(folder, "run_started")[0]["coordinator_pid"], signal.SIGKILL)
    done = finish(process)
    assert done.status == 0, done.out + done.err
    assert result(folder)["weights_sha256"] == result(tmp_path / "plain")["weights_sha256"]
    assert events(folder, "coordinator_restarted")
    assert [r["step"] for r in records(folder)] == list(range(1, STEPS + 1))
