"""A run's folder: config.toml, events.jsonl, metrics.jsonl, checkpoints/, model/, result.json, logs/."""

import json
import math
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from orchestrator.errors import StorageError, UserError
from orchestrator.events import Event, record
from orchestrator.jsonlines import dumps, lines, loads, parse_line
from orchestrator.latelogs import LateLogs
from orchestrator.redact import redact
from orchestrator.storage import Folder, half_written

CONFIG, EVENTS, METRICS, RESULT = "config.toml", "events.jsonl", "metrics.jsonl", "result.json"
AUTO = "auto"
OWNER, ERRORS = "logs/owner", "logs/errors.log"

LAST_BYTES = 8192  # of metrics.jsonl: several records


class RunFolder:
    """Reads and writes one run's folder; only one process writes the logs of a run (its coordinator).

    Args:
        late: write logs in the background where storage cannot append to files.
    """

    def __init__(self, folder: Folder, late: bool = False) -> None:
        self.folder = folder
        self._late = LateLogs(folder, (EVENTS, METRICS, ERRORS), OWNER) if late and not folder.is_local else None
        self._broken, self._unwritten, self._writing = "", list[tuple[str, str]](), threading.Lock()
        self._mended = set[str]()  # logs whose every line was looked at; all that came later is whole

    @property
    def problem(self) -> str:
        """Why the logs are not written any more, "" while they are."""
        return self._late.problem if self._late else self._broken

    @property
    def uri(self) -> str:
        return self.folder.uri

    def config(self) -> dict[str, Any] | None:
        """The settings the run was started with, or None where there is no such run."""
        try:
            text = self.folder.read_text(CONFIG)
            return None if text is None else tomllib.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.uri}/{CONFIG}: not valid TOML ({error}); use another --name") from None
        except PermissionError as error:
            raise UserError(f"{self.uri}: cannot be read ({error.strerror}); give one that can") from None

    def settings(self) -> dict[str, Any]:
        """As config(); raises UserError where no run is there."""
        if (found := self.config()) is None:
            raise UserError(f"{self.uri}: no run is there (no {CONFIG}); give a run's folder, such as runs/NAME")
        return found

    def remains(self) -> str:
        """What is there where no run was begun, "" if nothing: a run would cut or replace it. Logs are added to."""
        return next((name for name in self.folder.names() if name in ("checkpoints", "model", METRICS, RESULT)), "")

    def identities(self) -> set[str]:
        """Of the plans that its checkpoints are of (Plan.identity)."""
        checkpoints = self.folder.child("checkpoints")
        found = set[str]()
        for name in checkpoints.names():
            try:
                found.add(str(json.loads(checkpoints.read_text(f"{name}/manifest.json") or "")["identity"]))
            except (ValueError, KeyError, TypeError, OSError):  # unfinished, or damaged: loading will tell
                continue
        return found

    def precision(self) -> str:
        """That of config.toml; "auto" where it is not settled yet."""
        return str((self.config() or {}).get("precision", AUTO))

    def settle_precision(self, kind: str) -> None:
        """Put it into config.toml in the place of "auto"."""
        self.settle(precision=kind)

    def settle(self, **values: str) -> None:
        """Put values into config.toml where it has "auto", or nothing, for them."""
        text = before = self.folder.read_text(CONFIG) or ""
        for name, value in values.items():
            for unsettled in (AUTO, ""):
                text = text.replace(f'\n{name} = "{unsettled}"\n', f'\n{name} = "{value}"\n')
        if text != before:
            self.folder.write(CONFIG, text.encode())

    def result(self) -> dict[str, Any] | None:
        """result.json, or None while there is none."""
        try:
            text = self.folder.read_text(RESULT)
            return None if text is None else dict(loads(text))
        except (ValueError, TypeError):
            raise UserError(f"{self.uri}/{RESULT}: not valid JSON; delete it or use another --name") from None

    def flush(self) -> None:
        """Wait until the logs are in storage, as safe as a checkpoint; raises StorageError where they are not."""
        if self._late:
            self._late.flush()
            return
        if self._unwritten:
            self._append_local("", "")
            if self._unwritten:
                raise StorageError(self._broken)
        for name in (EVENTS, METRICS):
            self.folder.sync(name)

    def write_result(self, result: dict[str, Any]) -> None:
        self.flush()
        self.folder.write(RESULT, (dumps(result, indent=1) + "\n").encode())

    def take_ownership(self, token: str) -> None:
        """From now on the run belongs to the command with this token; the end of an earlier one is void."""
        self.folder.delete(RESULT)
        self.folder.write(OWNER, token.encode())
        self.mend_logs()

    def belongs(self, token: str) -> bool:
        """Whether the run is of the command with this token, in whose name logs are written from now on."""
        if self._late:
            self._late.token = token
        return self.folder.read_text(OWNER) == token

    def owner(self) -> str | None:
        """The token of the command that the run belongs to; None: not known."""
        return self._late.owned_by if self._late else self.folder.read_text(OWNER)

    def text(self, name: str) -> str | None:
        """A log as it is."""
        return self._late.text(name) if self._late else self.folder.read_text(name, errors="replace")

    def newest(self, *kinds: str) -> dict[str, Any] | None:
        """The last event of these kinds; None: there is none."""
        return next(self._backwards(*kinds), None)

    def every(self, *kinds: str) -> list[dict[str, Any]]:
        """All events of these kinds, the last one first."""
        return list(self._backwards(*kinds))

    def _backwards(self, *kinds: str) -> Iterator[dict[str, Any]]:
        for line in reversed((self.text(EVENTS) or "").splitlines()):
            event = parse_line(line) if any(kind in line for kind in kinds) else None
            if event and event["event"] in kinds:
                yield event

    def last_step(self) -> int:
        """The newest step in metrics.jsonl; 0: there is none."""
        return int(self._last_record().get("step", 0))

    def last_loss(self) -> float:
        """The newest step's in metrics.jsonl; NaN: there is none."""
        return float(self._last_record().get("loss", math.nan))

    def last_seconds(self) -> float:
        """Those that the newest step in metrics.jsonl took; 0: there is none."""
        return float(self._last_record().get("step_s", 0.0))

    def loss_of(self, step: int) -> float:
        """That step's, if it is among the newest in metrics.jsonl; NaN: it is not."""
        found = next((record for record in self._last_records() if record.get("step", 0) <= step), {})
        return float(found.get("loss", math.nan)) if found.get("step") == step else math.nan

    def _last_record(self) -> dict[str, Any]:
        return next(self._last_records(), {})

    def _last_records(self) -> Iterator[dict[str, Any]]:
        """The newest first."""
        lines = self._tail(METRICS).splitlines()
        return (found for line in reversed(lines) if (found := parse_line(line)))

    def _tail(self, name: str) -> str:
        if self._late:
            return self._late.text(name)[-LAST_BYTES:]
        return self.folder.tail(name, LAST_BYTES).decode(errors="replace")

    def _append(self, name: str, text: str) -> None:
        if self._late:
            self._late.append(name, text)
        else:
            self._append_local(name, text)

    def _append_local(self, name: str, text: str) -> None:
        """In order; what a full disk does not take is kept: whoever writes goes on until the run is ended for it."""
        with self._writing:  # `flush` may be in another thread
            self._unwritten += [(name, text)] if text else []
            try:
                while self._unwritten:
                    self.folder.append(*self._unwritten[0])
                    del self._unwritten[0]
                self._broken = ""
            except StorageError as error:
                self._broken = str(error)

    def events(self, events: Sequence[Event]) -> None:
        """Append events, stamped with the time now."""
        now = time.time()
        self._append(EVENTS, "".join(dumps(record(e, now)) + "\n" for e in events))

    def metrics(self, records: Sequence[dict[str, Any]]) -> None:
        """Append step records."""
        self._append(METRICS, "".join(json.dumps(r) + "\n" for r in records))

    def cut_metrics(self, step: int) -> None:
        """Drop the records beyond `step`: those steps are taken again."""
        if METRICS not in self._mended or self.last_step() > step:
            self._keep_lines(METRICS, lambda record: record.get("step", step + 1) <= step)

    def mend_logs(self) -> None:
        """Drop a last line that a crash tore, so that the next record does not continue it."""
        for name in (EVENTS, METRICS):
            self._keep_lines(name, lambda _: True)
            self._mended.add(name)

    def _keep_lines(self, name: str, keep: Callable[[dict[str, Any]], bool]) -> None:
        if self.folder.is_local and self._keep_first_lines(name, keep):
            return
        text = self.text(name)
        if text is None:
            return
        whole = text if not text or text.endswith("\n") else text + "\n"
        good = lambda: (line for line in lines(whole) if (r := parse_line(line)) is not None and keep(r))  # noqa: E731
        if whole is text and sum(map(len, good())) == len(text):  # of a month's log no copy is made for nothing
            return
        kept = "".join(good())
        if self._late:
            self._late.put(name, kept)
        else:
            self.folder.write(name, kept.encode())

    def _keep_first_lines(self, name: str, keep: Callable[[dict[str, Any]], bool]) -> bool:
        """Cut off the end of a log: of one of many months no more is read than that. False: that is not enough."""
        good = lambda line: (r := parse_line(line.decode(errors="replace"))) is not None and keep(r)  # noqa: E731
        most, found, data = LAST_BYTES, list[bytes](), b""
        while not (found and good(found[0])):
            most *= 8
            data = self.folder.tail(name, most)
            found = data.splitlines(keepends=True)
            if len(data) < most:  # all of it
                break
            found = found[1:]  # the first one may be a part of a line
        kept = [good(line) for line in found]
        first = kept.index(False) if False in kept else len(found)
        if any(kept[first:]):
            return False
        if dropped := sum(map(len, found[first:])):
            self.folder.cut(name, dropped)
        elif found and not found[-1].endswith(b"\n"):
            self.folder.append(name, "\n")
        return True

    def error(self, text: str) -> None:
        """Append a traceback to logs/errors.log, keys redacted."""
        self._append(ERRORS, redact(text).rstrip() + "\n")

    def save_model(self, local: Path) -> None:
        """Copy the files of a local folder to model/; what a worker that was killed has left half written goes."""
        model = self.folder.child("model")
        for name in filter(half_written, model.names()):
            model.delete(name)
        for file in sorted(local.rglob("*")):
            if file.is_file():
                self.folder.write(f"model/{file.relative_to(local)}", file.read_bytes())
