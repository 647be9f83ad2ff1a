"""The loader processes of a worker: `python -m orchestrator.loader_process DESCRIPTOR PARENT`, run by loaders.py.

This process is the nursery: it imports what samples need once, then forks a loader whenever it is asked to. A fork of
the worker itself would take its threads' locks and its connections along: others would not see that a killed worker's
connections are closed. Here there are neither. The nursery is killed with the worker, and loaders with the nursery.
"""

import contextlib
import ctypes
import importlib
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections import deque
from multiprocessing.connection import wait
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.parcels import pack, receive, send, unwrap

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with(parent: int) -> None:
    """Be killed when the parent process ends, however it ends (Linux; elsewhere its closed socket is seen)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it had ended before
            os._exit(1)


def nursery(descriptor: int, parent: int) -> None:
    """Fork loaders and say how they ended, until the worker closes its end."""
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the worker decides
    control = socket.socket(fileno=descriptor)
    with contextlib.suppress(EOFError):
        modules, _ = receive(control)
        for module in modules:
            importlib.import_module(module)
        send(control, "ready")
        while True:
            (word, number), given = receive(control)
            if word == "fork":
                send(control, _fork(control, given))
            else:
                _, status = os.waitpid(number, 0)
                send(control, os.waitstatus_to_exitcode(status))


def _fork(control: socket.socket, given: int) -> int:
    nursery_id = os.getpid()
    process = os.fork()
    if process:
        os.close(given)
        return process
    try:
        die_with(nursery_id)
        control.close()
        import torch

        torch.set_num_threads(1)
        with contextlib.suppress(EOFError):
            Loader(socket.socket(fileno=given)).run()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)


class Loader:
    """Makes microbatches in the order in which it is asked for them."""

    def __init__(self, worker: socket.socket) -> None:
        self._worker = worker
        self._samples: dict[int, Any] = {}
        self._tasks: deque[tuple[int, int, int, Any]] = deque()  # feed, number, samples, request

    def run(self) -> None:
        """Until the worker closes its end: EOFError."""
        while True:
            # What came meanwhile first: a feed that is closed is not worked for.
            while not self._tasks or wait([self._worker], 0):
                self._listen()
            self._make(*self._tasks.popleft())

    def _listen(self) -> None:
        (word, content), descriptor = receive(self._worker)
        if word == "task":
            self._tasks.append(content)
        elif word == "samples":
            number, sizes = content
            self._samples[number] = unwrap(sizes, descriptor)
        elif word == "forget":
            self._tasks = deque(task for task in self._tasks if task[0] != content)
        else:
            self._samples.pop(content, None)

    def _make(self, feed: int, number: int, samples: int, request: Any) -> None:
        started = time.perf_counter()
        try:
            batch = self._samples[samples].microbatch(request.indices, request.epoch, request.progress)
            layout, size, descriptor = pack(batch)
        except Exception as error:
            send(self._worker, ((feed, number), None, _portable(error)))
            return
        made = (request.indices, layout, size, time.perf_counter() - started)
        send(self._worker, ((feed, number), made, None), descriptor)
        os.close(descriptor)


def _portable(error: Exception) -> Exception:
    """The error itself, with its traceback if it is not one of ours, if it can be pickled."""
    if isinstance(error, OrchestratorError):
        return error
    text = traceback.format_exc()
    error.add_note(f"in a loader process:\n{text}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an exception of any library, with any constructor
        return RuntimeError(text)
    return error


if __name__ == "__main__":
    nursery(int(sys.argv[1]), int(sys.argv[2]))
