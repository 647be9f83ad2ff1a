"""`python -m orchestrator.track RUN --log tensorboard,mlflow,wandb`: write a run to loggers, from its folder alone.

Training with --log starts this beside itself; it follows the run and costs the training process nothing. By hand it
does the same for any run, also for one that is over: it ends when the run has.
Exit status: 0 written; 1 a logger failed; 2 there is no run, or a package is missing.
"""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from orchestrator.clerk import TOLD, alone
from orchestrator.command import Parser, leave, refuse
from orchestrator.digest import digest
from orchestrator.errors import OrchestratorError, UserError
from orchestrator.history import ALIVE_S, SLOW_STEPS
from orchestrator.jsonlines import Growing
from orchestrator.logbooks import BOOKS, Logbook, need
from orchestrator.redact import redact
from orchestrator.runfolder import ERRORS, EVENTS, METRICS, RunFolder
from orchestrator.storage import Folder
from orchestrator.values import LOGGERS, Loggers

EVERY_S = 1.0
UPLOAD_EVERY_S = 60.0
PATIENCE_S = 600.0
TRACKED = "another process is writing it to loggers; let it end"
BEHIND = 10  # nice(2): training goes first


class Follower:
    """Takes a run from its folder to loggers; one that fails is left out, and the others go on.

    Args:
        tell: gets a line for the user.
    """

    def __init__(self, run: RunFolder, loggers: Sequence[str], root: Path, tell: Callable[[str], None]) -> None:
        self._run, self._root, self._tell = run, root, tell
        self._steps, self._events = Growing(run.folder, METRICS), Growing(run.folder, EVENTS)
        self._books: dict[str, Logbook] = {}
        self._wanted = list(loggers)
        self._errors: list[str] = []
        self.failed: list[str] = []
        self.newest_s = 0.0

    def once(self) -> bool:
        """Write what is new; returns whether there was anything."""
        events = self._events.new()
        first = self._events.count - len(events) + 1
        if events and not self._books:
            self._open(events[0])
        steps = self._steps.new()
        self.newest_s = max([self.newest_s, *(record["time_s"] for record in (events + steps)[-1:])])
        for name in list(self._books):
            with self._kept_apart(name):
                book = self._books[name]
                for number, event in enumerate(events, first):
                    if number > book.heard:
                        book.event(number, event)
                        book.heard = number
                if new := [record for record in steps if record["step"] > book.newest]:
                    book.steps(new)
                    book.newest = new[-1]["step"]
                if events or steps:
                    book.flush()
        return bool(events or steps)

    def _open(self, began: dict[str, Any]) -> None:
        """Open the loggers; the first event is the run's own: the same name, begun anew, is another run."""
        config = self._run.config() or {}
        run_id = digest([config.get("name"), began])[:16]
        for name in self._wanted:
            with self._kept_apart(name):
                self._books[name] = BOOKS[name](self._root, config, run_id, began["time_s"])
        self._wanted = []

    def close(self, result: dict[str, Any] | None) -> None:
        """The command is over."""
        for name in list(self._books):
            with self._kept_apart(name):
                self._books[name].close(result)
        with contextlib.suppress(OSError, OrchestratorError):
            for text in self._errors:
                self._run.error(text)

    @contextlib.contextmanager
    def _kept_apart(self, name: str) -> Iterator[None]:
        """A logger's error is its own."""
        try:
            yield
        except Exception as error:
            self._books.pop(name, None)
            self.failed.append(name)
            text = f"--log {name}: " + "".join(traceback.format_exception(error))
            if self._run.folder.is_local:
                with contextlib.suppress(OSError, OrchestratorError):  # a folder that cannot be written to
                    self._run.error(text)
            else:
                self._errors.append(text)  # that file is the coordinator's, which writes it whole, until it ends
            reason = redact(f"{type(error).__name__}: {error}".splitlines()[0])[:200]
            later = f"python -m orchestrator.track {self._run.uri} --log {name}"
            self._tell(f"--log {name}: failed ({reason}); see {ERRORS} of the run; later: {later}")


