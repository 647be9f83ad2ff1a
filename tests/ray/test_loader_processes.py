"""Loader processes of a run: they go with their worker, take it along when they are killed, and change no bit."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from commands import events, finish, kept_in, result, run, start, wait_until
from PIL import Image

SETTINGS = ["resnet", "--model", "resnet8", "--image-size", "32", "--batch-size", "32", "--shards", "4"]
SERVER = "multiprocessing.forkserver"  # in the command line of the fork server, and so of its forks
FAULTS = """
[[fault]]
kind = "kill"
rank = 1
step = 15
workers = 2
"""


def photos(folder: Path) -> str:
    random = np.random.default_rng(0)
    for split, count in (("train", 200), ("val", 10)):
        for number in range(count):
            file = folder / split / f"class{number % 5}" / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(file)
    return f"imagefolder:{folder}"


def processes(word: str) -> dict[int, int]:
    """Process -> its parent, of those with a word in their command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if word.encode() in (entry / "cmdline").read_bytes():
                    found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


@pytest.mark.long  # tests/orchestrator/test_loaders.py has the processes, and CI has 40 minutes
@pytest.mark.timeout(600)
def test_killed_workers_and_killed_loaders_change_nothing(cluster: str, tmp_path: Path) -> None:
    data, before = ["--data", photos(tmp_path / "photos"), "--steps", "200"], set(processes(SERVER))
    room = ["--resources-per-worker", "CPU=0.5"]
    plain = run(
        *SETTINGS, *data, "--workers", "1", "--loader-processes", "0", *room, *kept_in(tmp_path, "plain", cluster)
    )
    assert plain.status == 0, plain.err
    (tmp_path / "faults.toml").write_text(FAULTS)
    given = ["--workers", "2", "--loader-processes", "2", "--faults", str(tmp_path / "faults.toml"), *room]
    killed = start([*SETTINGS, *data, *given, *kept_in(tmp_path, "killed", cluster)])

    def loaders() -> list[int]:
        """Those that a server has forked."""
        ours = {pid: parent for pid, parent in processes(SERVER).items() if pid not in before}
        return [pid for pid, parent in ours.items() if parent in ours]

    wait_until(lambda: bool(loaders()), 120, "loader processes")
    os.kill(loaders()[0], signal.SIGKILL)
    done = finish(killed)
    assert done.status == 0, done.err
    assert result(tmp_path / "killed")["weights_sha256"] == result(tmp_path / "plain")["weights_sha256"]
    kinds = {e["kind"] for e in events(tmp_path / "killed", "incident")} - {"workers_joined"}
    assert kinds == {"worker_failed", "worker_killed"}
    assert "a loader process was killed" in (tmp_path / "killed" / "logs" / "errors.log").read_text()
    wait_until(lambda: not set(processes(SERVER)) - before, 30, "the end of all loaders")
