"""Losses as the coordinator sees them: who is given up, who goes on, what the journal says of it."""

import asyncio
import time

import pytest
from members import WAIT_S, Run, Worker, play

from orchestrator import timekeeper
from orchestrator.seats import Order, Seat
from orchestrator.suspicion import SILENT_DEATHS

STALL_S = 2.0  # eight beats: a healthy worker must not be missed on a busy machine


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("reachable", [True, False])
def test_a_survivor_goes_on_and_no_step_is_lost(tmp_path, victim, reachable):
    async def story(run: Run) -> None:
        workers = await run.enlist("ab")
        run.steps(1, 2, 3, by=workers)
        workers[victim].die()
        survivor = workers[1 - victim]
        survivor.step = 3 if victim else 2  # rank 0 may have taken and reported a step that the other had not
        assert await survivor.told() == ("end", 1)
        await run.seat(survivor, why="Connection closed by peer")
        assert (survivor.rank, survivor.seat.generation, survivor.seat.step) == (0, 2, 3 if victim else 2)
        assert survivor.seat.placement.workers == 1
        assert not await run.incidents(), "it is over with the next committed step"
        run.steps(2, 3, 4, by=[survivor])
        (incident,) = await run.incidents(reachable)
        assert incident["kind"] == ("worker_killed" if reachable else "node_lost")
        assert (incident["workers_before"], incident["workers_after"]) == (2, 1)
        assert (incident["step"], incident["steps_lost"], incident["generation"]) == (3, 0, 2)
        assert f"rank {victim}" in incident["detail"]
        (left,) = run.events("worker_left")
        assert (left["why"], left["rank"]) == ("worker_killed", victim)
        assert run.recorded() == [1, 2, 3, 4], "a survivor repeats what may have been lost on the way"
        assert await workers[victim].join() == Order("excluded")
        assert not run.ended
        assert run.killed.empty()

    play(story, tmp_path)


@pytest.mark.parametrize("fault", ["frozen", "stuck", "lost on the way"])
def test_a_member_that_does_not_get_on_is_given_up(tmp_path, fault, monkeypatch):
    """Silent; alive, but in the same shard for ever while the others wait; told to come back, and not coming."""
    monkeypatch.setattr(timekeeper, "COME_BACK_S", 0.1)

    async def story(run: Run) -> None:
        a, b, c = await run.enlist("abc")
        run.steps(1, by=[a, b, c])
        if fault == "frozen":
            c.beats.clear()
        elif fault == "stuck":
            c.waiting = False
        else:
            b.die()
            assert await a.told() == await c.told() == ("end", 1)
            await asyncio.gather(run.seat(a), c.told())
        assert await asyncio.wait_for(run.killed.get(), WAIT_S) == "c"
        if fault == "stuck":
            assert await c.told() == ("dump", 1), "its stack is asked for first"
            assert await c.told() == ("gone", 0)
        if fault != "lost on the way":
            assert await a.told() == await b.told() == ("end", 1)
            await run.seat(a, b, why="aborted")
        run.steps(2, by=[a])
        (incident,) = await run.incidents()
        kinds = {"frozen": "worker_frozen", "stuck": "worker_stuck", "lost on the way": "worker_killed"}
        assert incident["kind"] == kinds[fault]
        assert incident["workers_after"] == len(run.members.roster.seated) == (1 if fault == "lost on the way" else 2)
        if fault == "frozen":
            assert STALL_S <= incident["detect_s"] < WAIT_S
        assert await c.join() == Order("excluded")
        assert run.killed.empty()

    play(story, tmp_path, workers=3, stall_s=STALL_S)


def test_a_death_explains_a_lost_connection_that_was_told_of_first(tmp_path):
    async def story(run: Run) -> None:
        a, b, c = await run.enlist("abc")
        run.steps(1, by=[a, b, c])
        early = asyncio.create_task(a.join("Connection closed by peer"))
        assert await b.told() == ("end", 1)
        c.die()
        assert await b.told() == ("end", 1)
        await asyncio.gather(early, b.join("aborted"))
        run.begin(a, b)
        run.steps(2, by=[a, b])
        (incident,) = await run.incidents()
        assert (incident["kind"], incident["workers_before"], incident["workers_after"]) == ("worker_killed", 3, 2)
        assert (incident["step"], incident["steps_lost"]) == (1, 0)

    play(story, tmp_path, workers=3)


def test_a_death_while_others_have_come_back_from_a_pause(tmp_path):
    """Who still waits for the dead one in a collective must be told."""

    async def story(run: Run) -> None:
        a, b, c = await run.enlist("abc")
        run.steps(1, by=[a, b, c])
        run.members.pause()
        assert await a.told() == await b.told() == await c.told() == ("pause", 1)
        early = asyncio.create_task(a.join())
        await asyncio.wait([early], timeout=0)
        c.die()
        assert await b.told() == ("end", 1)
        await asyncio.gather(early, b.join("aborted"))
        run.begin(a, b)
        run.steps(2, by=[a, b])
        assert [incident["kind"] for incident in await run.incidents()] == ["worker_killed"]

    play(story, tmp_path, workers=3)


@pytest.mark.parametrize(("second", "ends"), [("KeyError: 7", True), ("KeyError: 8", False)])
def test_a_step_that_fails_twice_in_the_same_way_ends_the_run(tmp_path, second, ends):
    async def story(run: Run) -> None:
        a, b, c = await run.enlist("abc")
        run.members.failed("c", 0, "KeyError: 7")
        run.members.failed("b", 0, "KeyError: 7")
        assert await a.told() == ("end", 1)
        assert not run.ended, "two of one generation may share a cause"
        await run.seat(a, why="aborted")
        run.members.failed("a", 0, second)
        assert run.ended == (["step 0 failed twice in the same way: KeyError: 7"] if ends else [])
        assert await b.join() == await c.join() == Order("excluded")

    play(story, tmp_path, workers=3)


