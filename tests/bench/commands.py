"""Commands under measurement, each in an environment of its own: no Ray cluster before, nothing left after.

A visit gets a fresh RAY_TMPDIR: Ray's sessions go with the visit's folder, and the processes that a visit leaves
behind are known by that variable in their environment. Ray also looks for clusters in the list of processes, so a
visit waits until nobody else's is up.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paired
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
BENCH = Path(__file__).resolve().parent
COMMAND_TIMEOUT_S = 3600.0
LEAVE_TIMEOUT_S = 60.0
QUIET_TIMEOUT_S = 900.0  # somebody else's tests with a cluster
# An ordinary user has none of these: they would choose the cluster, the threads, or slow down every import.
DROPPED = ("RAY_ADDRESS", "RAY_AUTH_MODE", "OMP_NUM_THREADS", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED")


@dataclass(frozen=True)
class Finished:
    """A command that ended well.

    Attributes:
        started_s: when it was typed, in seconds since 1970.
        wall_s: how long it took to its end.
        stdout: what it printed.
        folder: its scratch folder, there as long as the `visit` lasts.
    """

    started_s: float
    wall_s: float
    stdout: str
    folder: Path


@contextmanager
def visit(alone: bool = True) -> Iterator[Path]:
    """A scratch folder for one command; when it ends, the command's processes are gone and so is the folder.

    Args:
        alone: wait until nobody else's cluster is up, for what is timed.
    """
    if alone and (others := _clusters()):
        paired.say(f"waiting: a Ray cluster of somebody else's is up (gcs_server, process {others[0]})")
    if not wait_until(lambda: not (alone and _clusters()), QUIET_TIMEOUT_S):
        raise RuntimeError(f"a Ray cluster is up on this machine (gcs_server, process {_clusters()}); stop it first")
    folder = Path(tempfile.mkdtemp(prefix="bench-", dir="/tmp"))  # short: Ray puts sockets below it
    try:
        yield folder
    finally:
        wait_until(lambda: not processes(folder), LEAVE_TIMEOUT_S)
        left = processes(folder)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        shutil.rmtree(folder, ignore_errors=True)
        if left:
            raise RuntimeError(f"{len(left)} processes were still there {LEAVE_TIMEOUT_S:g} s after the command's end")


def start(arguments: Sequence[str], folder: Path, **environment: str) -> "subprocess.Popen[bytes]":
    """Start `python ARGUMENTS` in a session of its own; what it says goes to two files of the folder."""
    env = {name: value for name, value in os.environ.items() if name not in DROPPED}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # a job's `python` is this one
    env |= {"PATH": path, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": str(folder), **environment}
    with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=env, stdout=out, stderr=err, start_new_session=True
        )


def said(folder: Path) -> str:
    """The tail of what a started command has said."""
    return ((folder / "stdout").read_text() + (folder / "stderr").read_text())[-3000:]


def run(arguments: Sequence[str], folder: Path, **environment: str) -> Finished:
    """Run `python ARGUMENTS` to its end; raises RuntimeError with the tail of what it said."""
    started_s = time.time()
    process = start(arguments, folder, **environment)
    try:
        status = process.wait(COMMAND_TIMEOUT_S)
    except BaseException:
        process.kill()
        raise
    wall_s = time.time() - started_s
    if status:
        raise RuntimeError(f"python {' '.join(arguments)}: exit status {status}\n{said(folder)}")
    return Finished(started_s, wall_s, (folder / "stdout").read_text(), folder)


def train(
    workload: str, arguments: Sequence[str], folder: Path, apart: bool = False, **environment: str
) -> tuple[Finished, Path]:
    """Our command line, to its end; also returns the run's folder. `apart`: workers share no memory."""
    command = ["-m", "orchestrator.run", workload, *arguments, "--storage", str(folder), "--name", "run"]
    if apart:
        environment["PYTHONPATH"] = os.pathsep.join(map(str, [ROOT, BENCH / "apart"]))
    return run(command, folder, **environment), folder / "run"


def torchrun(processes: int, script: str, arguments: Sequence[str], folder: Path, **environment: str) -> Finished:
    """A script of this folder under torchrun, one thread per process."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return run([*launcher, str(BENCH / script), *arguments], folder, OMP_NUM_THREADS="1", **environment)


def records(file: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def last_json(text: str) -> dict[str, Any]:
    """The last line of a command's output, which is a JSON object."""
    content: dict[str, Any] = json.loads(text.splitlines()[-1])
    return content


def write_cifar10(folder: Path, images_per_batch: int = 2000, heldout: int = 64) -> Path:
    """Random images in the format in which CIFAR-10 is published; returns the folder that holds the batches."""
    generator = np.random.default_rng(0)
    batches = folder / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        count = heldout if name == "test_batch" else images_per_batch
        content = {
            "data": generator.integers(0, 256, (count, 3 * 32 * 32), dtype=np.uint8),
            "labels": generator.integers(0, 10, count).tolist(),
        }
        (batches / name).write_bytes(pickle.dumps(content, protocol=2))
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}, protocol=2))
    return batches


def write_photos(folder: Path, count: int) -> Path:
    """An image folder of JPEG files with as much detail as photographs have, about 30 kB each; 10 classes."""
    generator = np.random.default_rng(0)
    for split, images in (("train", count), ("val", 10)):
        for number in range(images):
            file = folder / "photos" / split / f"class{number % 10}" / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            coarse = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize((400, 300), Image.Resampling.BICUBIC), np.int16)
            noisy = np.clip(smooth + generator.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(file, quality=85)
    return folder / "photos"


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)  # between two looks at /proc, not instead of one
    return True


def processes(folder: Path) -> list[int]:
    """Living processes with this folder as RAY_TMPDIR."""
    mark = f"RAY_TMPDIR={folder}".encode()
    return [pid for pid, environment in _proc("environ") if mark in environment]


def _clusters() -> list[int]:
    """Living Ray clusters of anybody, by the process of their control store."""
    return [pid for pid, words in _proc("cmdline") if words[0].endswith(b"/gcs_server")]


def _proc(name: str) -> Iterator[tuple[int, list[bytes]]]:
    """(process, its /proc/PID/NAME split at zeros) of all but this one."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                yield int(entry.name), (entry / name).read_bytes().split(b"\0")
