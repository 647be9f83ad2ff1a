"""Logs of a run on object storage, which cannot append: kept here, and written anew and whole by a thread.

So a server that is away for a while stops nobody who has something to say. A file that has grown large is written less
often, for each time all of it is sent. The thread also reads whose run it is.
"""

import logging
import threading
import time
from collections.abc import Sequence

from orchestrator.errors import StorageError
from orchestrator.storage import Folder, encoded

EVERY_S = 1.0
REST = 20.0  # times as long as the last writing took: at most about 5 % of a connection, however long the run
MOST_S = 30.0  # who says nothing for twice that is taken to be gone (history.ALIVE_S)
log = logging.getLogger("orchestrator.latelogs")


class LateLogs:
    """Growing files of one folder.

    Args:
        names: of the files; read at once, for later nobody may have to wait for the storage.
        owner: name of the file that is read every so often.

    Attributes:
        owned_by: what `owner` held when it was last read; None: nothing yet.
        problem: why nothing is written any more, "" while all is well.
        token: what the owner is while these logs are to be written; "": anybody.
    """

    def __init__(self, folder: Folder, names: Sequence[str], owner: str) -> None:
        self._folder, self._owner = folder, owner
        self._pieces = {name: [folder.read_text(name) or ""] for name in names}
        self._unwritten: set[str] = set()
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self.owned_by: str | None = None
        self.token = ""
        self.problem = ""
        self._thread: threading.Thread | None = None

    def text(self, name: str) -> str:
        """The whole file, unwritten parts included."""
        with self._lock:
            return self._joined(name)

    def _joined(self, name: str) -> str:
        pieces = self._pieces[name]
        pieces[:] = ["".join(pieces)]
        return pieces[0]

    def put(self, name: str, text: str) -> None:
        """The file is to hold this."""
        with self._lock:
            self._pieces[name] = [text]
            self._note(name)

    def append(self, name: str, text: str) -> None:
        """The file is to hold this too, at its end."""
        with self._lock:
            self._pieces[name].append(text)
            self._note(name)

    def _note(self, name: str) -> None:
        self._unwritten.add(name)
        if self._thread is None:  # not before: the owner of an earlier command would be read
            self._thread = threading.Thread(target=self._forever, name="late-logs", daemon=True)
            self._thread.start()

    def flush(self) -> None:
        """Write what is not written; raises StorageError where the storage is away for good."""
        with self._writing:
            if self.problem:  # nobody is asked again who was asked for long enough
                raise StorageError(self.problem)
            if self.token and self.owned_by not in (None, self.token):  # what is there is another command's
                return
            with self._lock:
                todo = {name: self._joined(name) for name in self._unwritten}
                self._unwritten.clear()
            for name, text in todo.items():
                try:
                    self._folder.write(name, encoded(text))
                except BaseException:
                    with self._lock:
                        self._unwritten |= set(todo)
                    raise

    def _forever(self) -> None:
        waiting, due_s = threading.Event(), 0.0
        while not self.problem and not waiting.wait(EVERY_S):
            try:
                self.owned_by = self._folder.read_text(self._owner)
                began_s = time.monotonic()
                if began_s >= due_s:
                    self.flush()
                    ended_s = time.monotonic()
                    due_s = ended_s + min(MOST_S, REST * (ended_s - began_s))
            except StorageError as error:
                self.problem = str(error)
            except Exception as error:
                log.exception("the logs cannot be written")
                self.problem = f"{self._folder.uri}: {error}"
