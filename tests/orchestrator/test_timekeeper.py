"""A coordinator looks at the clock: whatever one look meets, and whatever the clock does, the next one is taken."""

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from members import Run, play

from orchestrator import timekeeper
from orchestrator.channel import Beat, Pulse
from orchestrator.suspicion import SILENT_DEATHS, Newcomers
from orchestrator.timekeeper import COME_BACK_S, Stillness, Timekeeper, judge, shifted


class Clock:
    """A clock that is put by what is listed, and the looks that were taken by it."""

    def __init__(self, monkeypatch, steps: list[float], fails: tuple[int, ...] = ()) -> None:
        self.now, self.steps, self.fails = 1000.0, steps, fails
        self.looks: list[float] = []
        self.pings, self.shifts, self.told = list[float](), list[float](), list[str]()
        monkeypatch.setattr(timekeeper, "time", self)
        monkeypatch.setattr(timekeeper, "TICK_S", 0.0)

    def time(self) -> float:
        return self.now

    def over(self) -> bool:
        if not self.steps:
            return True
        self.now += self.steps.pop(0)
        return False

    def look(self, now: float) -> None:
        self.looks.append(now)
        if len(self.looks) in self.fails:
            raise ValueError("what no look should meet")

    def run(self) -> None:
        ping = lambda: self.pings.append(self.now)  # noqa: E731
        asyncio.run(Timekeeper(self.over, self.look, ping, self.shifts.append, self.told.append).run())


def test_a_look_that_fails_is_told_once_and_the_next_is_taken(monkeypatch):
    clock = Clock(monkeypatch, [0.1] * 25, fails=(2, 3, 4))
    clock.run()
    assert len(clock.looks) == 25
    assert len(clock.told) == 1
    assert "what no look should meet" in clock.told[0]
    assert len(clock.pings) == 2


@pytest.mark.parametrize("put", [3600.0, -3600.0, 2.5])
def test_a_clock_that_is_put_shifts_what_is_remembered(monkeypatch, put):
    clock = Clock(monkeypatch, [*[0.1] * 5, put, *[0.1] * 12])
    clock.run()
    assert clock.shifts == [pytest.approx(put)]
    assert len(clock.pings) == 1, "as if it had not been put"


BEATS = st.builds(Beat, st.integers(1, 2), st.integers(0, 2), st.integers(0, 2), st.booleans())


@given(st.lists(st.lists(BEATS, min_size=2, max_size=2), min_size=1, max_size=30))
def test_all_stand_still_only_while_all_wait_and_nobody_gets_on(looks):
    stillness, since = Stillness(), 0
    for now, beats in enumerate(looks):
        places = [[(b.generation, b.step, b.place) for b in looks[at]] for at in (now, max(0, now - 1))]
        if now == 0 or places[0] != places[1] or not all(beat.waiting for beat in beats):
            since = now
        assert stillness.seconds(float(now), beats) == now - since


@pytest.mark.parametrize(
    ("heard_s", "moved_s", "waiting", "back_s", "found"),
    [
        (9.0, 9.0, False, None, None),
        (4.0, 9.0, True, None, "worker_frozen"),
        (9.0, 1.0, False, None, "worker_stuck"),
        (9.0, 1.0, True, None, None),
        (9.0, 9.0, True, COME_BACK_S + 1, "worker_stuck"),
        (9.0, 9.0, True, COME_BACK_S - 1, None),
    ],
)
def test_who_has_to_be_given_up(heard_s, moved_s, waiting, back_s, found):
    lost = judge(Pulse(heard_s, moved_s, Beat(1, 1, 1, waiting)), 10.0, 5.0, 8.0, back_s)
    assert (lost and lost[0]) == found


def test_a_run_that_goes_on_from_a_checkpoint_is_looked_after(tmp_path):
    """Steps are counted from the checkpoint's, but none of this command has been timed yet."""

    async def story(run: Run) -> None:
        a, b = run.worker("a"), run.worker("b")
        await run.seat(a, b, load_s=0.1, loaded=500)
        assert run.journal.recorded == 500
        run.members._look(time.time())
        run.steps(501, by=[a, b])
        run.members._look(time.time() + 2.0)
        assert not (run.folder / "logs" / "errors.log").exists()

    play(story, tmp_path)


def test_workers_that_wait_for_each_other_for_too_long_connect_anew(tmp_path):
    """A partition between them: packets are dropped, and no connection ends."""

    async def story(run: Run) -> None:
        a, b = await run.enlist("ab")
        run.steps(1, by=[a, b])
        run.members.still_s = 0.2
        run.members._check_pulses = lambda now: run.members._check_connections(now, 0.1)
        assert await a.told() == await b.told() == ("end", 1)
        await run.seat(a, b)
        assert run.members.roster.generation == 2
        run.steps(2, by=[a, b])
        (incident,) = await run.incidents()
        assert incident["kind"] == "connection_lost"
        assert "wait for each other" in incident["detail"]

    play(story, tmp_path)


def test_who_leads_a_stop_and_is_frozen_is_missed(tmp_path, monkeypatch):
    monkeypatch.setattr("orchestrator.membership.LEADS_S", 0.3)

    async def story(run: Run) -> None:
        a, b = await run.enlist("ab")
        run.steps(1, by=[a, b])
        run.members.stopping = True
        run.members.pause()
        assert (await asyncio.gather(a.join(), b.join()))[0].lead
        a.beats.clear()
        async with asyncio.timeout(20):
            while not run.ended:
                await asyncio.sleep(0.01)
        assert "was lost" in run.ended[0]
        a.beats.set()

    play(story, tmp_path)


def test_newcomers_end_a_run_only_if_it_waits_for_one_and_all_are_refused():
    enough, waits = Newcomers(), Newcomers()
    assert all(enough.spare(missed=False) for _ in range(100))
    assert [waits.spare(missed=True) for _ in range(SILENT_DEATHS)] == [True] * (SILENT_DEATHS - 1) + [False]


@pytest.mark.parametrize("by_s", [-3600.0, -6.0, 30.0, 3600.0])
def test_a_clock_that_was_put_blames_nobody(by_s, monkeypatch):
    """Heard before, and between the clock's change and the look that sees it."""
    now = 10_000.0 + by_s
    monkeypatch.setattr("orchestrator.timekeeper.time.time", lambda: now)
    for ago_s in (0.05, 0.2):
        before, after = 10_000.0 - ago_s, now - ago_s
        assert 0 <= now - shifted(after, by_s) <= ago_s + 1e-9
        assert 0 <= now - shifted(before, by_s) <= ago_s + 1e-9
