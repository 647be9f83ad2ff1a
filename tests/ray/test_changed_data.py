"""Data that changes under a run: who holds what the run was begun with trains on, and no other joins."""

import os
import signal
from pathlib import Path

from commands import events, finish, kept_in, records, run, start, wait_for_step, wait_until

SETTINGS = [
    "bert", "--model", "tiny", "--sequence-length", "32", "--vocab-size", "300", "--batch-size", "16", "--shards", "4",
    "--steps", "1000000", "--checkpoint-every", "1000000", "--resources-per-worker", "CPU=0.5", "--threads", "1",
]  # fmt: skip


def write_text(file: Path, more: str = "") -> None:
    words = [f"word{number * 7919 % 101} follows word{number * 104729 % 89}" for number in range(8000)]
    stretches = (" ".join(words[start : start + 40]) for start in range(0, len(words), 40))
    file.write_text("\n\n".join(stretches) + more)


def test_a_worker_that_finds_other_data_does_not_join(cluster: str, tmp_path: Path) -> None:
    text, folder = tmp_path / "text.txt", tmp_path / "run"
    write_text(text)
    command = [*SETTINGS, "--data", f"text:{text}", "--workers", "1:2", *kept_in(tmp_path, "run", cluster)]
    training = start(command)
    wait_for_step(folder, 5)
    wait_until(lambda: len(events(folder, "generation_started")[-1]["pids"]) == 2, 60, "two workers")
    write_text(text, more="\n\nsomebody has added this")
    os.kill(events(folder, "generation_started")[-1]["pids"][1], signal.SIGKILL)
    wait_until(lambda: bool(events(folder, "worker_failed")), 90, "a newcomer that is refused")
    wait_for_step(folder, records(folder)[-1]["step"] + 5)
    assert {
        (event["rank"], "is not what the run was begun with" in event["error"])
        for event in events(folder, "worker_failed")
    } == {(-1, True)}
    assert [event["kind"] for event in events(folder, "incident")][-1] == "worker_killed"
    training.send_signal(signal.SIGINT)
    assert finish(training).status == 130
    again = run(*command)
    assert again.status == 2, again.out + again.err
    assert "its checkpoints are of other data" in again.err
    write_text(text)
    back = start(command)
    wait_until(lambda: bool(events(folder, "checkpoint_loaded")), 90, "the run to go on")
    back.send_signal(signal.SIGINT)
    assert finish(back).status == 130
