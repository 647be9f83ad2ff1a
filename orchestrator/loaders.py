"""The loader processes of this process, shared by all that it reads: they outlive a generation, and an evaluation.

A loader that dies is replaced, and what it had to do is given to its successor; a microbatch over which two die, or too
many deaths, end training with one line.
"""

import atexit
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections import Counter, deque
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

from orchestrator.errors import TrainingError
from orchestrator.parcels import receive, send, unpack, wrap
from orchestrator.plan import Request
from workloads.workload import Batch, Samples

MOST_DEATHS = 8  # of loaders in a process's life
CLOSE_S = 5.0
Task = tuple[int, int]  # feed, number
log = logging.getLogger("orchestrator.loaders")


@dataclass(eq=False)
class Loader:
    """A loader process; its tasks are in the order in which it does them: key of the samples, request."""

    pid: int
    wire: socket.socket
    tasks: dict[Task, tuple[int, Request]] = field(default_factory=dict)
    knows: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Made:
    """A microbatch that a loader has made, of so many bytes, in so many seconds."""

    indices: Any
    batch: Batch
    bytes: int
    seconds: float


class Loaders:
    """All loader processes of this process, started when they are first needed; see loader_process.py."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a thread may read ahead for a GPU while another evaluates
        self._counter = itertools.count()
        self._begin()

    def _begin(self) -> None:
        self._owner = os.getpid()
        self._nursery: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._is_ready = False
        self._loaders: list[Loader] = []
        self._keys: weakref.WeakKeyDictionary[Samples, int] = weakref.WeakKeyDictionary()
        self._parcels: dict[int, tuple[list[int], int]] = {}  # samples by key, wrapped
        self._gone: deque[int] = deque()  # keys of samples that nobody holds any more
        self._answers: dict[int, dict[int, Made | Exception]] = {}  # by feed and number
        self._deaths: Counter[Task | None] = Counter()

    @property
    def pids(self) -> list[int]:
        """Of the loaders."""
        return [loader.pid for loader in self._loaders]

    def open(self, samples: Samples) -> int:
        """A feed; starts the nursery if there is none."""
        with self._lock:
            if self._owner != os.getpid():  # this process was forked: the loaders are its parent's
                self._begin()
            if self._nursery is None or self._nursery.poll() is not None:
                self._start(samples)
            feed = next(self._counter)
            self._answers[feed] = {}
            return feed

    def _start(self, samples: Samples) -> None:
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "orchestrator.loader_process", str(theirs.fileno()), str(os.getpid())]
            path = os.pathsep.join(entry for entry in sys.path if entry)
            self._nursery = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},  # it must have no threads when it forks
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._control = ours
        send(ours, ["torch", *samples.modules])

    def ready(self, wait_s: float = 0.0) -> bool:
        """Whether loaders can be forked already, or can within so many seconds."""
        with self._lock:
            assert self._control is not None
            if not self._is_ready and wait([self._control], wait_s):
                self._ask()
                self._is_ready = True
            return self._is_ready

    def _ask(self, word: str = "", number: int = 0, descriptor: int | None = None) -> Any:
        """The nursery's answer."""
        assert self._control is not None
        try:
            if word:
                send(self._control, (word, number), descriptor)
            return receive(self._control)[0]
        except (EOFError, OSError):
            assert self._nursery is not None
            how = _ended(self._nursery.wait())
            raise TrainingError(
                f"the process that forks loader processes {how}; --loader-processes 0 needs none"
            ) from None

    def grow(self, count: int) -> int:
        """Have at least so many loaders; returns how many there are."""
        with self._lock:
            while len(self._loaders) < count:
                ours, theirs = socket.socketpair()
                with theirs:
                    self._loaders.append(Loader(self._ask("fork", 0, theirs.fileno()), ours))
            return len(self._loaders)

    def give(self, feed: int, number: int, samples: Samples, request: Request) -> None:
        """Have a microbatch made by the loader with the least to do."""
        with self._lock:
            self._drop_gone()
            if samples not in self._keys:
                key = self._keys[samples] = next(self._counter)
                self._parcels[key] = wrap(samples)
                weakref.finalize(samples, self._gone.append, key)
            loader = min(self._loaders, key=lambda loader: len(loader.tasks))
            self._assign(loader, (feed, number), self._keys[samples], request)

    def _assign(self, loader: Loader, task: Task, key: int, request: Request) -> None:
        if key not in loader.knows:
            loader.knows.add(key)
            sizes, descriptor = self._parcels[key]
            _say(loader, ("samples", (key, sizes)), descriptor)
        loader.tasks[task] = (key, request)
        _say(loader, ("task", (*task, key, request)))

    def _drop_gone(self) -> None:
        while self._gone:
            key = self._gone.popleft()
            os.close(self._parcels.pop(key)[1])
            for loader in self._loaders:
                _say(loader, ("drop", key))

    def take(self, feed: int, number: int) -> Made:
        """Wait for a microbatch.

        Raises:
            DataError, or whatever making it raised.
            TrainingError: loaders die over it.
        """
        while number not in self._answers[feed]:
            with self._lock:
                if number not in self._answers[feed]:
                    self._collect()
        answer = self._answers[feed].pop(number)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _collect(self) -> None:
        """Take what loaders have made; waits for one."""
        by_wire = {loader.wire: loader for loader in self._loaders}
        for wire in wait(list(by_wire)):
            loader = by_wire[wire]  # type: ignore[index]
            try:
                (task, made, error), descriptor = receive(loader.wire)
            except EOFError:
                self._replace(loader)
                continue
            loader.tasks.pop(task, None)
            answers = self._answers.get(task[0])
            if made is None:
                made_of = error
            elif answers is None:  # of a feed that is closed
                os.close(descriptor)
            else:
                indices, layout, size, seconds = made
                made_of = Made(indices, unpack(layout, size, descriptor), size, seconds)
            if answers is not None:
                answers[task[1]] = made_of

    def _replace(self, loader: Loader) -> None:
        """A loader has died."""
        self._loaders.remove(loader)
        loader.wire.close()
        how, task = _ended(self._ask("status", loader.pid)), next(iter(loader.tasks), None)
        over = ""
        if task:
            _, request = loader.tasks[task]
            over = f" over samples {', '.join(map(str, request.indices))} of epoch {request.epoch}"
        self._deaths[task] += 1
        log.warning("loader process %d %s%s; another takes its place", loader.pid, how, over)
        if (task and self._deaths[task] > 1) or self._deaths.total() > MOST_DEATHS:
            raise TrainingError(
                f"a loader process {how}{over}, and so did {self._deaths.total() - 1} before it; use fewer "
                "--loader-processes or more --shards if memory is short, and look at these samples if not"
            )
        self.grow(len(self._loaders) + 1)
        for again, (key, request) in loader.tasks.items():
            self._assign(self._loaders[-1], again, key, request)

    def forget(self, feed: int) -> None:
        """A feed is not read any further: nothing more is made for it."""
        with self._lock:
            if self._answers.pop(feed, None) is None or self._owner != os.getpid():
                return
            for loader in self._loaders:
                if mine := [task for task in loader.tasks if task[0] == feed]:
                    _say(loader, ("forget", feed))
                    for task in mine:
                        del loader.tasks[task]

    def close(self) -> None:
        """End the processes."""
        if self._owner != os.getpid() or self._nursery is None:
            return
        assert self._control is not None
        for wire in [self._control, *(loader.wire for loader in self._loaders)]:
            wire.close()
        try:
            self._nursery.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._nursery.kill()
            self._nursery.wait()
        for _, descriptor in self._parcels.values():
            os.close(descriptor)
        answers = self._answers
        self._begin()
        self._answers = answers


def _say(loader: Loader, message: Any, descriptor: int | None = None) -> None:
    try:
        send(loader.wire, message, descriptor)
    except OSError as error:  # it has died: `_collect` finds that, and its tasks go to another
        log.debug("loader process %d: %s", loader.pid, error)


def _ended(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"ended with exit status {status}"
    reason = " (as when memory runs out)" if -status == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-status).name}{reason}"


LOADERS = Loaders()
atexit.register(LOADERS.close)
