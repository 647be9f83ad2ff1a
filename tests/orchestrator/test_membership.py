"""Generations of a run: who is seated when somebody joins, leaves or asks to stop; only training is left out."""

import asyncio

from members import WAIT_S, Run, play

from orchestrator.events import CheckpointSaved
from orchestrator.seats import Order, Seat


def test_two_members_are_seated_side_by_side(tmp_path):
    async def story(run: Run) -> None:
        a, b = await run.enlist("ab")
        assert (a.rank, b.rank) == (0, 1)
        assert [list(part) for part in a.seat.placement] == [[0, 1, 2, 3], [4, 5, 6, 7]]
        for worker in (a, b):
            assert (worker.seat.generation, worker.seat.step, worker.seat.share) == (1, -1, False)
            assert worker.seat.store == ("a", 1), "the store is rank 0's"

    play(story, tmp_path)


def test_who_has_finished_hears_of_a_loss(tmp_path):
    """As in Coordinator.finish, where workers wait while rank 0 saves the trained model."""

    async def story(run: Run) -> None:
        _, b = await run.enlist("ab")

        async def finish() -> None:
            async with run.members.changed:
                await run.members.changed.wait_for(lambda: not run.members.roster.training)

        waiting = asyncio.create_task(finish())
        await asyncio.sleep(0)  # it waits
        b.die()
        await asyncio.wait_for(waiting, WAIT_S)

    play(story, tmp_path)


def test_who_waits_for_a_seat_and_is_given_up_gets_an_answer(tmp_path):
    async def story(run: Run) -> None:
        a, _ = await run.enlist("ab")
        run.steps(1, by=[a])
        c = run.worker("c")  # there is no third seat
        waiting = asyncio.create_task(c.join())
        while "c" not in run.members.roster.ready:
            await asyncio.sleep(0)
        run.members.lose("c", "worker_killed", "its line broke")
        assert await waiting == Order("excluded")

    play(story, tmp_path)


def test_a_joiner_waits_for_a_step_boundary(tmp_path):
    async def story(run: Run) -> None:
        run.members.roster.maximum = 3
        a, b = await run.enlist("ab")
        run.steps(1, 2, by=[a, b])
        c = run.worker("c")
        waiting = asyncio.create_task(c.join())
        assert await a.told() == await b.told() == ("pause", 1)
        run.steps(3, by=[a, b])
        assert not waiting.done()
        for answer in await asyncio.gather(b.join(), a.join(), waiting):
            assert isinstance(answer, Seat)
            assert (answer.generation, answer.step, answer.share, answer.recorded) == (2, 3, True, 3)
            assert answer.placement.workers == 3
        assert [worker.rank for worker in (a, b, c)] == [0, 1, 2]
        run.begin(a, b, c)
        run.steps(4, by=[a, b, c])
        (incident,) = await run.incidents(reachable=False)
        assert (incident["kind"], incident["workers_before"], incident["workers_after"]) == ("workers_joined", 2, 3)
        assert incident["steps_lost"] == 0
        assert a.orders.empty(), "a pause is not an end"
        assert b.orders.empty()

    play(story, tmp_path)


def test_a_member_on_a_draining_node_leaves(tmp_path):
    async def story(run: Run) -> None:
        run.members.roster.maximum = 3
        a, b = await run.enlist("ab")
        c = run.worker("c", node="n1")
        waiting = asyncio.create_task(c.join())
        assert await a.told() == await b.told() == ("pause", 1)
        await asyncio.gather(a.join(), b.join(), waiting)
        run.begin(a, b, c)
        run.steps(1, by=[a, b, c])
        run.members.roster.draining = frozenset({"n1"})
        assert await a.told() == await b.told() == await c.told() == ("pause", 2)
        assert await asyncio.gather(c.join(), run.seat(a, b)) == [Order("leave"), None]
        run.steps(2, by=[a, b])
        c.die()
        assert [incident["kind"] for incident in await run.incidents()] == ["workers_joined", "node_drained"]
        assert a.seat.placement.workers == 2
        assert a.orders.empty(), "who has left is not missed"
        assert await c.join() == Order("excluded")

    play(story, tmp_path)


def test_a_coordinator_that_comes_back_goes_on_with_the_same_workers(tmp_path):
    async def story(run: Run) -> None:
        a, b = await run.enlist("ab")
        run.steps(1, 2, 3, by=[a, b])

    async def again(run: Run) -> None:
        b, a = run.worker("b"), run.worker("a")
        a.step, a.rank, b.step, b.rank = 3, 0, 3, 1
        await run.seat(b, a, why="gone")
        assert (a.rank, b.rank) == (0, 1)
        assert (a.seat.generation, a.seat.step, a.seat.recorded) == (2, 3, 3)
        run.steps(3, 4, by=[a, b])
        assert run.recorded() == [1, 2, 3, 4]
        (incident,) = await run.incidents(reachable=False)
        assert (incident["kind"], incident["workers_before"], incident["workers_after"]) == ("coordinator_lost", 2, 2)
        assert (incident["step"], incident["steps_lost"]) == (3, 0)

    play(story, tmp_path)
    play(again, tmp_path, again=True)


def test_a_stop_after_the_loss_of_a_coordinator_waits_for_its_survivors(tmp_path):
    async def story(run: Run) -> None:
        run.steps(1, 2, 3, by=await run.enlist("ab"))

    async def again(run: Run) -> None:
        run.members.stopping = True
        run.members.seat()
        b, a = run.worker("b"), run.worker("a")
        a.step, a.rank, b.step, b.rank = 3, 0, 2, 1
        first = asyncio.create_task(b.join("gone"))
        await asyncio.wait([first], timeout=0)
        run.members.seat()
        assert await asyncio.gather(first, a.join("gone")) == [Order("stop", lead=False), Order("stop", lead=True)]
        assert not run.ended

    play(story, tmp_path)
    play(again, tmp_path, again=True)


