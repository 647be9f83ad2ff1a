"""Workers that are lost while blocks of gradients travel: gloo, no training."""

import os
import signal
import threading
import time
from contextlib import nullcontext

import pytest
import torch
from distributed import WorkerDiedError, run_distributed
from stage import SOON_S, WAIT, Stage, aborted, on_machine, until
from torch import nn

from orchestrator.group import Group, PeerLostError
from orchestrator.reduce import TreeReducer
from orchestrator.shards import Placement, even_placement
from orchestrator.sockets import connections


def left(group: Group) -> int:
    """Connections of a group, and threads that carry its sums."""
    made = [inode for inode in connections() if inode not in group._lines._foreign]
    return len(made) + sum(thread.name.startswith("sums") for thread in threading.enumerate())


def push(reducer: TreeReducer, shards: range) -> None:
    for shard in shards:
        reducer.start_shard(shard)
        reducer.add_extra(torch.tensor([1.0]))
        reducer.end_shard()


def go_on(reducer: TreeReducer, shards: range) -> None:
    push(reducer, shards)
    reducer.finish()


def reducer_on(group: Group, machine: int, placement: Placement) -> TreeReducer:
    reducer = TreeReducer([nn.Parameter(torch.zeros(100_000)) for _ in range(2)], 1, group)
    with on_machine(machine):
        reducer.place(placement)
    return reducer


def lose_one(group: Group, machines: tuple[int, ...], how: str) -> float:
    """The last of the workers goes in its second step, between two shards that are blocks of their own.

    Returns:
        Seconds until this worker knows, or is out itself.
    """
    stage = Stage(group, 1)
    group, placement = stage.next(1), even_placement(8, group.world)
    assert left(group) > 0
    last = group.rank == group.world - 1
    reducer, own = reducer_on(group, machines[group.rank], placement), placement.range_of(group.rank)
    reducer.start_step()
    go_on(reducer, own)
    assert reducer.extra.item() == 8
    reducer.start_step()
    push(reducer, own[:-1])
    stage.meet("between two shards")
    started = time.monotonic()
    if last and how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    elif last and how == "stands still":
        stage.control.wait([f"out-{rank}" for rank in range(group.world - 1)], WAIT)
    elif not last:
        told = aborted(group, lambda: group.waiting) if how == "stands still" else nullcontext()
        with told, pytest.raises(PeerLostError):
            go_on(reducer, own[-1:])
    reducer.close()
    group.close()
    seconds = time.monotonic() - started
    until(lambda: left(group) == 0)
    stage.tell("out")
    if group.rank == 0:  # it serves the store
        stage.control.wait([f"out-{rank}" for rank in range(group.world - (how == "dies"))], WAIT)
    return seconds


@pytest.mark.parametrize("machines", [(1, 1, 1), (1, 2, 3), (1, 1, 2)])
@pytest.mark.parametrize("how", ["leaves", "stands still", "dies"])
def test_all_others_know_at_once(machines, how):
    """Whoever is on whose machine; threads and sockets of the generation are gone in those that live."""
    found = run_distributed(lose_one, 3, machines, how, errors=True)
    if how == "dies":
        assert isinstance(found.pop(), WorkerDiedError)
    for answer in found:
        assert not isinstance(answer, Exception), answer
        assert answer < SOON_S
