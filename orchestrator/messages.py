"""Messages between two workers of a process group, each from where it lies to where it belongs."""

import datetime
from collections.abc import Callable, Iterable

import torch.distributed as dist
from torch import Tensor

from orchestrator.stores import PeerLostError


class Messages:
    """Of one worker, from any thread. All methods raise PeerLostError if the other one is lost.

    Args:
        group: gives the process group, which ends when nobody holds it; it is asked directly, for torch.distributed's
            isend takes half as long again.
        timeout: of waiting for one message.
    """

    def __init__(self, group: Callable[[], dist.ProcessGroup | None], timeout: datetime.timedelta) -> None:
        self._group, self._timeout = group, timeout
        self._closed = False

    def _joined(self) -> dist.ProcessGroup:
        found = self._group()
        if found is None or self._closed:
            raise PeerLostError("the process group was left")
        return found

    def start_send(self, tensor: Tensor, rank: int, tag: int) -> dist.Work:
        """Begin to send a message; `complete` ends it."""
        group = self._joined()
        try:
            return group.send([tensor], rank, tag)
        except RuntimeError as error:
            raise PeerLostError(str(error)) from error

    def start_receive(self, tensor: Tensor, rank: int, tag: int) -> dist.Work:
        """Begin to overwrite `tensor` with a message of that tag; those of one tag come in the order they were sent."""
        group = self._joined()
        try:
            return group.recv([tensor], rank, tag)
        except RuntimeError as error:
            raise PeerLostError(str(error)) from error

    def complete(self, works: Iterable[dist.Work]) -> None:
        """Until messages are there or sent."""
        try:
            for work in works:
                work.wait(self._timeout)
        except RuntimeError as error:
            raise PeerLostError(str(error)) from error
        if self._closed:
            raise PeerLostError("what has come is too late")

    def close(self) -> None:
        """From now on whoever waits for messages gets an error, at the latest when they are there."""
        self._closed = True
