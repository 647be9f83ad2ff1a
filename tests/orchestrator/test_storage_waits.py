"""Who waits for samples or storage is not stuck; who waits for a seat is watched; ends that a coordinator has seen."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest
from members import WAIT_S, Run, play
from toys import toy_plan

from orchestrator.channel import Beat, Pulse
from orchestrator.events import CheckpointSaved, GenerationStarted
from orchestrator.journal import Journal
from orchestrator.recorder import Recorder
from orchestrator.recovery import FIRST_STEP_S
from orchestrator.seats import Order, Seat
from orchestrator.shards import Placement
from orchestrator.step import StepTotals
from orchestrator.stopwatch import Stopwatch
from orchestrator.timekeeper import Stillness


@pytest.mark.parametrize(("reading", "still_s", "lost"), [(False, 100, True), (True, 100, False), (True, 400, True)])
def test_who_reads_is_given_more_time_to_get_on(tmp_path, reading, still_s, lost):
    async def story(run: Run) -> None:
        a, b = await run.enlist("ab")
        run.steps(*range(1, 21), by=[a, b])
        assert 100 < FIRST_STEP_S < 400
        now = time.time()
        run.members._pulses["b"] = Pulse(now, now - still_s, Beat(1, 20, 5, False, 0, 0, reading))
        run.members._check_pulses(now)
        assert ("b" not in run.members.roster.seated) == lost

    play(story, tmp_path)


@pytest.mark.parametrize(("reading", "still_s", "lost"), [(False, 3, True), (True, 100, False), (True, 400, True)])
def test_a_short_stall_limit_is_one_of_computing(tmp_path, reading, still_s, lost):
    """Storage that is away for as long as --storage-patience says is waited for all the same."""

    async def story(run: Run) -> None:
        a, b = await run.enlist("ab")
        run.steps(*range(1, 21), by=[a, b])
        now = time.time()
        run.members._pulses["b"] = Pulse(now, now - still_s, Beat(1, 20, 5, False, 0, 0, reading))
        run.members._check_pulses(now)
        assert ("b" not in run.members.roster.seated) == lost

    play(story, tmp_path, stall_s=2.0)


def test_who_writes_a_checkpoint_when_another_is_lost_may_finish_it(tmp_path):
    """It waits, for storage: coming back late is not its fault. Who waits for others alone has to come."""

    async def story(run: Run) -> None:
        a, b, c = await run.enlist("abc")
        run.steps(*range(1, 21), by=[a, b, c])
        c.die()
        assert await a.told() == await b.told() == ("end", 1)
        now = time.time() + 60.0
        run.members._pulses["a"] = Pulse(now, now, Beat(1, 20, 5, True, 0, 0, True))
        run.members._pulses["b"] = Pulse(now, now, Beat(1, 20, 5, True, 0, 0, False))
        run.members._check_pulses(now)
        assert list(run.members.roster.seated) == ["a"]

    play(story, tmp_path, workers=3)


def test_a_wait_is_seen_as_progress_when_it_ends():
    clock = Stopwatch()
    with clock.away():
        assert clock.told(5) == {"place": 5, "shards": 0, "busy_ms": 0, "reading": True}
    assert clock.told(5) == {"place": 6, "shards": 0, "busy_ms": 0, "reading": False}
    with pytest.raises(KeyError), clock.away():
        raise KeyError
    assert (clock.reading, clock.reads) == (False, 2)


def test_a_generation_does_not_stand_still_while_one_waits_for_storage():
    stillness, waits, stores = Stillness(), Beat(1, 5, 7, True), Beat(1, 5, 7, True, reading=True)
    assert stillness.seconds(10.0, [waits, stores]) == stillness.seconds(99.0, [waits, stores]) == 0.0
    assert stillness.seconds(100.0, [waits, waits]) == 1.0


def test_who_freezes_while_it_waits_for_a_seat_is_killed_and_others_go_on(tmp_path):
    async def story(run: Run) -> None:
        a, b = await run.enlist("ab")
        run.steps(1, by=[a, b])
        c = run.worker("c")
        waits = asyncio.create_task(c.join())
        await asyncio.wait([waits], timeout=0)
        assert list(run.members.roster.ready) == ["c"]
        c.beats.clear()
        assert await asyncio.wait_for(run.killed.get(), WAIT_S) == "c"
        assert await waits == Order("excluded")
        assert (list(run.members.roster.seated), run.members.roster.training) == (["a", "b"], True)
        run.steps(2, by=[a, b])
        assert not await run.incidents(), "who trains notices nothing"
        c.beats.set()

    play(story, tmp_path, workers=2, stall_s=2.0)


def test_a_late_step_does_not_end_the_incident_of_a_second_loss(tmp_path):
    async def story(run: Run) -> None:
        a, b, c = await run.enlist("abc")
        run.steps(1, by=[a, b, c])
        c.die()
        assert await a.told() == await b.told() == ("end", 1)
        await run.seat(a, b, why="aborted")
        b.die()
        assert await a.told() == ("end", 2)
        run.steps(2, by=[a])  # of generation 2, told by then
        assert not await run.incidents()
        await run.seat(a, why="aborted")
        run.steps(3, by=[a])
        (incident,) = await run.incidents()
        assert (incident["workers_before"], incident["workers_after"], incident["generation"]) == (3, 1, 3)

    play(story, tmp_path, workers=3)


def test_a_coordinator_that_comes_back_after_the_end_knows_how_it_ended(tmp_path):
    first = Journal(toy_plan(), str(tmp_path), "token", "", 0.0, again=False)
    assert first.ended_as() == ("", "", 0)
    first.end("stopped", "on request", "", {})
    first.flush()
    again = Journal(toy_plan(), str(tmp_path), "token", "", 0.0, again=True)
    assert again.ended_as() == ("stopped", "on request", 130)
    assert again.result == first.result
    assert Journal(toy_plan(), str(tmp_path), "token", "", 0.0, again=False).ended_as() == ("", "", 0)


@pytest.mark.parametrize("off_s", [-3600.0, 3600.0])
def test_a_coordinator_that_comes_back_knows_its_steps_whatever_clock_their_machine_has(tmp_path, off_s):
    """Steps 1 and 2 are an earlier command's."""
    base = {"loss": 1.0, "samples": 8, "step_s": 0.1, "generation": 1}
    for steps in ((1, 2), (3, 4, 5)):
        command = time.time() + 0.01
        while time.time() < command + 0.01:  # events are stamped in milliseconds
            pass
        journal = Journal(toy_plan(), str(tmp_path), "token", "", command, again=False)
        journal.generation_begins(GenerationStarted(1, steps[0] - 1, 1, [], [], [], "cpu"), 0.0, 0.0, [])
        journal.recorded = steps[0] - 1
        journal.steps([{"step": step, "time_s": command + off_s, **base} for step in steps])
    again = Journal(toy_plan(), str(tmp_path), "token", "", command, again=True)
    assert (again.first_step, again.recorded) == (2, 5)
    assert again.open.detect_s >= 0


