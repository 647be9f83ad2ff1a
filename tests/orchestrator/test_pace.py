"""How fast steps were taken: rates of late, and the seconds of those that count."""

import pytest

from orchestrator.pace import WINDOW_S, Pace


def records(first: int, times: list[float], samples: int = 64, step_s: float = 1.0) -> list[dict]:
    return [
        {"step": first + i, "time_s": time_s, "samples": samples, "step_s": step_s} for i, time_s in enumerate(times)
    ]


def test_nothing_is_known_before_two_times():
    pace = Pace()
    assert pace.rates() == (0.0, 0.0)
    pace.take(records(1, [5.0]))
    assert pace.rates() == (0.0, 0.0)
    pace.take(records(2, [5.0, 5.0]))
    assert pace.rates() == (0.0, 0.0)


def test_steps_slower_than_the_window_have_a_rate():
    pace = Pace()
    pace.take(records(1, [100.0, 130.0, 150.0]))
    assert pace.rates() == (64 / 20, 1 / 20)


def test_quick_steps_are_averaged_over_the_window():
    pace = Pace()
    pace.take(records(1, [i / 4 for i in range(100)]))
    samples, steps = pace.rates()
    assert steps == pytest.approx(4.0)
    assert samples == pytest.approx(256.0)
    pace.take(records(101, [24.75 + i for i in range(1, 11)]))
    assert pace.rates()[1] == pytest.approx(1.0), "what is older than the window has gone"
    assert WINDOW_S == 10.0


@pytest.mark.parametrize("round_s", [1.0, 4.0, 6.0, 11.0, 60.0])
def test_rounds_whose_steps_come_at_one_time(round_s):
    pace = Pace()
    for number in range(20):
        pace.take(records(1 + 8 * number, [100 + number * round_s] * 8))
        rate = pace.rates()[0]
        assert rate == pytest.approx(8 * 64 / round_s if number else 0.0)


def test_a_new_generation_has_a_rate_of_its_own():
    pace = Pace()
    pace.take(records(1, [1.0, 2.0]))
    pace.begin()
    assert pace.rates() == (0.0, 0.0)
    pace.take(records(3, [8.0, 8.5]))
    assert pace.rates()[1] == 2.0
    assert pace.seconds == 4.0


def test_steps_that_are_taken_again_count_once():
    pace = Pace()
    pace.take(records(101, [1.0, 2.0, 3.0, 4.0], step_s=2.0))
    pace.cut(102)
    assert pace.seconds == 4.0
    pace.take(records(103, [9.0], step_s=0.5))
    assert pace.seconds == 4.5
    pace.cut(50)
    assert pace.seconds == 0.0
    pace.take(records(51, [10.0, 11.0], step_s=3.0))
    pace.cut(51)
    assert pace.seconds == 3.0
    pace.cut(80)
    assert pace.seconds == 3.0
