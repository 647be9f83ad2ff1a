"""Who sends what to whom, played through with names of shards in place of gradients."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.routes import Routes, agent, parts_of
from orchestrator.shards import Block, Placement, even_placement, push_block


@st.composite
def cases(draw) -> tuple[Placement, list[list[int]]]:
    """A placement of up to 32 shards on up to 8 workers, and who is on whose machine, in any order."""
    shards = draw(st.sampled_from([2, 4, 8, 16, 32]))
    cuts = draw(st.sets(st.integers(1, shards - 1), min_size=1, max_size=min(shards - 1, 7)))
    placement = Placement((0, *sorted(cuts), shards))
    machines = draw(st.lists(st.integers(0, 3), min_size=placement.workers, max_size=placement.workers))
    teams = [[rank for rank, m in enumerate(machines) if m == machine] for machine in dict.fromkeys(machines)]
    return placement, teams


def tree(start: int, size: int) -> object:
    """The sum over a block, as it is to be added."""
    return start if size == 1 else (tree(start, size // 2), tree(start + size // 2, size // 2))


def folded(addends: list[tuple[Block, object]]) -> list[object]:
    blocks: list[Block] = []
    sums: list[object] = []
    for block, addend in addends:
        sums.append(addend)
        for _ in range(push_block(blocks, block)):
            right, left = sums.pop(), sums.pop()
            sums.append((left, right))
    return sums


@given(cases())
def test_every_worker_can_add_the_tree_from_what_comes(case):
    placement, teams = case
    everyone = [Routes(placement, teams, rank) for rank in range(placement.workers)]
    sent: Counter[tuple[int, int, int]] = Counter()  # sender, number of the part, chunk
    for routes in everyone:
        sent.update((routes.rank, part, chunk) for part in routes.sent_alone.values() for chunk in routes.outside)
        sent.update((routes.rank, part, chunk) for part, chunk in routes.sent_together)
    assert set(sent.values()) <= {1}
    assert set(sent) == {(sender, part, r.rank) for r in everyone for part, sender in r.incoming.items()}
    for routes in everyone:
        received = {
            part: folded(
                [(routes.block(own), tree(*vars(routes.block(own)).values())) for own in routes.parts[part].of]
            )
            for part in routes.incoming
        }
        assert all(len(sums) == 1 for sums in received.values()), "a part is one sum"
        addends = [
            (block, received[source][0] if isinstance(source, int) else tree(block.start, block.size))
            for block, source in routes.addends
        ]
        assert all(source[0] in routes.team for _, source in routes.addends if not isinstance(source, int))
        assert folded(addends) == [tree(0, placement.shards)]


@given(cases())
def test_a_total_comes_to_each_other_machine_once(case):
    placement, teams = case
    everyone = [Routes(placement, teams, rank) for rank in range(placement.workers)]
    told = {(routes.rank, to) for routes in everyone for to in routes.totals_to}
    assert told == {(chunk, routes.rank) for routes in everyone for chunk in routes.totals_from}
    for team in teams:
        assert Counter(chunk for chunk, to in told if to in team) == {
            r: 1 for r in range(placement.workers) if r not in team
        }


def test_what_a_machine_can_add_is_sent_as_one():
    placement = even_placement(16, 4)
    assert [part.block for part in parts_of(placement, [0, 1])] == [Block(0, 8)]
    assert [part.block for part in parts_of(placement, [1, 2])] == [Block(4, 4), Block(8, 4)]
    routes = Routes(placement, [[0, 1], [2, 3]], 0)
    assert routes.incoming == {1: 2}
    assert routes.sent_together == [(0, 2)]
    assert (routes.totals_to, routes.totals_from) == ([2], [2])


def test_the_work_for_others_is_spread():
    """Of four workers on one machine and eight elsewhere, each handles two."""
    assert sorted(Counter(agent([0, 1, 2, 3], chunk, 12) for chunk in range(4, 12)).values()) == [2, 2, 2, 2]
    assert sorted(Counter(agent([4, 5, 6], chunk, 5 + 3) for chunk in (0, 1, 2, 3, 7)).values()) == [1, 2, 2]
    assert len({agent([0, 1, 2, 3], chunk, 6) for chunk in (4, 5)}) == 2