def test_a_command_that_ends_before_it_trains_tells_the_steps_of_the_run(tmp_path):
    first = Journal(toy_plan(), str(tmp_path), "token", "", 0.0, again=False)
    first.generation_begins(GenerationStarted(1, 0, 1, [], [], [], "cpu"), 0.0, 0.0, [])
    base = {"loss": 1.0, "samples": 8, "step_s": 0.1, "time_s": time.time(), "generation": 1}
    first.steps([{"step": step, **base} for step in (1, 2, 3)])
    first.log(CheckpointSaved(3, 1, 0.0, 0.0))
    first.end("stopped", "on request", "", {})
    second = Journal(toy_plan(), str(tmp_path), "token", "", 0.0, again=False)
    second.end("stopped", "on request, before this command's first step", "", {})
    assert (second.result["steps"], second.result["samples"]) == (3, first.result["samples"])
    assert second.result["samples"] > 0


@pytest.mark.parametrize(("saved", "loss"), [(2, 1.2), (-1, None)])
def test_steps_beyond_the_newest_checkpoint_are_no_steps_of_a_run_that_was_killed(tmp_path, saved, loss):
    """A command was killed, and the next one ends before, or right after, it has loaded what is kept."""
    first = Journal(toy_plan(), str(tmp_path), "token", "", 0.0, again=False)
    first.generation_begins(GenerationStarted(1, 0, 1, [], [], [], "cpu"), 0.0, 0.0, [])
    base = {"samples": 8, "step_s": 0.1, "time_s": time.time(), "generation": 1}
    first.steps([{"step": step, "loss": 1 + step / 10, **base} for step in (1, 2, 3)])
    first.log(*([CheckpointSaved(2, 1, 0.0, 0.0)] if saved > 0 else []))
    for begins in (False, True):
        again = Journal(toy_plan(), str(tmp_path), "token", "", 0.0, again=False)
        if begins:
            again.generation_begins(GenerationStarted(1, max(0, saved), 1, [], [], [], "cpu"), 0.1, 0.1, [])
        again.end("stopped", "on request", "", {})
        told = {key: again.result[key] for key in ("steps", "samples", "loss")}
        steps = max(0, saved)
        assert told == {"steps": steps, "samples": again._plan.schedule.samples_before(steps), "loss": loss}


