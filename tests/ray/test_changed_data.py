"""Data that changes under a run: who holds what the run was begun with trains on, and no other joins."""

import os
import signal
from pathlib import Path

from commands import events, finish, kept_in, result, run, start, wait_for_step, wait_until

SETTINGS = [
    "bert", "--model", "tiny", "--sequence-length", "32", "--vocab-size", "300", "--batch-size", "16", "--shards", "4",
    "--steps", "400", "--checkpoint-every", "1000000", "--resources-per-worker", "CPU=0.5",
]  # fmt: skip


def write_text(file: Path, more: str = "") -> None:
    words = [f"word{number * 7919 % 101} follows word{number * 104729 % 89}" for number in range(8000)]
    stretches = (" ".join(words[start : start + 40]) for start in range(0, len(words), 40))
    file.write_text("\n\n".join(stretches) + more)


def test_a_worker_that_finds_other_data_does_not_join(cluster: str, tmp_path: Path) -> None:
    text, data = tmp_path / "text.txt", ["--data", f"text:{tmp_path / 'text.txt'}"]
    write_text(text)
    plain = run(*SETTINGS, *data, "--workers", "1", *kept_in(tmp_path, "plain", cluster))
    assert plain.status == 0, plain.err
    disturbed = start([*SETTINGS, *data, "--workers", "1:2", *kept_in(tmp_path, "disturbed", cluster)])
    folder = tmp_path / "disturbed"
    wait_for_step(folder, 5)
    wait_until(lambda: len(events(folder, "generation_started")[-1]["pids"]) == 2, 60, "two workers")
    write_text(text, more="\n\nsomebody has added this")
    os.kill(events(folder, "generation_started")[-1]["pids"][1], signal.SIGKILL)
    done = finish(disturbed)
    assert done.status == 0, done.out + done.err
    refused = events(folder, "worker_failed")
    assert refused, "the newcomer came too late to be refused"
    assert all("is not what the run was begun with" in event["error"] and event["rank"] == -1 for event in refused)
    assert [event["kind"] for event in events(folder, "incident")][-1] == "worker_killed"
    assert result(folder)["weights_sha256"] == result(tmp_path / "plain")["weights_sha256"]
