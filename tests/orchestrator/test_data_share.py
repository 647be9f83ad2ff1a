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


@given(own=SECONDS, others=st.lists(SECONDS, max_size=5), among=SECONDS)
def test_time_is_neither_lost_nor_found(own, others, among):
    data_s, left_s = of_the_slowest(own, [own, *others], among)
    assert own <= data_s <= max(own, *others, 0.0) + 1e-9
    assert 0 <= left_s <= among
    assert data_s + left_s == pytest.approx(own + among)
    assert not left_s or data_s == pytest.approx(max(own, *others, 0.0)), "all of it is known"


class Timed(Recorder):
    """Notes what a step's seconds went to."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = []

    def committed(self, state, totals, lr):
        super().committed(state, totals, lr)
        self.parts.append((totals.data_s, totals.data_s + totals.compute_s + totals.reduce_s))


def seconds_with_a_slow_disk(group: Group, reduce: str) -> tuple[list[tuple[float, float]], str]:
    """Of each step: those that go to data, and all; rank 1's samples come late."""
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
    for (data_s, all_s), (late_s, late_all_s) in zip(first, second, strict=True):
        assert late_s >= reads * LATE_S
        assert data_s >= 0.9 * reads * LATE_S
        assert all_s == pytest.approx(late_all_s, rel=0.2), "no second counts twice"
