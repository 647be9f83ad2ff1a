"""Waits for workers that are lost while a message to or from them is under way; gloo, no training."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from distributed import WorkerDiedError, run_distributed
from stage import SOON_S, WAIT, Stage, until

from orchestrator.group import Group, PeerLostError
from orchestrator.waiting import Errands

LARGE = 60_000_000  # floats: no socket takes them at once


@pytest.fixture
def over():
    return threading.Event()


@pytest.fixture
def errands(over):
    made = Errands("errands", over.is_set)
    yield made
    made.close()


def test_what_is_done_elsewhere_gives_what_it_gives_here(errands):
    assert errands.run(divmod, 7, 2) == (3, 1)
    assert errands.run(int, "11", base=2) == 3
    with pytest.raises(ZeroDivisionError):
        errands.run(divmod, 7, 0)
    with pytest.raises(TimeoutError, match="mine"):
        errands.run(_raise, TimeoutError("mine"))


def _raise(error: Exception) -> None:
    raise error


def test_errands_are_done_in_order_and_the_first_error_is_told(errands):
    done: list[int] = []
    for number in range(5):
        errands.start(done.append, number)
    errands.finish()
    assert done == [0, 1, 2, 3, 4]
    errands.start(_raise, OSError("first"))
    errands.start(_raise, OSError("second"))
    with pytest.raises(OSError, match="first"):
        errands.finish()


def test_what_does_not_come_back_is_left_behind(errands, over):
    never = threading.Event()
    errands.start(never.wait)
    threading.Timer(0.1, over.set).start()
    with pytest.raises(PeerLostError, match="left behind"):
        errands.finish()
    errands.close()
    late: list[int] = []
    errands.start(late.append, 1)  # by another thread
    errands.finish()
    assert late == [1]
    never.set()


def test_what_has_not_begun_is_dropped(errands, over):
    never, done = threading.Event(), []
    errands.start(never.wait)
    errands.start(done.append, 1)
    errands.close()
    never.set()
    errands.run(done.append, 2)
    assert done == [2]


def lose_amid(group: Group, sender: int) -> float:
    """The last of two workers stops, and is killed, when a large message between them has come in part.

    Returns:
        Seconds from the end of the generation until the other is out of it and alone in the next one.
    """
    stage = Stage(group, 1)
    group = stage.next(1)
    message = torch.ones(LARGE) if group.rank == sender else torch.zeros(LARGE)
    pid, ended = group.gather_objects(os.getpid())[-1], []

    def stop() -> None:
        """Whoever receives stops the last."""
        until(lambda: bool(message[0]))
        os.kill(pid, signal.SIGSTOP)

    def end() -> None:
        """As the coordinator does, which learns of a lost worker at once."""
        until(lambda: Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] == "T")
        os.kill(pid, signal.SIGKILL)
        ended.append(time.monotonic())
        group.abort()

    for do in [stop] * (group.rank != sender) + [end] * (group.rank == 0):
        threading.Thread(target=do, daemon=True).start()
    with pytest.raises(PeerLostError):
        group.broadcast(message, sender)
    group.close()
    assert sender == 0 or not message[-1], "it has come as a whole"
    alone = Group(0, 1, group.device).connect(None, 2, WAIT.total_seconds())
    alone.sum(message)
    return time.monotonic() - ended[0]


@pytest.mark.parametrize("sender", [0, 1])
def test_nobody_waits_for_the_rest_of_a_message(sender):
    """A joiner that dies while it receives the state must not take along who gives it."""
    found = run_distributed(lose_amid, 2, sender, errors=True)
    assert isinstance(found[1], WorkerDiedError)
    assert not isinstance(found[0], Exception), found[0]
    assert found[0] < SOON_S
