"""The process that writes a run to loggers (--log), as the command starts and ends it: orchestrator.track."""

import contextlib
import fcntl
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from orchestrator.digest import digest
from orchestrator.errors import OrchestratorError, UserError
from orchestrator.redact import redact
from orchestrator.runfolder import ERRORS, RunFolder
from orchestrator.storage import cache_folder

TOLD = "orchestrator.track: "  # begins the lines that the process has for the user
FINISH_S = 120.0  # for what is left to be written at the end
GIVE_UP_S = 10.0
KEPT = 50  # lines of its output
log = logging.getLogger("orchestrator.clerk")


@contextlib.contextmanager
def clerk(loggers: str, folder: RunFolder, token: str) -> Iterator[None]:
    """Follow the run for as long as the block lasts, and then to its end; whatever happens to the process, go on.

    Args:
        loggers: as --log takes them; "": no process is started.
        token: of the command that the run belongs to.
    """
    if not loggers:
        yield
        return
    log.setLevel(logging.INFO)
    command = [sys.executable, "-m", "orchestrator.track", folder.uri, "--log", loggers, "--owner", token]
    # In a session of its own: Ctrl-C is for the command. It ends when its stdin does, however this process ends.
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )
    said: deque[str] = deque(maxlen=KEPT)
    listener = threading.Thread(target=_listen, args=(process, said), name="clerk", daemon=True)
    listener.start()
    patience_s = GIVE_UP_S
    try:
        yield
        patience_s = FINISH_S
    finally:
        _end(process, patience_s, loggers, folder, said)


@contextlib.contextmanager
def alone(what: str, uri: str, refusal: str, wait: bool = False) -> Iterator[None]:
    """Nobody else on this machine does `what` with a folder; raises UserError where somebody does, unless `wait`."""
    name = f"{digest(uri)[:16]}.lock"
    try:
        folder = cache_folder() / what
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / name).open("w")
    except OSError:  # a home that cannot be written
        lock = (Path(tempfile.gettempdir()) / f"orchestrator-{os.getuid()}-{what}-{name}").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"{uri}: {refusal}") from None
        except OSError:
            log.warning("no locks can be had in %s", lock.name, exc_info=True)
        yield


def _listen(process: "subprocess.Popen[str]", said: deque[str]) -> None:
    """What it has for the user goes to the terminal, the rest to Ray's log."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(TOLD):
            print(line.removeprefix(TOLD).rstrip(), file=sys.stderr, flush=True)
        else:
            said.append(line)
            log.info("%s", redact(line.rstrip()))


def _end(
    process: "subprocess.Popen[str]", patience_s: float, loggers: str, folder: RunFolder, said: deque[str]
) -> None:
    assert process.stdin is not None
    later = f"the rest: python -m orchestrator.track {folder.uri} --log {loggers}"
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        status = process.wait(patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        print(f"--log {loggers}: not done within {patience_s:g} s; {later}", file=sys.stderr, flush=True)
        return
    if status:
        with contextlib.suppress(OSError, OrchestratorError):
            folder.error(f"--log {loggers}: the process ended with {status}\n" + "".join(said))
        print(f"--log {loggers}: its process was lost ({status}); see {ERRORS}; {later}", file=sys.stderr, flush=True)
