"""Coroutines that nobody waits for."""

import asyncio
import traceback
from collections.abc import Callable, Coroutine
from typing import Any


async def notify_all(condition: asyncio.Condition) -> None:
    """Let everyone who waits for it look again."""
    async with condition:
        condition.notify_all()


class Background:
    """Runs coroutines in the background of the running loop; `told` gets the traceback of what one raises."""

    def __init__(self, told: Callable[[str], None]) -> None:
        self._told = told
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin; returns at once."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._told("".join(traceback.format_exception(error)))
