"""The fault matrix: every kind of fault in runs of both workloads, through the command that users rehearse with.

A rehearsal itself compares hashes, ledgers and fired faults with an undisturbed run; here its verdict is read, and
what the run folder says of each incident.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import REPOSITORY, Done, call, events, kept_in, ray_processes, records, result

BERT = (
    "bert", "--steps", "1500", "--checkpoint-every", "1000000", "--hidden-size", "32", "--sequence-length", "16",
    "--shards", "4", "--batch-size", "16",
)  # fmt: skip


def fault(kind: str, rank: int | None = None, **more: float | str) -> str:
    given = {"kind": kind, **({} if rank is None else {"rank": rank}), **more}
    return "\n".join(["[[fault]]", *(f"{key} = {json.dumps(value)}" for key, value in given.items()), ""])


def rehearse(folder: Path, workload: tuple[str, ...], faults: list[str], *extra: str, timeout_s: float = 400) -> Done:
    """The command, on a cluster of its own; nothing of it may be left."""
    schedule = folder / "schedule.toml"
    schedule.write_text("\n".join(faults))
    before = ray_processes()
    command = [sys.executable, "-m", "orchestrator.rehearse", *workload, "--faults", str(schedule)]
    done = call([*command, *kept_in(folder, "r"), *extra], timeout_s)
    assert not ray_processes() - before, "the rehearsal left processes behind"
    return done


def incidents(folder: Path) -> list[dict[str, Any]]:
    return list(result(folder / "r-disturbed")["incidents"])


def assert_passed(done: Done, folder: Path, *kinds: str, cadence: int = 0) -> None:
    """Same weights and ledger, every fault fired, and these kinds of incident among them.

    No committed step is lost, but where a checkpoint had to be loaded, for all workers died: then no more than the
    checkpoints' cadence.
    """
    assert done.status == 0, done.out + done.err
    assert "passed: the same weights" in done.out
    found = [incident["kind"] for incident in incidents(folder)]
    for kind in kinds:
        assert kind in found, f"{kind} is not among {found}"
    lossy = [incident for incident in incidents(folder) if incident["steps_lost"]]
    assert len(lossy) <= len(events(folder / "r-disturbed", "checkpoint_loaded"))
    assert all(incident["steps_lost"] <= cadence for incident in lossy)
    for incident in incidents(folder):
        phases = ("regroup_s", "restore_s", "recompute_s")
        assert sum(incident[phase] for phase in phases) == pytest.approx(incident["recovery_s"], abs=0.01)


RESNET_1500 = ("resnet", "--steps", "1500", "--checkpoint-every", "50")
# Steps long enough for replacements to come between two faults.
BERT_1500 = (*BERT, "--steps", "1500", "--checkpoint-every", "50", "--hidden-size", "64", "--sequence-length", "64")


@pytest.mark.busy
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "workload", [RESNET_1500, pytest.param(BERT_1500, marks=pytest.mark.long)], ids=["resnet", "bert"]
)
def test_workers_fail_in_every_way_and_at_bad_moments(workload: tuple[str, ...], tmp_path: Path) -> None:
    """One after the other, two at once, during recovery, while state is handed over, while a checkpoint is written."""
    faults = [
        fault("kill", 1, step=10),
        fault("exception", 0, step=20, workers=3),
        fault("stop", 0, step=100, workers=3),
        fault("slow", 0, step=5, seconds=0.05),
        # Does nothing, but for being there with three workers: what is to happen in a restore must not happen now.
        fault("slow", 0, step=300, seconds=0.0, steps=1, workers=3),
        # Two of three in one step; then who receives state dies, and then who gives it.
        fault("kill", 1, step=400, workers=3),
        fault("kill", 2, step=400),
        fault("kill", 1, step=401, during="restore", workers=2),
        fault("kill", 0, step=402, during="restore", workers=2),
        # Rank 0 and at once another.
        fault("kill", 0, step=450, workers=3),
        fault("kill", 1, step=450),
        fault("kill", 0, step=550, during="checkpoint", workers=2),
        fault("slow", 1, step=650, seconds=0.3, steps=40, workers=2),
        fault("kill", 0, step=1499, workers=2),
    ]
    done = rehearse(tmp_path, workload, faults, "--workers", "3", "--stall-limit", "2", timeout_s=500)
    assert_passed(done, tmp_path, "worker_killed", "worker_failed", "worker_frozen", "rebalanced", cadence=50)
    assert events(tmp_path / "r-disturbed", "straggler_found")
    errors = (tmp_path / "r-disturbed" / "logs" / "errors.log").read_text()
    assert "InjectedError" in errors
    assert "was given up and killed; its stack:" in errors
    first, second = events(tmp_path / "r-disturbed", "generation_started")[:2]
    assert set(second["pids"]) < set(first["pids"]), "survivors of a kill were restarted"


@pytest.mark.busy
def test_the_readme_s_schedule(tmp_path: Path) -> None:
    """As typed there, but for the folder: nodes are drained, lost and added, workers killed."""
    faults = [(REPOSITORY / "workloads" / "faults.toml").read_text()]
    done = rehearse(tmp_path, ("resnet", "--epochs", "45"), faults, "--workers", "1:3")
    assert_passed(done, tmp_path, "worker_killed", "node_drained", "node_lost", "workers_joined")
    assert_left_in_time(tmp_path / "r-disturbed")


@pytest.mark.long
def test_nodes_are_drained_lost_and_added_and_a_worker_killed(tmp_path: Path) -> None:
    """As the README's schedule, with bert."""
    faults = [
        fault("drain", 2, step=10, seconds=30),
        fault("add-node", step=20),
        fault("node-loss", 1, step=60, workers=3),
        fault("add-node", step=70),
        fault("kill", 0, step=1000, workers=2),
    ]
    done = rehearse(tmp_path, BERT, faults, "--workers", "1:3")
    assert_passed(done, tmp_path, "worker_killed", "node_drained", "node_lost", "workers_joined")
    assert_left_in_time(tmp_path / "r-disturbed")


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sync", ["parameter-server", "local-sgd", "diloco"])
def test_every_sync_goes_on(sync: str, tmp_path: Path) -> None:
    """Two workers die close together, a node comes, the coordinator dies, a node goes, and the only other worker."""
    served = sync == "parameter-server"
    faults = [
        fault("kill", 1, step=20, workers=3),
        fault("kill", 2, step=21),
        fault("add-node", step=40),
        fault("kill-coordinator", step=80),
        *([fault("kill-server", 1, step=110)] if served else []),
        fault("node-loss", 1, step=140, workers=2),
        fault("kill", 0, step=200),
    ]
    settings = ("resnet", "--steps", "300", "--sync", sync, "--checkpoint-every", "20")
    done = rehearse(tmp_path, settings, faults, "--workers", "1:3", timeout_s=800)
    kinds = ["worker_killed", "node_lost", "coordinator_lost", *(["server_lost"] if served else [])]
    # What is being written when a server is lost is lost too.
    assert_passed(done, tmp_path, *kinds, cadence=60 if served else 0)


def assert_left_in_time(folder: Path) -> None:
    """The worker of a drained node left it before the deadline."""
    (left,) = [e for e in events(folder, "worker_left") if e["why"] == "node_drained"]
    (notice,) = events(folder, "node_draining")
    assert left["node"] == notice["node"]
    assert left["time_s"] < notice["deadline_s"]


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_soak_of_random_faults(seed: int, tmp_path: Path) -> None:
    """At random times, and new nodes for lost ones."""
    chance = random.Random(seed)
    kinds = ["kill"] * 3 + ["exception", "stop", "slow"] + ["node-loss"] * 2
    chance.shuffle(kinds)
    faults, at = [], 3.0
    for kind in kinds:
        faults.append(fault(kind, 0, time_s=at))
        if kind == "node-loss":
            faults.append(fault("add-node", time_s=at + 1.0))
        at += chance.uniform(0.5, 4.0)
    workload = ("resnet", "--steps", "1200", "--checkpoint-every", "200")
    done = rehearse(tmp_path, workload, faults, "--workers", "1:3", "--stall-limit", "2", timeout_s=600)
    assert done.status == 0, done.out + done.err
    assert [r["step"] for r in records(tmp_path / "r-disturbed")] == list(range(1, 1201))