class Upload:
    """Loggers write to a folder of this machine; of a run on object storage it is copied there, now and then."""

    def __init__(self, folder: Folder, loggers: Sequence[str], local: Path) -> None:
        self._folder, self._local = folder, local
        self._sent: dict[Path, tuple[int, int]] = {}
        self._next_s = time.monotonic() + UPLOAD_EVERY_S
        for name in loggers:
            if name == "mlflow":  # goes on where it was; the others are written anew
                for file in folder.child(name).names():
                    if file.endswith(".db"):
                        (local / name).mkdir(parents=True, exist_ok=True)
                        (local / name / file).write_bytes(folder.read(f"{name}/{file}"))
            else:
                folder.delete(name)

    def send(self, now: bool = False) -> None:
        """Copy what has changed, if it is time."""
        began_s = time.monotonic()
        if not now and began_s < self._next_s:
            return
        for file in sorted(self._local.rglob("*")):
            state = (file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() and not file.is_symlink() else None
            if state and self._sent.get(file) != state:
                self._folder.write(str(file.relative_to(self._local)), file.read_bytes())
                self._sent[file] = state
        # A large database is not sent all the time.
        self._next_s = time.monotonic() + max(UPLOAD_EVERY_S, 10 * (time.monotonic() - began_s))


def follow(
    run: RunFolder,
    loggers: Sequence[str],
    tell: Callable[[str], None],
    over: Callable[[float], bool],
    wait: Callable[[float], object],
) -> list[str]:
    """Write the run to the loggers until it is over, and then what is left.

    Args:
        tell: gets a line for the user.
        over: whether nothing will be added; is told when the newest record was written, seconds since 1970.
        wait: for as many seconds, or less.

    Returns:
        The loggers that failed.
    """
    with contextlib.ExitStack() as stack:
        local = run.folder.is_local
        root = Path(run.uri) if local else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="track-")))
        upload = None if local else Upload(run.folder, loggers, root)
        follower = Follower(run, loggers, root, tell)
        while True:
            last = over(follower.newest_s)  # asked before reading: what was written by then is read
            if not follower.once():
                if last:
                    break
                wait(EVERY_S)
            if upload:
                upload.send()
        follower.close(run.result())
        if upload:
            upload.send(now=True)
        return follower.failed


def beside_a_command(run: RunFolder, loggers: Sequence[str], token: str) -> None:
    """Follow the run of the command that started this, until that has ended: its end of our stdin is closed."""
    os.nice(BEHIND)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `ray job stop` sends it to the command and all that it started
    ended = threading.Event()

    def listen() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=listen, name="command", daemon=True).start()
    # Not before training has begun: importing a logger takes seconds that the start would miss.
    while run.owner() != token or not run.last_step():
        if ended.wait(EVERY_S):
            break
    if run.owner() != token:
        return
    with alone("track", run.uri, TRACKED, wait=True):
        follow(
            run,
            loggers,
            lambda line: print(f"{TOLD}{line}", flush=True),
            lambda _: ended.is_set() or run.owner() != token,
            ended.wait,
        )


def by_hand(run: RunFolder, loggers: Sequence[str]) -> list[str]:
    """Follow a run until it has ended, or has not written anything for a while."""
    began_s = time.time()

    def over(newest_s: float) -> bool:
        silent_s = time.time() - (newest_s or began_s)
        return run.result() is not None or silent_s > max(ALIVE_S, SLOW_STEPS * run.last_seconds())

    with alone("track", run.uri, TRACKED):
        return follow(run, loggers, lambda line: print(line, file=sys.stderr, flush=True), over, time.sleep)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = Parser(
        prog="python -m orchestrator.track",
        description="Write a run to loggers, from its folder alone: one that is over, or going on, until it ends.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="the run's folder, such as runs/NAME or s3://bucket/runs/NAME")
    parser.add_argument("--log", metavar="LOGGERS", help=f"some of {', '.join(LOGGERS)}, separated by commas")
    parser.add_argument("--owner", help=argparse.SUPPRESS)  # the command that started this
    try:
        settings = parser.parse_args(arguments)
        # Training goes on while its storage is away, and so does this beside it; a person is told at once.
        run = RunFolder(Folder(settings.run, flag="RUN", patience_s=PATIENCE_S if settings.owner else None))
        config = run.settings()
        given = settings.log if settings.log is not None else str(config.get("log", ""))
        try:
            loggers = Loggers.parse(given).names
        except ValueError as error:
            raise UserError(f"--log {given}: {error}") from None
        if not loggers:
            raise UserError(f"--log: the run names no logger; give some of {', '.join(LOGGERS)}")
        need(loggers)
        if settings.owner:
            beside_a_command(run, loggers, settings.owner)
            return 0  # a logger that failed was told of; anything else is for the command to tell
        failed = by_hand(run, loggers)
    except OrchestratorError as error:
        return refuse(error)
    except KeyboardInterrupt:
        return 0
    if run.result() is None:
        print(f"{run.uri} has no end, and nothing was written there for {ALIVE_S:.0f} s; for more, run this again")
    if not failed:
        print(f"written to {', '.join(loggers)}: {run.uri}")
    return 1 if failed else 0


if __name__ == "__main__":
    leave(main)
