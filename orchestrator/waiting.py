"""Waiting for other workers in a way that can be broken off.

gloo does not tell everyone who waits on a connection that it has ended: a message that has been sent or received in
part by then is waited for until the group's timeout (gloo/transport/tcp/pair.cc: signalException looks through what is
pending, not through the unbound buffers of tx_ and rx_). Whoever has to go on without the lost lets a thread wait, and
leaves it behind.

Waits inside of torch cannot be left: those of models in parts within a replica group (fsdp, tensor, pipeline).
"""

import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.stores import PeerLostError

LOOK_S = 0.05
GRACE_S = 0.25  # from a generation's end until nothing more is expected of gloo: an error comes within milliseconds

_Errand = tuple[Future[Any], Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class Errands:
    """Done one after the other by a thread, which is left behind when a generation ends and it does not come back.

    What it holds then (messages under way, the process group) lives as long as it does.

    Args:
        name: of the thread.
        over: whether the generation has ended.
    """

    def __init__(self, name: str, over: Callable[[], bool]) -> None:
        self._name, self._over = name, over
        self._queue: SimpleQueue[_Errand | None] = SimpleQueue()
        self._open: list[Future[Any]] = []
        self._thread: threading.Thread | None = None
        self._left = False

    def start(self, do: Callable[..., Any], *what: Any) -> None:
        """Have something done after what was given before; `finish` waits for it."""
        self._open.append(self._give(do, what, {}))

    def finish(self) -> None:
        """Until all is done that was started; raises the first error, PeerLostError where it is left behind."""
        while self._open:
            self._wait(self._open.pop(0))

    def run(self, do: Callable[..., Any], *what: Any, **named: Any) -> Any:
        """What `do` gives; raises what it raises, PeerLostError where it is left behind."""
        return self._wait(self._give(do, what, named))

    def close(self) -> None:
        """Drop what has not begun, and wait a little for what has."""
        for future in self._open:
            future.cancel()
        self._open.clear()
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(GRACE_S)
            self._queue, self._thread, self._left = SimpleQueue(), None, False

    def _give(self, do: Callable[..., Any], what: tuple[Any, ...], named: dict[str, Any]) -> Future[Any]:
        if self._thread is None:
            self._thread = threading.Thread(target=_serve, args=(self._queue,), name=self._name, daemon=True)
            self._thread.start()
            weakref.finalize(self, self._queue.put, None)
        future: Future[Any] = Future()
        self._queue.put((future, do, what, named))
        return future

    def _wait(self, future: Future[Any]) -> Any:
        over_s = None
        try:
            while True:
                try:
                    return future.result(LOOK_S)
                except TimeoutError:
                    if future.done():
                        return future.result()
                if self._over():
                    over_s = over_s or time.monotonic()
                    if self._left or time.monotonic() - over_s > GRACE_S:
                        self._left = True  # what waits behind it is not waited for
                        future.cancel()
                        raise PeerLostError("the generation was ended; a message under way was left behind")
        finally:
            del future  # an error would keep itself, and the connections it was met on, alive


def _serve(queue: "SimpleQueue[_Errand | None]") -> None:
    while (errand := queue.get()) is not None:
        future, do, what, named = errand
        del errand
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(do(*what, **named))
            except BaseException as error:  # whatever it is, it is raised where the errand is waited for
                future.set_exception(error)
        del future, do, what, named


def of_this_thread(do: Callable[..., Any]) -> Callable[..., Any]:
    """For another thread: torch's mode is a thread's, and what was made for inference can only be changed in it."""
    inference = torch.is_inference_mode_enabled()

    def done(*what: Any, **named: Any) -> Any:
        with torch.inference_mode(inference), torch.no_grad():
            return do(*what, **named)

    return done


def wait_holding(_: dist.ProcessGroup, work: dist.Work) -> None:
    """A process group that ends waits for its work, wherever that is: who is left behind with work holds its group."""
    work.wait()
