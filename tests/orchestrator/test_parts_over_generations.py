"""Models in parts through many generations: who leaves takes nothing along, and who stays keeps nothing of the last."""

import dataclasses
import gc
import os

import pytest
import torch
from distributed import run_distributed
from stage import Stage
from test_replicas import LATER, member, roster, sit, train
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from orchestrator.group import Group
from orchestrator.recovery import Holding
from orchestrator.split_build import mesh_of


def held(group: Group, kind: str, generations: int) -> list[tuple[int, int]]:
    """Threads and open files after each generation."""
    stage, found = Stage(group, generations), []
    for generation in range(1, generations + 1):
        made = stage.next(generation)
        inside = made.among([list(range(made.world))])
        mesh = mesh_of(inside)
        if kind == "fsdp":
            model = torch.nn.Linear(64, 64)
            fully_shard(model, mesh=mesh)
            model(torch.randn(4, 64)).sum().backward()
            model.state_dict()
            del model
        else:
            distribute_tensor(torch.randn(8, 8), mesh, [Shard(0)]).full_tensor()
        stage.meet(f"done {generation}")
        inside.close()
        stage.end(made) if generation == generations else made.close()
        del made, inside, mesh
        gc.collect()
        found.append((len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))))
    return found


@pytest.mark.parametrize("kind", ["fsdp", "tensor"])
def test_a_generation_that_is_over_keeps_no_thread_and_no_connection(kind):
    for found in run_distributed(held, 2, kind, 5):
        (_, (threads, files), *later) = found  # torch's own begin in the first ones
        assert max(each for each, _ in later) <= threads, found
        assert later[-1][1] - files < len(later), found  # one may be about to close


@pytest.mark.parametrize(
    ("parallel", "names", "going", "joiners", "saves"),
    [
        ("fsdp", "abc", "a", "", False),
        ("fsdp", "abc", "b", "", False),
        ("fsdp", "abc", "ac", "", True),
        ("pipeline=3", "abc", "ac", "de", True),
        ("hsdp=4", "abcd", "ad", "ef", True),
        ("tensor=2", "ab", "ab", "cd", True),
        ("tensor=2", "abcd", "ab", "", False),
    ],
)
def test_nodes_that_go_are_left_by_one_pause(parallel, names, going, joiners, saves):
    """Where nobody who stays could take the state along, the pause writes it down; no step is lost either way."""
    r = roster(parallel, len(names))
    sit(r, train(r, names))
    r.draining = frozenset(f"n-{name}" for name in going)
    for name in joiners:
        r.join(member(name), LATER)
    assert r.wants_pause(LATER + 99)
    assert r.saves == saves
    for m in r.by_rank:
        part = m.rank % r.size
        whole = part in (0, r.size - 1) and not saves
        r.join(dataclasses.replace(m, step=5, holds=Holding(part, r.size, whole, saves)), LATER + 99)
    for m in list(r.ready.values()):
        if r.must_leave(m):
            del r.ready[m.id]
    order = r.form(LATER + 999)
    assert order is not None
    assert not set(going) & {m.id for m in order}
    assert {m.step for m in order} <= ({-1} if saves else {5, -1}), "from what was written, or from who has it"
    assert saves or order[0].step == 5
    assert not r.wants_pause(LATER + 9999)
