"""Generations that are aborted, as a process group sees it: gloo, no training."""

import socket
from contextlib import nullcontext

import pytest
import torch
from distributed import run_distributed
from stage import CPU, SOON_S, TIMEOUT_S, Stage, aborted

from orchestrator.group import Group, PeerLostError
from orchestrator.stores import reach_store

COLLECTIVES = {
    "sum": lambda group: group.sum(torch.ones(4)),
    "broadcast": lambda group: group.broadcast(torch.ones(4), 0),
    "broadcast_object": lambda group: group.broadcast_object(4),
    "gather_objects": lambda group: group.gather_objects(4),
    "start_sum": lambda group: group.wait(group.start_sum(torch.ones(4))),
    "start_exchange": lambda group: group.wait(group.start_exchange(torch.ones(4), torch.ones(4), [2, 2], [2, 2])),
    "start_gather": lambda group: group.wait(group.start_gather(torch.ones(4), torch.ones(2))),
}


def abort_collectives(group: Group) -> list[float]:
    """Rank 1 waits for rank 0 in one collective after the other; seconds from each abort to its PeerLostError."""
    stage, found = Stage(group, len(COLLECTIVES) + 1), []
    for generation, call in enumerate(COLLECTIVES.values(), 1):
        group = stage.next(generation)
        if stage.rank == 1:
            with aborted(group, lambda: group.waiting) as seconds, pytest.raises(PeerLostError):  # noqa: B023
                call(group)
            found += seconds
        stage.meet(f"freed-{generation}")
        with pytest.raises(PeerLostError):
            call(group)
        assert group.over == (stage.rank == 1)
        if group.over:
            with pytest.raises(PeerLostError):
                group.step_on()
        assert not group.waiting
        group.close()
    group = stage.next(len(COLLECTIVES) + 1)
    total = torch.ones(4)
    group.sum(total)
    assert total.tolist() == [2.0] * 4
    stage.end(group)
    return found


def test_abort_frees_whoever_waits_for_a_sleeping_peer():
    _, seconds = run_distributed(abort_collectives, 2)
    assert len(seconds) == len(COLLECTIVES)
    assert all(0 < s < SOON_S for s in seconds), dict(zip(COLLECTIVES, seconds, strict=True))


def abort_connecting(group: Group, before: bool) -> tuple[float, str]:
    """Rank 1 does not come; seconds from the abort to rank 0's PeerLostError, and its message."""
    stage, seconds, message = Stage(group, 1), [0.0], ""
    first = Group(stage.rank, 2, CPU)
    if stage.rank == 0:
        if before:
            first.abort()
        told = nullcontext([0.0]) if before else aborted(first, lambda: first.waiting)
        with told as seconds, pytest.raises(PeerLostError) as lost:
            stage.connect(first, 1, timeout_s=5.0 if before else TIMEOUT_S)
        assert not first.waiting
        message = str(lost.value)
    stage.end(first)
    return seconds[0], message


def test_abort_frees_who_waits_for_members_to_connect():
    (seconds, message), _ = run_distributed(abort_connecting, 2, False)
    assert 0 < seconds < SOON_S
    assert "timeout" not in message


def test_a_generation_that_is_over_is_not_waited_for():
    (_, message), _ = run_distributed(abort_connecting, 2, True)
    assert "timeout" not in message


def connect_after_a_failure(group: Group, fails: bool) -> list[int]:
    """Rank 0 cannot connect in generation 1, in which rank 1 has no part; both are of generation 2."""
    stage = Stage(group, 2)
    if fails and stage.rank == 0:
        first = Group(0, 2, CPU)
        with aborted(first, lambda: first.waiting), pytest.raises(PeerLostError):
            stage.connect(first, 1)
        first.close()
    stage.meet("failed")
    second = stage.next(2, timeout_s=5.0)
    ranks: list[int] = second.gather_objects(stage.rank)
    stage.end(second)
    return ranks


@pytest.mark.parametrize("fails", [False, True])
def test_who_could_not_connect_can_connect_with_others_later(fails):
    assert run_distributed(connect_after_a_failure, 2, fails) == [[0, 1]] * 2


def test_a_store_that_nobody_serves_is_a_lost_peer():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    with pytest.raises(PeerLostError, match="the store of rank 0 cannot be reached"):
        reach_store(address)
