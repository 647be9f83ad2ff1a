"""Waits that end with the command."""

import asyncio
from collections.abc import Iterator

import pytest

from orchestrator import halting


@pytest.fixture(autouse=True)
def going_on() -> Iterator[None]:
    halting.halted.clear()
    yield
    halting.halted.clear()


def test_what_is_there_is_seen_at_once_and_what_is_not_in_time():
    assert halting.wait(lambda _: True, 0.0)
    spent: list[float] = []
    assert not halting.wait(lambda seconds: bool(spent.append(seconds)), 0.0)
    assert spent == [0.0], "a last look at the end"


def test_a_wait_ends_when_the_command_does():
    looks: list[float] = []

    def look(seconds: float) -> bool:
        looks.append(seconds)
        if len(looks) == 3:
            halting.halted.set()
        return False

    with pytest.raises(asyncio.CancelledError):
        halting.wait(look, 1000.0)
    assert looks == [halting.LOOK_S] * 3
    with pytest.raises(asyncio.CancelledError):
        halting.check()
