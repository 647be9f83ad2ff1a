"""Several generations in one test of spawned processes: fresh stores, and a wire that no abort touches."""

import datetime
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from orchestrator import sharedmemory
from orchestrator.group import Group

CPU = torch.device("cpu")
TIMEOUT_S = 60.0  # of collectives
SOON_S = 15.0  # well before any timeout, also on a busy machine
WAIT = datetime.timedelta(seconds=TIMEOUT_S)


def until(condition: Callable[[], bool]) -> None:
    never, deadline = threading.Event(), time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        never.wait(0.005)


class Stage:
    """Stores for generations to come, and one to agree by that no abort touches; `group` has served its purpose."""

    def __init__(self, group: Group, generations: int) -> None:
        self.rank, self.world = group.rank, group.world
        make = lambda: dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # noqa: E731
        self._served = [make() for _ in range(generations + 1)] if group.rank == 0 else []
        self._ports = group.broadcast_object([store.port for store in self._served])
        self.control = self._store(0)
        group.close()

    def _store(self, number: int) -> dist.TCPStore:
        if self._served:
            return self._served[number]
        return dist.TCPStore("127.0.0.1", self._ports[number], timeout=WAIT)

    def connect(self, group: Group, generation: int, timeout_s: float = TIMEOUT_S) -> Group:
        return group.connect(self._store(generation) if group.world > 1 else None, generation, timeout_s)

    def next(self, generation: int, rank: int | None = None, timeout_s: float = TIMEOUT_S) -> Group:
        return self.connect(Group(self.rank if rank is None else rank, self.world, CPU), generation, timeout_s)

    def tell(self, what: str, value: object = "") -> None:
        self.control.set(f"{what}-{self.rank}", str(value))

    def everyone(self, what: str) -> list[str]:
        """What all have told."""
        names = [f"{what}-{rank}" for rank in range(self.world)]
        self.control.wait(names, WAIT)
        return [text.decode() for text in self.control.multi_get(names)]

    def meet(self, what: str) -> None:
        self.tell(what)
        self.everyone(what)

    def end(self, group: Group) -> None:
        """Rank 0 serves the stores until all are done."""
        group.close()
        self.tell("end")
        if self.rank == 0:
            self.everyone("end")


@contextmanager
def on_machine(number: int) -> Iterator[None]:
    """Memory is shared with the workers on the machine of the same number only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharedmemory, "_network", lambda: number)
        yield


@contextmanager
def aborted(group: Group, when: Callable[[], bool]) -> Iterator[list[float]]:
    """A thread aborts `group` as soon as `when`, in any case at the end of the block.

    Gives a list for the seconds from the abort to the end of the block: 0 if that ended before.
    """
    seconds, ended, at = [0.0], threading.Event(), []

    def abort() -> None:
        until(lambda: ended.is_set() or when())
        at.append(time.monotonic())
        group.abort()

    thread = threading.Thread(target=abort)
    thread.start()
    try:
        yield seconds
    finally:
        end = time.monotonic()
        ended.set()
        thread.join()
        seconds[0] = max(0.0, end - at[0])
