"""Stopped, killed, torn: the same name resumes, and the end is that of the undisturbed run."""

import os
import signal
from pathlib import Path

import pytest
from commands import Done, events, finish, kept_in, records, result, run, start, wait_for_step, wait_until

STEPS = 60


def arguments(storage: Path, name: str, *extra: str) -> list[str]:
    return ["resnet", "--steps", str(STEPS), "--checkpoint-every", "8", *kept_in(storage, name), *extra]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cluster: str) -> str:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run(*arguments(folder, "run", "--address", cluster))
    assert done.status == 0, done.err
    sha256: str = result(folder / "run")["weights_sha256"]
    return sha256


def assert_as_undisturbed(done: Done, folder: Path, undisturbed: str) -> None:
    assert done.status == 0, done.err
    assert result(folder)["weights_sha256"] == undisturbed
    assert [r["step"] for r in records(folder)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_checkpoints_first(number: int, undisturbed: str, tmp_path: Path) -> None:
    """With a Ray of the command's own, and the signal to its whole session as from a terminal."""
    folder = tmp_path / "run"
    process = start(arguments(tmp_path, "run", "--checkpoint-every", "600s"))
    wait_for_step(folder, 10)
    os.killpg(process.pid, number) if number == signal.SIGINT else os.kill(process.pid, number)
    done = finish(process)
    assert done.status == 130, done.err
    stopped = result(folder)
    assert stopped["status"] == "stopped"
    last = records(folder)[-1]["step"]
    assert 10 <= last < STEPS
    assert (folder / "checkpoints" / f"step-{last}" / "manifest.json").exists()
    assert "resume with:" in done.err
    assert_as_undisturbed(run(*arguments(tmp_path, "run", "--workers", "1")), folder, undisturbed)
    assert events(folder, "checkpoint_loaded")[0]["step"] == last


def test_a_killed_driver_resumes(cluster: str, undisturbed: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(arguments(tmp_path, "run", "--address", cluster))
    wait_until(lambda: bool(events(folder, "checkpoint_saved")), 90, "a checkpoint")
    os.kill(process.pid, signal.SIGKILL)
    finish(process)
    assert not (folder / "result.json").exists()
    assert_as_undisturbed(run(*arguments(tmp_path, "run", "--address", cluster, "--workers", "3")), folder, undisturbed)
    assert events(folder, "checkpoint_loaded")[0]["step"] >= 8


def test_a_corrupted_checkpoint_is_passed_over(cluster: str, undisturbed: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(arguments(tmp_path, "run", "--address", cluster))
    wait_until(lambda: len(events(folder, "checkpoint_saved")) >= 2, 90, "two checkpoints")
    process.send_signal(signal.SIGTERM)
    assert finish(process).status == 130
    steps = sorted(int(p.name.removeprefix("step-")) for p in (folder / "checkpoints").iterdir())
    state = folder / "checkpoints" / f"step-{steps[-1]}" / "state.safetensors"
    damaged = bytearray(state.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    state.write_bytes(damaged)
    assert_as_undisturbed(run(*arguments(tmp_path, "run", "--address", cluster)), folder, undisturbed)
    (rejected,) = events(folder, "checkpoint_rejected")
    assert f"step-{steps[-1]}" in rejected["reason"]
    assert events(folder, "checkpoint_loaded")[0]["step"] == steps[-2]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_worker_is_replaced(number: int, cluster: str, undisturbed: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(arguments(tmp_path, "run", "--address", cluster, "--workers", "2"))
    wait_for_step(folder, 20)
    (generation,) = events(folder, "generation_started")
    os.kill(generation["pids"][1], number)
    assert_as_undisturbed(finish(process), folder, undisturbed)
    killed = result(folder)["incidents"][0]
    assert killed["kind"] == "worker_killed"
    assert (killed["workers_before"], killed["workers_after"], killed["steps_lost"]) == (2, 1, 0)
    assert killed["recovery_s"] > 0
    second = events(folder, "generation_started")[1]
    assert second["pids"] == generation["pids"][:1], "the survivor was restarted"
    assert [r["step"] for r in records(folder)] == list(range(1, result(folder)["steps"] + 1))


def test_a_finished_run_says_so_and_changes_nothing(cluster: str, tmp_path: Path) -> None:
    command = ["resnet", "--workers", "1", "--steps", "2", *kept_in(tmp_path, "run", cluster)]
    assert run(*command).status == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    again = run(*command)
    assert again.status == 0
    assert "finished already" in again.out
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_the_stored_configuration_runs_again_as_it_is(cluster: str, tmp_path: Path) -> None:
    command = ["resnet", "--workers", "1", "--steps", "4", *kept_in(tmp_path, "one", cluster)]
    assert run(*command).status == 0
    config = str(tmp_path / "one" / "config.toml")
    assert run("resnet", "--config", config, "--name", "two").status == 0
    assert result(tmp_path / "one")["weights_sha256"] == result(tmp_path / "two")["weights_sha256"]
