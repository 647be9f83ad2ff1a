"""Workers of parameter servers come and go: what a lost one held is handed out again."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from toys import toy_plan

from orchestrator.balancer import Balancer
from orchestrator.channel import Beat
from orchestrator.crowd import Crowd
from orchestrator.events import GenerationStarted
from orchestrator.handout import Counted, Handout, Unit
from orchestrator.journal import Journal
from orchestrator.recovery import Member, Roster

SHARDS = 8


class Floor:
    """A crowd that holds microbatches of a run with eight shards, without servers and without lines."""

    def __init__(self, folder: Path) -> None:
        journal = Journal(toy_plan(shards=SHARDS), str(folder), "token", "", 0.0, False)
        self.handout = Handout(Counted(lambda step: SHARDS), 10, 0)
        self.crowd = Crowd(journal, Roster(1, 9, 9, 0, False), Balancer(journal, SHARDS, 1, enabled=False), 0.0, 100)
        self.crowd.left, self.crowd.looked = self.left, lambda: None
        self.crowd.held = lambda name: range(*[(v := min(u.shard for u in self.handout.held(name))), v + 1])
        self.reasons: list[str] = []
        self.crowd.end_run = lambda reason, kind: self.reasons.append(reason)
        self.crowd.roster.training = self.crowd.begun = True
        journal.generation_begins(GenerationStarted(1, 0, 3, [], [], [], "cpu"), 0.0, 0.0, [])

    def left(self, name: str) -> None:
        """As the dispatcher does: the others go on."""
        self.handout.take_back(name)
        self.crowd.roster.training = True

    def enter(self, name: str) -> Member:
        return self.crowd.enter(Member(name, "n0", 1, "cpu", 0, -1, (name, 1)))


def play(story: Callable[[Floor], None], folder: Path) -> None:
    async def main() -> None:
        story(Floor(folder))

    asyncio.run(main())


@pytest.mark.parametrize("lost", "abc")
def test_what_a_lost_worker_held_is_handed_out_again(lost: str, tmp_path: Path) -> None:
    def story(floor: Floor) -> None:
        held = {name: [floor.handout.take(name) for _ in range(2)] for name in "abc" if floor.enter(name)}
        floor.crowd._heard(lost, Beat(1, 0, 0, False))
        floor.crowd.lose(lost, "worker_killed", "its process ended")
        assert lost not in floor.crowd.roster.seated
        assert floor.enter("d").rank == "abc".index(lost), "the rank that is free"
        assert [floor.handout.take("d") for _ in range(2)] == held[lost]
        assert floor.handout.take("d") == Unit(0, 6), "only then what is new"
        assert not floor.reasons

    play(story, tmp_path)


def test_four_silent_deaths_over_one_shard_end_the_run(tmp_path: Path) -> None:
    def story(floor: Floor) -> None:
        for name in "abcd":
            assert not floor.reasons
            floor.enter(name)
            assert floor.handout.take(name) == Unit(0, 0)
            floor.crowd._heard(name, Beat(1, 0, 0, False))
            floor.crowd.lose(name, "worker_killed", "its process ended")
        (reason,) = floor.reasons
        assert "shard" in reason

    play(story, tmp_path)


def test_who_leaves_a_node_that_goes_is_told_of(tmp_path: Path) -> None:
    def story(floor: Floor) -> None:
        floor.crowd.let_go(floor.enter("a"))
        (left,) = floor.crowd._journal._folder.every("worker_left")
        assert (left["why"], left["rank"]) == ("node_drained", 0)

    play(story, tmp_path)