def test_as_many_losses_as_are_allowed(tmp_path):
    async def story(run: Run) -> None:
        a, b, c = await run.enlist("abc")
        c.die()
        await asyncio.gather(a.told(), b.told())
        await run.seat(a, b, why="aborted")
        assert not run.ended
        b.die()
        assert await a.told() == ("end", 2)
        assert run.ended == ["2 workers were lost, and --max-incidents allows 1"]
        assert await a.join("aborted") == Order("over")

    play(story, tmp_path, workers=3, max_incidents=1)


def test_what_a_generation_loses_together_is_one_incident(tmp_path):
    """As where a node or a switch takes many workers along."""

    async def story(run: Run) -> None:
        a, b, c, d = await run.enlist("abcd")
        c.die()
        d.die()
        await asyncio.gather(a.told(), b.told())
        await run.seat(a, b, why="aborted")
        assert not run.ended
        b.die()
        while await a.told() != ("end", 2):
            pass  # the end of the first one was told twice
        assert run.ended == ["3 workers were lost in 2 incidents, and --max-incidents allows 1"]

    play(story, tmp_path, workers=4, max_incidents=1)


@pytest.mark.parametrize("waiting", [False, True])
def test_a_sample_that_kills_whoever_reads_it_ends_the_run(tmp_path, waiting):
    """Four deaths of the holders of shards 0 to 3; of those that were idle nothing is said."""

    async def story(run: Run) -> None:
        first, second = await run.enlist("ab")
        for name in "cdef"[: SILENT_DEATHS - 1]:
            assert first.rank == 0
            await first.heard(waiting)
            first.die()
            await second.told()
            assert not run.ended
            first, second = second, run.worker(name)
            await run.seat(second, first, why="aborted")
        await first.heard(waiting)
        first.die()
        await second.told()
        assert len(run.ended) == (0 if waiting else 1)
        assert waiting or "[0, 1, 2, 3]" in run.ended[0]

    play(story, tmp_path)


def test_workers_that_never_get_ready_end_the_run(tmp_path):
    """One after the other; those that came together end together, and count once, whoever tells of it."""

    async def story(run: Run) -> None:
        for number in range(SILENT_DEATHS):
            assert not run.ended
            came_s, names = time.time(), [f"{letter}{number}" for letter in "abc"]
            for name in names:
                run.members.came_s[name] = came_s
            for name in names:
                run.members.failed(name, 0, "ValueError: no such model")
                run.members.ended_early(came_s, "its process ended")
        (reason,) = run.ended
        assert reason.startswith("workers ended before they could train, 4 times one after the other: ")

    play(story, tmp_path)


def test_workers_that_never_get_ready_beside_one_that_does(tmp_path):
    """That is their machine's fault; so it is when the one that does is lost, and its replacement is on its way."""

    async def story(run: Run) -> None:
        (first,) = await run.enlist("a")

        def end_one(name: str) -> None:
            run.members.came_s[name] = time.time()
            run.members.failed(name, 0, "RuntimeError: no CUDA")

        for number in range(2 * SILENT_DEATHS):
            end_one(f"early {number}")
        assert not run.ended
        run.members.lose(first.name, "worker_killed", "its process ended")
        for number in range(SILENT_DEATHS - 1):
            run.members.ended_early(0.0, "of one that had trained: its process")
            end_one(f"late {number}")
        assert not run.ended
        await run.seat(run.worker("b"))
        assert not run.ended

    play(story, tmp_path, workers=1)


def test_when_all_are_lost_the_checkpoint_counts(tmp_path):
    async def story(run: Run) -> None:
        a, b = await run.enlist("ab")
        run.steps(1, 2, 3, 4, 5, by=[a, b])
        a.die()
        await b.told()
        b.die()
        c, d = run.worker("c"), run.worker("d")
        await run.seat(c, d, load_s=0.5, loaded=2)
        assert (c.seat.generation, c.seat.step, c.seat.recorded) == (2, -1, 5)
        assert run.recorded() == [1, 2]
        run.steps(3, by=[c, d])
        (incident,) = await run.incidents()
        assert (incident["steps_lost"], incident["workers_before"], incident["workers_after"]) == (3, 2, 2)
        assert len(run.events("worker_left")) == 2
        assert run.recorded() == [1, 2, 3]

    play(story, tmp_path)


def test_many_survivors_of_one_loss_all_go_on(tmp_path):
    async def story(run: Run) -> None:
        *survivors, last = await run.enlist("abcdefgh")
        last.die()
        await asyncio.gather(*(survivor.told() for survivor in survivors))
        await run.seat(*survivors, why="the generation was ended")
        assert run.killed.empty()
        assert set(run.members.roster.seated) == set("abcdefg")

    play(story, tmp_path, workers=8)


def test_of_workers_that_cannot_reach_each_other_one_goes(tmp_path):
    async def try_again(worker: Worker) -> Seat | Order:
        while True:
            answer = await worker.join("timed out")
            if isinstance(answer, Order) or answer.placement.workers == 1:
                return answer

    async def story(run: Run) -> None:
        tries = [asyncio.create_task(try_again(worker)) for worker in await run.enlist("ab")]
        name = await asyncio.wait_for(run.killed.get(), WAIT_S)
        assert name not in {**run.members.roster.seated, **run.members.roster.ready}
        assert Order("excluded") in await asyncio.gather(*tries)

    play(story, tmp_path)
