"""Run the command line as a user does, and wait for what it writes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    status: int
    out: str
    err: str


def environment(**changes: str) -> dict[str, str]:
    """The tests' environment; RAY_AUTH_MODE as a user would have it: unset unless given."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    # An activated virtual environment: a job's entrypoint is looked up on the PATH of the node that runs it.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "PYTHONUNBUFFERED": "1", **changes}


def call(command: Sequence[str] | str, timeout_s: float, cwd: Path = REPOSITORY, **changes: str) -> Done:
    """Any command to its end; a text is the shell's."""
    done = subprocess.run(
        command,
        shell=isinstance(command, str),
        cwd=cwd,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def kept_in(storage: Path, name: str = "run", cluster: str = "") -> list[str]:
    """The flags that say where a run is kept and, if given, where it is trained."""
    return ["--storage", str(storage), "--name", name, *(["--address", cluster] if cluster else [])]


def start(arguments: Sequence[str], **changes: str) -> "subprocess.Popen[str]":
    """`python -m orchestrator.run ARGUMENTS`, as `begin`."""
    return begin([sys.executable, "-m", "orchestrator.run", *arguments], **changes)


def begin(command: Sequence[str], **changes: str) -> "subprocess.Popen[str]":
    """Any command in a session of its own; see `finish`."""
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment(**changes),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]", timeout_s: float = 240) -> Done:
    """Wait for a started command; kills its whole session when it takes too long."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"still running after {timeout_s} s:\n{out}\n{err}") from None
    return Done(process.returncode, out, err)


def run(*arguments: str, timeout_s: float = 240, **changes: str) -> Done:
    """Run the command to its end."""
    return finish(start(arguments, **changes), timeout_s)


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Until `condition` holds; fails with `what` after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The whole lines of a run's log."""
    file = folder / name
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def wait_for_step(folder: Path, step: int, timeout_s: float = 90) -> None:
    """Until the run has logged `step`."""
    wait_until(lambda: any(r["step"] >= step for r in records(folder)), timeout_s, f"step {step} in {folder}")


def result(folder: Path) -> dict[str, Any]:
    """result.json."""
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The run's events of one kind."""
    return [e for e in records(folder, "events.jsonl") if e["event"] == kind]


RAY_WORDS = ("gcs_server", "raylet", "ray::", "ray/dashboard", "ray/_private", "ray/autoscaler", "ray.util")


def ray_processes(words: Sequence[str] = RAY_WORDS) -> set[int]:
    """Ids of the processes that Ray runs on this machine, or of those with one of these words, such as an actor's."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if any(word in command for word in words):
                found.add(int(entry.name))
    return found
