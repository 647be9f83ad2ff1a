"""Watches how fast the workers compute, and says when shards should move; decides by balance.py.

Part of the coordinator.
"""

import statistics
import time
from collections.abc import Sequence

from orchestrator import balance
from orchestrator.channel import Beat
from orchestrator.config import RunConfig
from orchestrator.events import Rebalanced, StragglerFound
from orchestrator.journal import Journal
from orchestrator.layout import group_placement, layout_of
from orchestrator.plan import Plan
from orchestrator.recovery import Member
from orchestrator.shards import Placement, even_placement
from orchestrator.values import Parallel

WHOLE = Parallel()
MOVE_COST_S = 0.5  # until one was measured
SETTLE_STEPS = 5  # of a generation before it is judged: caches are cold
EVERY_S = 1.0  # with thousands of workers each look takes tens of milliseconds
HOLD_S = 3.0  # a better placement has to stay better for so long: what starts beside a worker slows it for a moment
LEAVE_AFTER_S = 20.0  # a straggler that the run is better off without is given so long


def follows_speed(config: RunConfig) -> bool:
    """Whether shards follow the workers' speed."""
    fixed = (config.balance, config.reduce) == ("measured", "fixed") and config.sync != "parameter-server"
    # XLA compiles anew for every number of shards.
    return fixed and not config.parallel.splits and config.accelerator != "tpu"


class Balancer:
    """Measured paces of a run's workers, and the placements that they call for."""

    def __init__(
        self, journal: Journal, shards: int, total_steps: int, enabled: bool, parallel: Parallel = WHOLE
    ) -> None:
        self._parallel = parallel
        self._journal, self._shards, self._total_steps, self._enabled = journal, shards, total_steps, enabled
        self._paces: dict[str, balance.ShardPace] = {}
        self._slow_since: dict[str, float] = {}
        self._measured_s: dict[str, float] = {}  # when each pace was, monotonic
        self._move: balance.Move | None = None
        self._wanted_since = 0.0
        self._begun_at = 0
        self._looked_s = 0.0

    @classmethod
    def of(cls, journal: Journal, plan: Plan) -> "Balancer":
        """For a run of this plan."""
        config = plan.config
        return cls(journal, config.shards, plan.total_steps, follows_speed(config), config.parallel)

    def heard(self, member_id: str, before: Beat, beat: Beat) -> None:
        """A beat of a worker after another one; one of an earlier generation may still be on its way."""
        if not self._enabled or beat.generation < before.generation:
            return
        same = beat.generation == before.generation  # counts begin anew in each
        shards, busy_ms = (before.shards, before.busy_ms) if same else (0, 0)
        if beat.shards > shards and member_id not in self._measured_s:  # its caches are cold
            self._measured_s[member_id] = time.monotonic()
        elif beat.shards > shards:
            pace, now = self._paces.setdefault(member_id, balance.ShardPace()), time.monotonic()
            since_s = now - self._measured_s.get(member_id, now)
            pace.measured(beat.shards - shards, (beat.busy_ms - busy_ms) / 1000, since_s)
            self._measured_s[member_id] = now

    def forget(self, member_id: str) -> None:
        """A worker is gone."""
        for known in (self._paces, self._slow_since, self._measured_s):
            known.pop(member_id, None)

    def _of(self, order: Sequence[Member]) -> list[balance.ShardPace]:
        return [self._paces.get(m.id, balance.ShardPace()) for m in order]

    def placement(self, order: Sequence[Member]) -> Placement:
        """Shards for the members of the next generation, in rank order."""
        self._begun_at, self._wanted_since = self._journal.recorded, 0.0
        if self._parallel.splits:
            return group_placement(self._parallel, layout_of(self._parallel, len(order)), self._shards)
        if not self._enabled:
            return even_placement(self._shards, len(order))
        chosen = balance.placement(self._shards, balance.speeds(self._of(order), [m.speed for m in order]))
        if self._move is not None:
            ranges = [[r.start, r.stop] for r in chosen]
            self._journal.log(Rebalanced(self._journal.recorded, ranges, round(self._move.gain, 4)))
            self._move = None
        return chosen

    def judges(self, now: float) -> bool:
        """Whether it is time to look again, and there is enough to go by."""
        self._begun_at = min(self._begun_at, self._journal.recorded)  # which goes back where a checkpoint is loaded
        settled = self._journal.recorded - self._begun_at >= SETTLE_STEPS
        settled &= len(self._journal.step_seconds()) >= SETTLE_STEPS
        if not (self._enabled and settled) or now - self._looked_s < EVERY_S:
            return False
        self._looked_s = now
        return True

    def wants_move(self, order: Sequence[Member], placement: Placement) -> bool:
        """Whether other shares would pay; then the generation should end at its next step boundary.

        To be asked, as `straggler`, when `judges` says so.
        """
        step_s = statistics.fmean(self._journal.step_seconds()[-SETTLE_STEPS:])
        left = self._total_steps - self._journal.recorded
        counts = [len(part) for part in placement]
        cost_s = self._journal.pause_seconds() or MOVE_COST_S
        move, now = balance.better(counts, self._of(order), step_s, left, cost_s), time.time()
        if move is None:
            self._wanted_since = 0.0
            return False
        self._wanted_since = self._wanted_since or now
        self._move = move if now - self._wanted_since >= HOLD_S else None
        return self._move is not None

    def straggler(self, order: Sequence[Member]) -> Member | None:
        """Report stragglers; returns one that the run is better off without, if it has been so for a while."""
        paces, now = self._of(order), time.time()
        found = {order[s.rank].id: s for s in balance.stragglers(self._shards, paces)}
        for member_id in set(self._slow_since) - set(found):
            del self._slow_since[member_id]
        for member in order:
            slow = found.get(member.id)
            if slow is None:
                continue
            if member.id not in self._slow_since:
                self._slow_since[member.id] = now
                pace = self._paces[member.id]
                slower, cost = round(slow.slower, 3), round(slow.cost, 4)
                where = (member.rank, member.node, member.pid)
                self._journal.log(StragglerFound(*where, round(pace.shard_s, 6), slower, cost, round(now, 3)))
            if slow.worse_than_none and now - self._slow_since[member.id] > LEAVE_AFTER_S:
                return member
        return None
