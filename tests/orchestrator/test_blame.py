"""Whom a coordinator blames when lines are bad: its own, those between workers, or one machine's many workers."""

import asyncio
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from members import WAIT_S, Run, play

from orchestrator import nodewatch
from orchestrator.channel import DESK_SILENT_S
from orchestrator.dispatcher import Dispatcher
from orchestrator.events import RunEnded
from orchestrator.recovery import FLAPS, Roster
from orchestrator.runfolder import RunFolder
from orchestrator.seats import Order
from orchestrator.storage import Folder
from orchestrator.suspicion import FRUITLESS_GENERATIONS, Unreachable
from orchestrator.timekeeper import limits_s

QUICK = [0.1] * 10  # steps: silence is judged after 5 s
THERE = {"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.3", "d": "10.0.0.4"}


def refused(name: str) -> str:
    return f"timed out connecting: SO_ERROR: Connection refused, remote=[{THERE[name]}]:20914$1"


@given(st.lists(st.floats(0, 100), min_size=2, max_size=6))
def test_who_alone_is_silent_is_judged_soon_and_all_together_late(ago_s: list[float]) -> None:
    silence, _ = limits_s(0.0, QUICK, True, [100 - ago for ago in ago_s], 100.0)
    assert silence == (2 * DESK_SILENT_S if min(ago_s) > 2.5 else 5.0)


@pytest.mark.parametrize("heard", [[], [0.0]])
def test_one_worker_is_judged_as_ever(heard: list[float]) -> None:
    assert limits_s(0.0, QUICK, True, heard, 100.0)[0] == 5.0


def test_a_limit_that_was_given_holds() -> None:
    assert limits_s(3.0, QUICK, True, [0.0, 0.0], 100.0) == (3.0, 3.0)


def test_a_hiccup_of_the_coordinators_line_costs_nothing(tmp_path) -> None:
    """Seven seconds in which nobody at all is heard; then one worker alone is silent for as long."""

    async def story(run: Run) -> None:
        workers = await run.enlist("abc")
        run.steps(*range(1, 11), by=workers)
        pulses = run.members._pulses
        last = max(pulse.heard_s for pulse in pulses.values())
        run.members._check_pulses(last + 7.0)
        assert set(run.members.roster.seated) == {"a", "b", "c"}
        assert run.members.roster.training
        for name in "ab":
            pulses[name].heard_s = last + 7.0
        run.members._check_pulses(last + 7.1)
        assert set(run.members.roster.seated) == {"a", "b"}
        assert await asyncio.wait_for(run.killed.get(), WAIT_S) == "c"

    play(story, tmp_path, workers=3)


def test_two_of_one_machine_fall_silent_while_others_have_come_back(tmp_path) -> None:
    """Who waits for a seat is heard as well: it is not the coordinator's line."""

    async def story(run: Run) -> None:
        a, b, *_ = workers = await run.enlist("abcd")
        run.steps(*range(1, 11), by=workers)
        back = [asyncio.create_task(worker.join("Connection closed by peer")) for worker in (a, b)]
        await asyncio.wait(back, timeout=0)
        assert set(run.members.roster.ready) == {"a", "b"}
        pulses = run.members._pulses
        for name, ago_s in (("a", 0.0), ("b", 0.2), ("c", 5.2), ("d", 5.1)):
            pulses[name].heard_s = 1e9 - ago_s
        run.members._check_pulses(1e9)
        assert set(run.members.roster.seated) <= {"a", "b"}
        await asyncio.gather(*back)

    play(story, tmp_path, workers=4)


def test_packets_that_are_lost_while_state_is_handed_over(tmp_path) -> None:
    """All wait for each other before training has begun: they connect anew, and in the end one of them is replaced."""

    async def story(run: Run) -> None:
        run.members.still_s = 0.3
        a, b = run.worker("a"), run.worker("b")
        await asyncio.gather(a.join(), b.join())
        for generation in range(1, FRUITLESS_GENERATIONS + 1):
            assert await a.told() == await b.told() == ("end", generation)
            assert run.killed.empty()
            await asyncio.gather(a.join("aborted"), b.join("aborted"))
        assert await asyncio.wait_for(run.killed.get(), WAIT_S) == "b"
        assert await b.join() == Order("excluded")
        assert not run.ended

    play(story, tmp_path)


@given(st.permutations("abd"), st.integers(0, 3))
def test_who_is_named_by_several_is_blamed(order: list[str], own: int) -> None:
    """`c` cannot be reached, and says that of somebody else."""
    found, voters = Unreachable(), [*order, *order]
    voters.insert(own, "c")
    for number, voter in enumerate(voters):
        named = found.note(7, THERE, voter, refused("a" if voter == "c" else "c"))
        assert named == ("" if number < FRUITLESS_GENERATIONS else "c")
        if named:
            return


