"""Memory that workers of one machine share, and who those are."""

from pathlib import Path

import pytest
import torch
from distributed import run_distributed

from orchestrator import sharedmemory
from orchestrator.group import Group


def share_and_look(group: Group, lie: str) -> tuple[list[list[int]], list[float], int]:
    """The teams; what a team sees after each has written its rank into its own vector and 10 into everybody's."""
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    own = sharedmemory._create
    with pytest.MonkeyPatch.context() as patch:
        if group.rank == 1 and lie == "no memory":
            patch.setattr(sharedmemory, "_create", lambda floats: None)
        if group.rank == 1 and lie == "another process":
            patch.setattr(sharedmemory, "_create", lambda floats: (*own(floats)[:3], bytes(64)))
        if group.rank == 1 and lie == "another network":
            patch.setattr(sharedmemory, "_network", lambda: 1)
        teams, vectors = sharedmemory.share(group, [3 + rank for rank in range(group.world)])
    left = len(list(Path("/proc/self/fd").iterdir())) - descriptors
    vectors[group.rank].fill_(group.rank)
    group.sum(torch.zeros(1))
    for vector in vectors.values():
        vector[group.rank] += 10
    group.sum(torch.zeros(1))
    return teams, [float(x) for rank in sorted(vectors) for x in vectors[rank]], left


def test_shared_memory_is_shared():
    expected = [10.0, 10, 10, 11, 11, 11, 1, 12, 12, 12, 2, 2]
    for teams, seen, _ in run_distributed(share_and_look, 3, "nothing"):
        assert teams == [[0, 1, 2]]
        assert seen == expected


@pytest.mark.parametrize("lie", ["no memory", "another process", "another network"])
def test_memory_that_one_cannot_open_is_shared_by_the_others(lie):
    found = run_distributed(share_and_look, 3, lie)
    assert [seen for _, seen, _ in found] == [
        [10.0, 0, 10, 12, 2, 12, 2, 2],
        [1.0, 11, 1, 1],
        [10.0, 0, 10, 12, 2, 12, 2, 2],
    ]
    for teams, seen, left in found:
        assert teams == [[0, 2], [1]]
        assert left <= (2 if len(seen) > 4 else 0), "a descriptor for each vector that is shared"


@pytest.mark.parametrize(
    ("seen", "teams"),
    [
        ([[0, 1], [0, 1], [2]], [[0, 1], [2]]),
        ([[0, 1], [1], [2]], [[0], [1], [2]]),  # one sees the other, who does not see it
        ([[0, 1], [0, 1, 2], [1, 2]], [[0, 1], [2]]),  # 1 sees two that do not see each other
        ([[], [1, 2], [1, 2]], [[0], [1, 2]]),
    ],
)
def test_a_team_are_those_that_all_see_each_other(seen, teams):
    assert sharedmemory._teams(seen) == teams
