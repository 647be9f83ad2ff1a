"""How much of a step goes to waiting for samples: on whichever worker, for the others wait for it in the reduction."""

import time

import pytest
from distributed import run_distributed
from hypothesis import given
from hypothesis import strategies as st
from toys import Recorder, ToySamples, ToyWorkload, toy_plan, toy_state

from orchestrator.group import Group
from orchestrator.loop import train
from orchestrator.shards import even_placement
from orchestrator.state import weights_sha256
from orchestrator.step import of_the_slowest

LATE_S = 0.1
SECONDS = st.floats(0, 100)


@given(own=SECONDS, others=st.lists(SECONDS, max_size=5), reduce_s=SECONDS)
def test_time_is_neither_lost_nor_found(own, others, reduce_s):
    data_s, reduced_s = of_the_slowest(own, [own, *others], reduce_s)
    assert data_s == max(own, *others, 0.0)
    assert 0 <= reduced_s <= reduce_s
    if data_s == own:
        assert reduced_s == reduce_s
    elif reduced_s:
        assert data_s + reduced_s == pytest.approx(own + reduce_s)


class Timed(Recorder):
    """Notes what a step's seconds went to."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = []

    def committed(self, state, totals, lr):
        super().committed(state, totals, lr)
        self.parts.append((totals.data_s, totals.reduce_s))


def seconds_with_a_slow_disk(group: Group, reduce: str) -> tuple[list[tuple[float, float]], str]:
    """Rank 1's samples come late."""
    plan = toy_plan(steps=2, reduce=reduce, ragged=False)
    state, timed, read = toy_state(plan), Timed(), ToySamples.microbatch

    def late(samples, *given):
        time.sleep(LATE_S if group.rank else 0.0)  # what a disk takes, not a wait for anything
        return read(samples, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ToySamples, "microbatch", late)
        train(plan, ToyWorkload(plan.config), state, group, even_placement(8, 2), timed)
    return timed.parts, weights_sha256(state.model)


@pytest.mark.parametrize(("reduce", "reads"), [("fixed", 4), ("ddp", 1)])
def test_a_slow_disk_of_one_worker_is_seen_by_all(reduce, reads):
    (first, weights), (second, others) = run_distributed(seconds_with_a_slow_disk, 2, reduce)
    assert weights == others
    for (data_s, _), (late_s, _) in zip(first, second, strict=True):
        assert data_s == pytest.approx(late_s, abs=1e-4)
        assert data_s >= reads * LATE_S
