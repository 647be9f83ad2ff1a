"""Faults of a schedule in a plain run: what ends the run, what does not, and what is refused."""

from pathlib import Path

import pytest
from commands import events, kept_in, result, run


def command(storage: Path, *extra: str) -> list[str]:
    return ["resnet", "--steps", "400", *kept_in(storage), *extra]


def schedule(folder: Path, *tables: str) -> str:
    file = folder / "faults.toml"
    file.write_text("\n".join(f"[[fault]]\n{table}" for table in tables))
    return str(file)


@pytest.mark.busy
def test_a_step_that_kills_its_workers_is_no_accident(tmp_path: Path) -> None:
    """Dying without a word in the same step again and again, with the same shards in hand."""
    faults = schedule(tmp_path, *['kind = "kill"\nrank = 0\nstep = 20'] * 12)
    # Deaths count of who computed when it was last heard: with larger steps it computes most of the time.
    done = run(*command(tmp_path, "--workers", "2", "--faults", faults, "--batch-size", "512"))
    assert done.status == 1
    assert "4 workers died one after the other at about step" in done.err
    assert 4 <= len(events(tmp_path / "run", "fault_fired")) < 12, "it stopped before the schedule did"
    assert result(tmp_path / "run")["status"] == "failed"


def test_the_budget_of_incidents_is_finite(tmp_path: Path) -> None:
    faults = schedule(tmp_path, *[f'kind = "kill"\nrank = 0\nstep = {step}' for step in (20, 120, 220)])
    done = run(*command(tmp_path, "--workers", "2", "--faults", faults, "--max-incidents", "1"))
    assert done.status == 1
    assert "2 workers were lost, and --max-incidents allows 1" in done.err
    folder = tmp_path / "run"
    told, left = result(folder)["failure"], events(folder, "worker_left")[-1]
    assert (told["kind"], told["node"], told["pid"], told["worker"]) == ("worker_killed", left["node"], left["pid"], 0)
    assert told["log_tail"], "Ray's file outlives the worker"
    assert all(f"  | {line}\n" in done.err for line in told["log_tail"])
    assert told["host"]
    assert f"where: worker 0 (process {left['pid']}) on {told['host']} (node {left['node'][:12]})" in done.err
    assert "the last lines of rank 0" in (folder / "logs" / "errors.log").read_text()
    assert f"resume with: {told['resume']}" in done.err


@pytest.mark.long  # CI has 40 minutes; a frozen one is in the rehearsal
def test_a_worker_that_is_stuck_is_replaced_and_its_stack_kept(tmp_path: Path) -> None:
    faults = schedule(tmp_path, 'kind = "slow"\nrank = 1\nstep = 20\nseconds = 1000')
    done = run(*command(tmp_path, "--workers", "2", "--faults", faults, "--stall-limit", "2"))
    assert done.status == 0, done.err
    assert result(tmp_path / "run")["incidents"][0]["kind"] == "worker_stuck"
    assert "in drag" in (tmp_path / "run" / "logs" / "errors.log").read_text()


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ('kind = "melt"\nrank = 0\nstep = 1', "fault 1: kind = 'melt': not known; use kill, stop"),
        ('kind = "kill"\nstep = 1', "fault 1: kill needs the rank of a worker"),
        ('kind = "kill"\nrank = 0', "fault 1: give step or time_s, one of them"),
        ('kind = "kill"\nrank = 0\nstep = 1\nwhen = 2', "fault 1: when: no such key"),
        ('kind = "kill"\nnode = 0\nstep = 1', "node: goes with drain, node-loss, network-cut, and without rank"),
        ('kind = "drain"\nstep = 1', "drain needs the rank of a worker on the node, or the number of the node"),
        ('kind = "slow"\nrank = 0\nstep = 2\nduring = "restore"', "during: goes with kill or stop, and with step"),
        ('kind = "kill"\nrank = 0\nstep = 2\nduring = "lunch"', "during = 'lunch': not known; use step, restore"),
        ('kind = "add-node"\nstep = 1', "add-node needs a cluster made for it"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(table: str, line: str, tmp_path: Path) -> None:
    done = run(*command(tmp_path, "--faults", schedule(tmp_path, table)), RAY_ADDRESS="nobody:1")
    assert done.status == 2
    assert line in done.err
    assert not (tmp_path / "run").exists()