def test_a_stop_is_led_by_who_has_the_newest_step(tmp_path):
    async def story(run: Run) -> None:
        a, b = await run.enlist("ab")
        run.steps(1, by=[a, b])
        run.members.stopping = True
        run.members.pause()
        assert await a.told() == await b.told() == ("stop", 1)
        b.step = 2
        assert await asyncio.gather(a.join(), b.join()) == [Order("stop", lead=False), Order("stop", lead=True)]
        assert run.journal.open is None, "a stop is no incident"
        run.members.seat()
        assert not run.ended, "the one that leads is still writing"
        b.die()
        while not run.ended:
            await asyncio.wait_for(run.members.beats.get(), 20)
            run.members.seat()
        assert "was lost" in run.ended[0]

    async def before_the_first_step(run: Run) -> None:
        waiting = asyncio.create_task(run.worker("a").join())
        await asyncio.wait([waiting], timeout=0)
        run.members.stopping = True
        assert await waiting == Order("over")
        assert run.ended == [""]

    play(story, tmp_path / "1")
    play(before_the_first_step, tmp_path / "2")


def test_a_notice_while_too_few_train_has_the_state_written_down(tmp_path):
    """The one that is left waits for others, with steps that no checkpoint has, on a node that will go."""

    async def story(run: Run) -> None:
        run.members.roster.minimum = 2
        a, b = await run.enlist("ab")
        run.steps(1, 2, 3, by=[a, b])
        run.members.save()
        b.die()
        assert await a.told() == ("end", 1)
        waiting = asyncio.create_task(a.join())
        await asyncio.wait([waiting], timeout=0)
        run.members.save()
        assert await waiting == Order("save")
        c = asyncio.create_task(run.worker("c").join())
        await asyncio.wait([c], timeout=0.2)
        assert not c.done(), "who writes sits nowhere"
        assert not run.members.roster.seated
        run.journal.log(CheckpointSaved(3, 1, 0.0, 0.0))
        waiting = asyncio.create_task(a.join())
        run.members.save()
        assert (await waiting).step == (await c).step == 3
        assert (await c).generation == 2, "one generation, and no connection that was lost"
        assert run.journal.open.kind == "worker_killed"

    play(story, tmp_path)


def test_when_the_run_is_over_all_are_told(tmp_path):
    async def story(run: Run) -> None:
        (a,) = await run.enlist("a")
        waiting = asyncio.create_task(run.worker("b").join())
        await asyncio.wait([waiting], timeout=0)
        run.members.abandon()
        assert await a.told() == ("end", 1)
        assert await waiting == await a.join() == Order("over")

    play(story, tmp_path, workers=1)


def test_a_pause_is_asked_for_once_and_only_when_training_has_begun(tmp_path):
    async def story(run: Run) -> None:
        (a,) = await run.enlist("a")
        for _ in range(3):
            run.members.pause()
        run.members.desk.tell("a", "checkpoint")
        assert [await a.told(), await a.told()] == [("pause", 1), ("checkpoint", 0)]
        assert isinstance(await a.join(), Seat)
        run.members.pause()
        run.members.desk.tell("a", "checkpoint")
        assert await a.told() == ("checkpoint", 0)
        run.begin(a)
        run.members.pause()
        assert await a.told() == ("pause", 2)

    play(story, tmp_path, workers=1)


def test_shards_move_to_the_quicker_worker(tmp_path):
    async def story(run: Run) -> None:
        a, b = await run.enlist("ab")
        run.steps(*range(1, 9), by=[a, b])
        a.computed, b.computed = (8, 50_000), (8, 9000)  # caches are cold: no pace
        await a.heard(waiting=True)
        await b.heard(waiting=True)
        a.computed, b.computed = (48, 54_000), (48, 21_000)
        assert await a.told() == await b.told() == ("pause", 1)
        await run.seat(a, b)
        assert [len(part) for part in a.seat.placement] == [6, 2]
        run.steps(9, by=[a, b])
        (incident,) = await run.incidents()
        assert (incident["kind"], incident["steps_lost"]) == ("rebalanced", 0)
        (moved,) = run.events("rebalanced")
        assert (moved["ranges"], moved["step"]) == ([[0, 6], [6, 8]], 8)
        assert 0.4 < moved["gain"] < 0.6
        (slow,) = run.events("straggler_found")
        assert (slow["rank"], slow["shard_s"], slow["slower"]) == (1, 0.3, 3.0)

    play(story, tmp_path)


def test_even_workers_keep_their_shards(tmp_path):
    async def story(run: Run) -> None:
        a, b = await run.enlist("ab")
        run.steps(*range(1, 9), by=[a, b])
        a.computed, b.computed = (40, 4000), (40, 4100)
        await a.heard(waiting=True)
        await b.heard(waiting=True)
        c = run.worker("c")
        run.members.roster.maximum = 3
        joined = asyncio.create_task(c.join())
        assert await a.told() == await b.told() == ("pause", 1)
        await asyncio.gather(a.join(), b.join(), joined)
        assert [len(part) for part in a.seat.placement] == [2, 3, 3]
        assert not run.events("rebalanced")
        assert not run.events("straggler_found")

    play(story, tmp_path)


def test_workers_of_one_node_have_neighbouring_shards(tmp_path):
    async def story(run: Run) -> None:
        a, b, c = run.worker("a", "n0"), run.worker("b", "n1"), run.worker("c", "n0")
        await run.seat(a, b, c)
        assert sorted([a.rank, c.rank]) in ([0, 1], [1, 2])

    play(story, tmp_path, workers=3)
