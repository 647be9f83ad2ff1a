"""Stopped, killed, torn: the same name resumes, and the end is that of the undisturbed run."""

import os
import signal
from pathlib import Path

import pytest
from commands import (
    Done,
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
from logbooks.test_logbooks import losses

STEPS = 60
LOG = ["--log", "tensorboard"]
UNUSED = ("monitor.py", "dashboard/dashboard.py", "ray::ElasticController")  # by a Ray of the command's own


def arguments(storage: Path, name: str, *extra: str) -> list[str]:
    # Steps that are no quicker than metrics.jsonl is written, or the end comes before what is to happen in the middle.
    return [
        "resnet",
        "--batch-size",
        "512",
        "--steps",
        str(STEPS),
        "--checkpoint-every",
        "8",
        *kept_in(storage, name),
        *extra,
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cluster: str) -> Path:
    """The run's folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run(*arguments(folder, "run", "--address", cluster))
    assert done.status == 0, done.err
    return folder / "run"


def assert_as_undisturbed(done: Done, folder: Path, undisturbed: Path) -> None:
    assert done.status == 0, done.err
    assert result(folder)["weights_sha256"] == result(undisturbed)["weights_sha256"]
    assert [r["step"] for r in records(folder)] == list(range(1, STEPS + 1))


def test_asked_to_stop_it_checkpoints_first(undisturbed: Path, tmp_path: Path) -> None:
    """By each signal, one after the other; with a Ray of the command's own. TensorBoard has every step once.

    Each to the whole group: as Ctrl-C and a terminal that is closed send it, and coreutils' timeout.
    """
    folder, last, stops = tmp_path / "run", 0, []
    of_others = ray_processes(UNUSED)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process = start(arguments(tmp_path, "run", "--checkpoint-every", "600s", "--workers", "2", *LOG))
        wait_for_step(folder, last + 5)
        assert ray_processes(UNUSED) <= of_others
        os.killpg(process.pid, number)
        done = finish(process)
        assert done.status == 130, done.err
        assert result(folder)["status"] == "stopped"
        assert "resume with:" in done.err
        before, last = last, records(folder)[-1]["step"]
        assert before + 5 <= last < STEPS
        stops.append(last)
        assert (folder / "checkpoints" / f"step-{last}" / "manifest.json").exists()
    done = run(*arguments(tmp_path, "run", "--workers", "1", *LOG))
    assert_as_undisturbed(done, folder, undisturbed)
    assert "--log" not in done.err
    assert losses(folder, "tensorboard") == [(r["step"], pytest.approx(r["loss"])) for r in records(folder)]
    assert [e["step"] for e in events(folder, "checkpoint_loaded")] == stops


def test_asked_twice_it_stops_at_once(tmp_path: Path) -> None:
    """With a Ray of its own, which ends with it, and is not started again by what still runs in the command."""
    before = ray_processes()
    process = start(["resnet", "--steps", "100000", "--workers", "1", *kept_in(tmp_path)])
    wait_for_step(tmp_path / "run", 1)
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGTERM)
    done = finish(process)
    assert done.status == 130, done.err
    assert "Traceback" not in done.err
    wait_until(lambda: ray_processes() <= before, 30, "Ray's processes to end")


def test_asked_to_stop_while_it_waits_for_room(cluster: str, tmp_path: Path) -> None:
    whole = ["--workers", "1", "--resources-per-worker", "CPU=4"]
    holder = start(["resnet", "--steps", "100000", *whole, *kept_in(tmp_path, "holder", cluster)])
    try:
        wait_for_step(tmp_path / "holder", 1)
        waiting, log = (
            start(["resnet", *whole, *kept_in(tmp_path, "waiting", cluster)]),
            tmp_path / "waiting/logs/ray.log",
        )
        wait_until(lambda: log.exists() and "Attempting to start" in log.read_text(), 60, "the second run to wait")
        waiting.terminate()
        done = finish(waiting)
    finally:
        holder.terminate()
        held = finish(holder)
    assert done.status == held.status == 130, done.err
    assert "before this command's first step" in done.err


def test_a_killed_driver_resumes(cluster: str, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(arguments(tmp_path, "run", "--address", cluster))
    wait_until(lambda: bool(events(folder, "checkpoint_saved")), 90, "a checkpoint")
    os.kill(process.pid, signal.SIGKILL)
    told = finish(process).err
    assert "ended without a word" in told
    assert "resume with:" in told
    assert not (folder / "result.json").exists()
    assert_as_undisturbed(run(*arguments(tmp_path, "run", "--address", cluster, "--workers", "3")), folder, undisturbed)
    assert events(folder, "checkpoint_loaded")[0]["step"] >= 8


@pytest.mark.long  # tests/orchestrator/test_checkpoints.py flips every byte
def test_a_corrupted_checkpoint_is_passed_over(cluster: str, undisturbed: Path, tmp_path: Path) -> None:
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


@pytest.mark.long  # CI has 40 minutes; test_rehearsals.py kills workers
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_worker_is_replaced(number: int, cluster: str, undisturbed: Path, tmp_path: Path) -> None:
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


@pytest.mark.long  # CI has 40 minutes; test_run_folder.py reads it back
def test_the_stored_configuration_runs_again_as_it_is(cluster: str, undisturbed: Path, tmp_path: Path) -> None:
    stored = ["--config", str(undisturbed / "config.toml"), "--storage", str(tmp_path), "--name", "two"]
    assert_as_undisturbed(run("resnet", *stored), tmp_path / "two", undisturbed)
