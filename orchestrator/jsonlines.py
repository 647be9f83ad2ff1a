"""Logs whose every line is a JSON object, as events.jsonl and metrics.jsonl."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from orchestrator.storage import Folder

BLOCK_BYTES = 4 * 2**20  # of a log, read at once: about ten thousand steps


def records(text: str) -> list[dict[str, Any]]:
    """The records of a log; lines that are torn, or being written, are left out."""
    whole = text[: text.rfind("\n") + 1]
    return [found for line in whole.splitlines() if (found := parse_line(line)) is not None]


def lines(text: str) -> Iterator[str]:
    """Each with its end, as of a file: io.StringIO would hold four bytes for every letter."""
    start = 0
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        yield text[start:end]
        start = end


def dumps(content: Any, indent: int | None = None) -> str:
    """JSON as its standard has it: null for a number that is not finite, as a held-out loss may be."""
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def loads(text: str | bytes) -> Any:
    """What `dumps` wrote: a held-out figure that was not finite is NaN again."""
    found = json.loads(text)
    if isinstance(found, dict) and isinstance(figures := found.get("metrics"), dict):
        found["metrics"] = {name: math.nan if value is None else value for name, value in figures.items()}
    return found


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def parse_line(line: str) -> dict[str, Any] | None:
    """A record of a log; None: it is none, as where another machine sees what is being written."""
    try:
        found = loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


class Growing:
    """New records of a log that is appended to, and sometimes cut and continued (steps are taken again).

    What was read last is looked at again: where it has changed, the log is read from its beginning.

    Attributes:
        count: records read since the log's beginning.
        begun: how often that was.
    """

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name = folder, name
        self._offset, self._last = 0, b""
        self.count, self.begun = 0, 1

    def new(self) -> list[dict[str, Any]]:
        """The next records, at most a block of them; [] where there are none yet."""
        data = self._folder.since(self._name, self._offset - len(self._last), BLOCK_BYTES)
        if not data.startswith(self._last):
            self._offset, self._last, self.count, self.begun = 0, b"", 0, self.begun + 1
            data = self._folder.since(self._name, 0, BLOCK_BYTES)
        fresh = data[len(self._last) : data.rfind(b"\n") + 1]
        found = fresh.splitlines(keepends=True)
        if found:
            self._offset, self._last = self._offset + len(fresh), found[-1]
            self.count += len(found)
        return records(fresh.decode(errors="replace"))
