"""The look at the clock that a coordinator takes ten times a second, and what clocks may do meanwhile."""

import asyncio
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.channel import DESK_SILENT_S, PING_S, Beat, Pulse
from orchestrator.recovery import silence_limit_s, stall_limit_s

TICK_S = 0.1
COME_BACK_S = 10.0
STILL_S = 120.0  # all workers wait for each other: longer than any storage is waited for by itself
LEADS_S = 30.0  # without a heartbeat of who writes down the state of a stop
HELD_UP_S = 1.0  # a look that comes so late was held up, or the clock was put


class Timekeeper:
    """Calls `look` with the time, and `ping` every second, until `over`.

    Args:
        shift: gets the seconds by which all that is remembered has to move: nobody can be blamed for them.
        told: gets the traceback of a look that failed, once for each error; the next look is taken all the same.
    """

    def __init__(
        self,
        over: Callable[[], bool],
        look: Callable[[float], Any],
        ping: Callable[[], Any],
        shift: Callable[[float], Any],
        told: Callable[[str], Any],
    ) -> None:
        self._over, self._look, self._ping, self._shift, self._told = over, look, ping, shift, told
        self._failed = ""

    async def run(self) -> None:
        """See the class."""
        last = pinged = time.time()
        while not self._over():
            await asyncio.sleep(TICK_S)
            now = time.time()
            if not 0.0 <= now - last <= HELD_UP_S:
                self._shift(now - last)
                pinged += now - last
            last = now
            try:
                if now - pinged > PING_S:
                    self._ping()
                    pinged = now
                self._look(now)
            except Exception as error:
                if repr(error) != self._failed:
                    self._failed = repr(error)
                    self._told(traceback.format_exc())


def shifted(stamp_s: float, by_s: float) -> float:
    """A moment by the clock as it was put since the last look, by `by_s`; one that was noted after that stays."""
    now = time.time()
    if by_s > 0:
        return min(stamp_s + by_s, now)
    return stamp_s + by_s if stamp_s > now else stamp_s


def judge(pulse: Pulse, now: float, silence_s: float, stall_s: float, back_s: float | None) -> tuple[str, str] | None:
    """(kind of incident, what happened) of a worker that has to be given up; None: it is well.

    Args:
        silence_s, stall_s: seconds without a heartbeat, or without progress of one that does not wait.
        back_s: for how long it has been asked to come back; None: it has not been.
    """
    silent_s, still_s = now - pulse.heard_s, now - pulse.moved_s
    if silent_s > silence_s:
        return "worker_frozen", f"no heartbeat for {silent_s:.1f} s"
    if not pulse.beat.waiting and still_s > stall_s:
        return "worker_stuck", f"no progress for {still_s:.1f} s"
    if back_s is not None and back_s > max(stall_s, COME_BACK_S):
        return "worker_stuck", f"did not come back for {back_s:.1f} s"
    return None


def limits_s(
    given_s: float, steps_s: Sequence[float], begun: bool, heard_s: Sequence[float], now: float
) -> tuple[float, float]:
    """Seconds without a heartbeat, and without progress, after which a worker is given up.

    Where nobody at all is heard, it is the coordinator's own line: workers take that for lost after DESK_SILENT_S, and
    get as long again to come back. Nodes that are really gone are missed by Ray.

    Args:
        given_s, steps_s, begun: see recovery.stall_limit_s.
        heard_s: when each worker was last heard, those that wait for a seat too.
    """
    silence_s = silence_limit_s(given_s, steps_s)
    if not given_s and len(heard_s) > 1 and now - max(heard_s) > silence_s / 2:
        silence_s = max(silence_s, 2 * DESK_SILENT_S)
    return silence_s, stall_limit_s(given_s, steps_s, begun)


@dataclass
class Stillness:
    """For how long all workers of a generation have waited for each other."""

    _since_s: float = 0.0
    _at: tuple[tuple[int, int, int], ...] = ()

    def seconds(self, now: float, beats: Sequence[Beat]) -> float:
        """Asked at every look; 0.0 if one of them has got on, or does not wait, or for storage."""
        at = tuple((beat.generation, beat.step, beat.place) for beat in beats)
        if at != self._at or not beats or not all(map(_stands, beats)) or now < self._since_s:
            self._since_s, self._at = now, at
        return now - self._since_s


def _stands(beat: Beat) -> bool:
    return beat.waiting and not beat.reading
