"""`python -m orchestrator.watch [runs/NAME]`: a live view of a run, read from its folder; the training never knows.

Exit status: 0 when the run has ended or the view was left; 2 there is no run.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.command import Parser, leave, refuse
from orchestrator.errors import OrchestratorError, UserError
from orchestrator.jsonlines import Growing, records
from orchestrator.liveview import Sight, draw
from orchestrator.runfolder import CONFIG, EVENTS, METRICS, RunFolder
from orchestrator.storage import Folder

NEWEST_BYTES = 256 * 1024  # of metrics.jsonl: about a thousand steps
MOST_S = 86_400  # between two looks
GIVE_UP_S = 600.0  # without seeing the run


def newest_run(storage: Path) -> str:
    """The folder in `storage` that was written to last; raises UserError where there is none."""
    runs = [config.parent for config in storage.glob(f"*/{CONFIG}")]
    if not runs:
        raise UserError(f"{storage}: no run is there; give a run's folder, such as runs/NAME")
    return str(max(runs, key=lambda run: max(file.stat().st_mtime for file in run.iterdir())))


class View:
    """A run as its folder shows it, look after look: of its events the new ones are read."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder, self._new = folder, Growing(folder.folder, EVENTS)
        self._events, self._begun = list[dict[str, Any]](), 1

    def look(self) -> Sight:
        """As it is now; raises UserError where there is no run."""
        config = self._folder.settings()
        while events := self._new.new():
            before = self._events if self._new.begun == self._begun else []  # else it was cut, or is another's
            self._events, self._begun = [*before, *events], self._new.begun
        tail = self._folder.folder.tail(METRICS, NEWEST_BYTES).decode(errors="replace")
        if len(tail) >= NEWEST_BYTES:
            tail = tail[tail.find("\n") + 1 :]  # it may begin in the middle of a record
        return Sight(config, self._folder.result(), self._events, records(tail), time.time())


def follow(folder: RunFolder, every_s: float, console: Any) -> None:
    """Show the run until it has ended."""
    from rich.live import Live

    view = View(folder)
    sight, seen_s = view.look(), time.monotonic()
    with Live(draw(sight), console=console, auto_refresh=False, transient=False) as live:
        while not sight.over:
            time.sleep(every_s)
            try:
                sight, seen_s = view.look(), time.monotonic()
            except (OSError, OrchestratorError):  # training waits for its storage, too
                if time.monotonic() - seen_s > GIVE_UP_S:
                    raise
            live.update(draw(sight), refresh=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    from rich.console import Console

    parser = Parser(
        prog="python -m orchestrator.watch",
        description="A live view of a run, from this machine or any that reaches its storage.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", nargs="?", help="the run's folder or URI [the newest in ./runs]")
    parser.add_argument("--every", metavar="SECONDS", type=float, default=1.0, help="between two looks [1]")
    parser.add_argument("--once", action="store_true", help="show it as it is, and end")
    try:
        settings = parser.parse_args(arguments)
        if not 0 < settings.every <= MOST_S:
            raise UserError(f"--every {settings.every:g}: not above 0 and at most {MOST_S}; give seconds, such as 1")
        folder = RunFolder(Folder(settings.run or newest_run(Path("runs")), flag="RUN"))
        console = Console()
        if settings.once:
            console.print(draw(View(folder).look()))
        else:
            follow(folder, settings.every, console)
    except OrchestratorError as error:
        return refuse(error)
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    leave(main)