def test_a_new_leader_keeps_the_cadence_of_the_one_before(tmp_path, monkeypatch):
    journal = Journal(toy_plan(), str(tmp_path), "token", "", 0.0, again=False)
    assert journal.unsaved_s() == 0.0, "waiting for workers is no training that could be lost"
    now = [1000.0]
    monkeypatch.setattr("orchestrator.journal.time.monotonic", lambda: now[0])
    journal.generation_begins(GenerationStarted(1, 0, 1, [], [], [], "cpu"), 0.0, 0.0, [])
    now[0] += 40.0
    assert journal.unsaved_s() == 40.0
    journal.log(CheckpointSaved(7, 1, 0.0, 0.0))
    assert (journal.saved, journal.unsaved_s()) == (7, 0.0)
    now[0] += 50.0
    assert journal.unsaved_s() == 50.0
    plan = toy_plan(checkpoint_every="60s")
    recorder = Recorder(plan, str(tmp_path), None, None)
    state = type("State", (), {"step": 9})()
    recorder.take_seat(Seat(2, 0, Placement((0, 8)), ("h", 1), 8, False, 8, unsaved_s=50.0))
    assert not recorder._is_due(state, 1)
    now[0] += 10.0
    assert recorder._is_due(state, 1)
    assert not recorder._is_due(state, 1)


def test_the_step_after_an_evaluation_is_timed_from_its_end(tmp_path):
    recorder, records = Recorder(toy_plan(), str(tmp_path), None, None), []
    recorder.take_seat(Seat(1, 0, Placement((0, 8)), ("h", 1), 0, False, 0))
    step = lambda record, hurry: records.append(record)  # noqa: E731
    recorder.reporter = SimpleNamespace(event=lambda event: None, step=step)
    recorder.begin(1)
    state, totals = SimpleNamespace(step=1), StepTotals(1.0, 8, 1.0, False, "", 0.0, 0.0, 0.0)
    recorder.committed(state, totals, 0.1)
    recorder.evaluated(1, {"accuracy": 1.0})
    threading.Event().wait(0.01)
    recorder.committed(state, totals, 0.1)
    assert 0.01 <= records[1]["step_s"] < WAIT_S
    assert records[1]["samples_per_s"] <= 800.0
    assert abs(records[1]["time_s"] - time.time()) < WAIT_S


@pytest.mark.parametrize(("who", "still_s", "lost"), [("b", 20, True), ("c", 20, False), ("c", 400, True)])
def test_who_is_new_has_time_for_its_first_step(tmp_path, who, still_s, lost):
    """It loads what the others have loaded; until the generation has a step, no longer."""

    async def story(run: Run) -> None:
        run.members.roster.maximum = 3
        a, b = await run.enlist("ab")
        run.steps(*range(1, 31), by=[a, b])
        c = run.worker("c")
        waiting = asyncio.create_task(c.join())
        assert await a.told() == await b.told() == ("pause", 1)
        await asyncio.gather(a.join(), b.join(), waiting)
        run.begin(a, b, c)

        def looked() -> bool:
            now = time.time()
            run.members._pulses[who] = Pulse(now, now - still_s, Beat(2, 30, 5, False, 0, 0, False))
            run.members._check_pulses(now)
            return who not in run.members.roster.seated

        assert looked() == lost
        if not lost:
            run.steps(31, by=[a, b, c])
            assert looked(), "its first step is done"

    play(story, tmp_path)
