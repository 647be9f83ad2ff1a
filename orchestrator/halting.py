"""Waits of the command's own part in the training, which end when the command does."""

import asyncio
import threading
import time
from collections.abc import Callable

LOOK_S = 0.5  # how soon a wait sees that the command ends
halted = threading.Event()


def check() -> None:
    """Raises asyncio.CancelledError when the command ends: Ray Train lets it through."""
    if halted.is_set():
        raise asyncio.CancelledError


def wait(look: Callable[[float], bool], timeout_s: float) -> bool:
    """Whether `look` is true in time; it gets the seconds that it may take. Raises as `check`."""
    until = time.monotonic() + timeout_s
    while True:
        check()
        rest_s = until - time.monotonic()
        if look(max(0.0, min(LOOK_S, rest_s))):
            return True
        if rest_s <= 0:
            return False
