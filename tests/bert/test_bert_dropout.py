"""Which values dropout takes, how often, and that the rest keep the mean."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from workloads.bert.dropout import LEVELS, Dropout, drop

RATES = (0.0001, 0.1, 0.5, 0.9)


def dropped(values: Tensor, rate: float, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return drop(values, rate)


@given(shape=st.lists(st.integers(0, 7), max_size=4), rate=st.floats(0, 0.9), seed=st.integers(0, 99))
def test_each_value_goes_or_is_scaled_and_so_is_its_gradient(shape, rate, seed):
    values = torch.rand(shape).add_(1).requires_grad_()
    found = dropped(values, rate, seed)
    found.sum().backward()
    scale = LEVELS / (LEVELS - round(rate * LEVELS))
    kept = found != 0
    assert torch.equal(found, torch.where(kept, values * torch.tensor(scale), 0))
    assert torch.equal(values.grad, kept * torch.tensor(scale))
    assert torch.equal(found, dropped(values, rate, seed))


@pytest.mark.parametrize("rate", RATES)
def test_as_many_go_as_the_rate_says(rate):
    """Of a million, within five standard deviations; by rows and columns alike, and one after another independently."""
    size = 1000
    gone = dropped(torch.ones(size, size), rate, 0) == 0
    deviation = math.sqrt(rate * (1 - rate))
    assert abs(gone.float().mean() - rate) < 5 * deviation / size + 1 / LEVELS
    for by in (0, 1):
        assert (gone.float().mean(by) - rate).abs().max() < 6 * deviation / math.sqrt(size) + 6 / size
    for apart in (1, 2, 3, 4):
        both = (gone.flatten()[apart:] & gone.flatten()[:-apart]).float().mean()
        assert abs(both - rate**2) < 6 * rate / size + 2 / LEVELS, f"{apart} apart"


@pytest.mark.parametrize("rate", RATES)
def test_the_mean_stays(rate):
    kept = 1 - rate
    mean = dropped(torch.ones(1000, 1000, dtype=torch.float64), rate, 1).mean()
    assert abs(mean - 1) < 5 * math.sqrt(rate / kept) / 1000


def test_bits_depend_on_the_seed_and_not_on_the_threads():
    values, before = torch.ones(64, 1024), torch.get_num_threads()
    one = dropped(values, 0.1, 3)
    try:
        torch.set_num_threads(4)
        assert torch.equal(one, dropped(values, 0.1, 3))
    finally:
        torch.set_num_threads(before)
    assert not torch.equal(one, dropped(values, 0.1, 4))
    torch.manual_seed(3)
    assert torch.equal(one, drop(values, 0.1))
    assert not torch.equal(one, drop(values, 0.1)), "the next draw is another"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_dtype_stays(dtype):
    assert drop(torch.ones(8, dtype=dtype), 0.5).dtype == dtype


def test_compiled_it_is_torch_s_own(monkeypatch):
    """Whose draws the compiler can fuse; nothing is traced here, for that takes half a minute."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = dropped(torch.ones(999), 0.1, 0)
    torch.manual_seed(0)
    assert torch.equal(found, F.dropout(torch.ones(999), 0.1))


def test_nothing_is_drawn_in_evaluation_nor_at_a_rate_of_0():
    values = torch.ones(8)
    torch.manual_seed(0)
    assert Dropout(0.5).eval()(values) is values
    assert Dropout(0.0)(values) is values
    state = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)
