"""Models in parts through many generations: who leaves takes nothing along, and who stays keeps nothing of the last."""

import asyncio
import dataclasses
import gc
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed import run_distributed
from hypothesis import assume, given
from hypothesis import strategies as st
from stage import Stage
from test_replicas import LATER, come_back, member, roster, sit, train
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from toys import toy_plan

from orchestrator.balancer import Balancer
from orchestrator.group import Group
from orchestrator.journal import Journal
from orchestrator.membership import Membership
from orchestrator.recovery import Holding, Member
from orchestrator.replicas import by_parts, seats
from orchestrator.seats import Seat
from orchestrator.shards import Placement
from orchestrator.split_build import mesh_of
from orchestrator.split_recorder import Pending, SplitRecorder


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


@given(st.lists(st.tuples(st.integers(0, 7), st.sampled_from([4, 5]), st.booleans()), max_size=12), st.integers(1, 4))
def test_seats_are_dealt_as_by_looking_through_all(held, size):
    members = [
        member(f"{number}", step=step, rank=rank, holds=Holding(rank % size, size, whole))
        for number, (rank, step, whole) in enumerate(held)
    ]
    count = len(members) // size * size
    assume(count)
    order, step = seats(members, count, size)
    assert len(order) == count == len({m.id for m in order})
    if step < 0:
        assert order == members[:count]
        return
    parts = by_parts(members, size, step)
    first = [] if all(parts) else [m for m in members if m.step == step and m.holds.whole][:1]
    expected: list[Member | None] = [*first]
    for place in range(len(first), count):
        expected.append(next((m for m in parts[place % size] if m not in expected), None))
    rest = iter([m for m in members if m not in expected])
    assert order == [m or next(rest) for m in expected]


def test_a_stop_is_written_down_by_a_group_that_is_too_small_to_train(tmp_path):
    """Two of four are lost, the others have the newest state, and a run of at least four waits: Ctrl-C."""
    journal = Journal(toy_plan(shards=8), str(tmp_path), "token", "", 0.0, again=False)
    r = roster("tensor=2", 8, minimum=4)
    members = Membership(journal, r, Balancer(journal, 8, 1000, enabled=False), 0.0, 100)
    ended: list[str] = []
    members.end_run = ended.append
    for name in "abcd":
        r.join(member(name), 0.0)
    sit(r, r.form(LATER))
    come_back(r, 57, lost="cd")
    assert r.form(LATER) is None, "too few"

    async def stop():
        members.stopping = True
        members.seat()

    asyncio.run(stop())
    assert not ended
    assert sorted(r.seated) == ["a", "b"]
    assert {m.step for m in r.seated.values()} == {57}
    assert r.training


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


class Table:
    """Where the threads of a replica group lay down what they have to say."""

    def __init__(self, world: int) -> None:
        self.said, self.together = [None] * world, threading.Barrier(world, timeout=30)

    def group(self, rank: int) -> Any:
        def gather_objects(value: Any) -> list[Any]:
            self.said[rank] = value
            self.together.wait()
            told = list(self.said)
            self.together.wait()
            return told

        return SimpleNamespace(gather_objects=gather_objects, world=len(self.said))


class Files:
    """A checkpoint of step 5 in two parts, which is written once `go` is set; then what was made whole."""

    def __init__(self, tmp_path: Any) -> None:
        self.go, self.whole, self._path = threading.Event(), list[tuple[int, list[str]]](), tmp_path

    def recorder(self, part: str = "") -> SplitRecorder:
        """One that writes a part of it."""
        found = SplitRecorder(toy_plan(shards=8), str(self._path), SimpleNamespace(), SimpleNamespace())
        found.reporter._send = lambda: None
        found.store = SimpleNamespace(finish=lambda step, entries: self.whole.append((step, sorted(entries))) or 1)
        if part:
            written = found._pool.submit(lambda: self.go.wait(30) and {part: "its sum"})
            found._pending = Pending((5, "parts-a", 2), written, 0.1, time.perf_counter())
        return found


def sit_together(recorders: list[SplitRecorder], step: int) -> None:
    """A generation begins that goes on from a step."""
    table = Table(len(recorders))
    for rank, recorder in enumerate(recorders):
        recorder.take_seat(Seat(2, rank, Placement((0, 8)), ("h", 1), step, False, 0))
        recorder.join(SimpleNamespace(split=True, seating=SimpleNamespace(inside=table.group(rank))), True)


def exchange(recorders: list[SplitRecorder], due: str) -> set[str]:
    """What they agree on when rank 0 has a checkpoint that is due."""
    with ThreadPoolExecutor(len(recorders)) as pool:
        names = [due, *[""] * (len(recorders) - 1)]
        return set(pool.map(lambda recorder, name: recorder._exchange(name), recorders, names))


def close(*recorders: SplitRecorder) -> None:
    for recorder in recorders:
        recorder.reporter.close()
        recorder._pool.shutdown()


def test_a_checkpoint_that_takes_longer_than_a_generation_is_finished_by_the_next(tmp_path):
    """Else a run on slow storage that workers join again and again has none, and goes back to the first."""
    files = Files(tmp_path)
    newcomer, *writers = everyone = [files.recorder(), files.recorder("one"), files.recorder("two")]
    sit_together(everyone, 7)
    assert exchange(everyone, "parts-b") == {""}, "another one does not begin meanwhile"
    assert newcomer.writing
    assert newcomer.checkpoint_asked, "it was due, and will be"
    files.go.set()
    wait([recorder._pending.files for recorder in writers])
    assert exchange(everyone, "") == {""}
    newcomer._look_after_manifest(until_done=True)
    assert files.whole == [(5, ["one", "two"])]
    assert [recorder._saved_step for recorder in everyone] == [5, 5, 5]
    assert not any(recorder.writing for recorder in everyone)
    close(*everyone)


def test_a_checkpoint_whose_writer_is_gone_is_none(tmp_path):
    files = Files(tmp_path)
    files.go.set()
    everyone = [files.recorder(), files.recorder("one")]
    sit_together(everyone, 7)
    assert exchange(everyone, "parts-b") == {"parts-b"}
    assert not files.whole
    assert not any(recorder.writing for recorder in everyone)
    close(*everyone)
    leader, other = [files.recorder(), files.recorder("one")]
    sit_together([leader, other], 7)
    assert exchange([leader, other], "") == {""}
    assert leader.checkpoint_asked, "the next step begins one"
    close(leader, other)


@pytest.mark.parametrize("step", [4, -1])
def test_a_checkpoint_of_a_state_that_the_run_has_left_is_none(tmp_path, step):
    files = Files(tmp_path)
    files.go.set()
    everyone = [files.recorder("one"), files.recorder("two")]
    sit_together(everyone, step)
    assert exchange(everyone, "") == {""}
    assert not files.whole
    assert all(recorder.checkpoint_asked for recorder in everyone)
    close(*everyone)