def test_where_nobody_is_named_newcomers_are_not_blamed() -> None:
    """Each time the highest rank of those that were there when it began, until none of them is left."""
    found, there, given = Unreachable(), dict(THERE), []
    for newcomer in ("e", "f", "g"):
        for _ in range(FRUITLESS_GENERATIONS):
            assert found.note(3, there, "a", "aborted") == ""
        given.append(found.note(3, there, "a", "aborted"))
        del there[given[-1]]
        there[newcomer] = "10.0.0.9"
    assert given == ["d", "c", "b"]


def test_steps_that_are_committed_in_between_are_no_trouble() -> None:
    found = Unreachable()
    for step in range(4 * FRUITLESS_GENERATIONS):
        assert found.note(step // 2, THERE, "a", refused("b")) == ""


def test_workers_of_one_machine_on_one_host_are_told_apart_by_rank() -> None:
    found, there = Unreachable(), {"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.2", "d": "10.0.0.4"}
    named = [found.note(3, there, voter, refused("b")) for voter in "adadad"]
    assert named == [*[""] * FRUITLESS_GENERATIONS, "c"]


def test_a_machine_that_goes_with_all_its_workers_flaps_once() -> None:
    roster = Roster(1, 16, 8)
    for generation in range(FLAPS):
        assert not roster.left_out
        for _ in range(8):
            roster.lost_on("10.0.0.1", 10.0 + generation, generation)
    assert roster.left_out["10.0.0.1"] == pytest.approx(10.0 + FLAPS - 1 + 60.0)


def test_what_newcomers_raise_before_they_have_the_state_is_their_machines(tmp_path) -> None:
    async def story(run: Run) -> None:
        a, b = await run.enlist("ab")
        b.die()
        assert await a.told() == ("end", 1)
        await run.seat(a, why="aborted")
        for number, name in enumerate("cde"):
            run.steps(number + 1, by=[a])
            newcomer = run.worker(name, node=f"n{name}")
            joins = asyncio.create_task(newcomer.join())
            assert await a.told() == ("pause", number * 2 + 2)
            await asyncio.gather(a.join(), joins)
            run.members.failed(name, 0, "[Errno 24] Too many open files")
            assert await a.told() == ("end", number * 2 + 3)
            await run.seat(a, why="aborted")
        assert not run.ended

    play(story, tmp_path, workers=2)


def test_of_a_run_that_another_command_has_taken_nothing_is_written(tmp_path) -> None:
    """Not even before a worker has reported anything."""

    async def story(run: Run) -> None:
        other = RunFolder(Folder(str(tmp_path)))
        other.take_ownership("the other command")
        before = (tmp_path / "events.jsonl").read_text()
        run.journal._check_at_s = 0.0
        run.journal.log(RunEnded("stopped", 1, ""))
        assert (tmp_path / "events.jsonl").read_text() == before
        assert run.journal.superseded

    play(story, tmp_path)


def test_a_process_is_killed_though_its_stack_is_not_to_be_had(tmp_path, monkeypatch) -> None:
    spy = tmp_path / "py-spy"
    spy.write_text("#!/bin/sh\nexec sleep 60\n")
    spy.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(nodewatch, "DUMP_S", 0.2)
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    assert "timed out" in nodewatch._end(victim.pid)
    assert victim.wait(WAIT_S) == -signal.SIGKILL


class Handing(Dispatcher):
    """Hands out numbers, when there are any."""

    def __init__(self) -> None:
        self._turns: dict[str, int] = {}
        self._book = self._handout = None
        self.units: list[int] = []
        self._crew = type("Crew", (), {"era": 1})()
        self._members = type(
            "Members", (), {"changed": asyncio.Condition(), "excluded": staticmethod(lambda name: False)}
        )()

    def _next(self, member_id: str, era: int) -> object:
        return self.units.pop(0) if self.units else None


def test_a_worker_that_asks_anew_gets_what_its_broken_call_would_have_got() -> None:
    async def story() -> None:
        hands = Handing()
        broken = asyncio.create_task(hands.turn("a", 1, None))
        await asyncio.sleep(0)
        again, other = asyncio.create_task(hands.turn("a", 1, None)), asyncio.create_task(hands.turn("b", 1, None))
        await asyncio.sleep(0)
        hands.units = [7, 8]
        async with hands._members.changed:
            hands._members.changed.notify_all()
        answers = await asyncio.wait_for(asyncio.gather(broken, again, other), WAIT_S)
        assert answers == [Order("attach"), 7, 8]

    asyncio.run(story())
