"""Our run on a cluster whose nodes fail: driven by the orchestrator's real Roster on a simulated clock.

It is driven as membership.py does it: who is seated, when a generation ends for joiners, which machines are left out,
are the Roster's decisions. Every worker has the whole state: a committed step is never lost while one of them is left.
"""

import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from cluster_model import Cluster, Costs, Ledger, Outage

from orchestrator.recovery import SETTLE_S, Member, Roster

TICK_S = 0.1  # membership.py looks after time so often


class Elastic:
    """Our run, one generation after the other: membership.py without the network."""

    def __init__(self, cluster: Cluster, costs: Costs, absences: Sequence[Outage]) -> None:
        self._cluster, self._costs, self._ledger = cluster, costs, Ledger(cluster)
        self.roster = Roster(cluster.least, cluster.nodes, cluster.nodes)
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        self._now = self._begun_s = self._joined_s = self._looks_s = 0.0
        self._cause, self._pausing = "waiting", False
        self._stretch = self._training = 0  # events of an earlier stretch are stale; workers that train
        self._workers: dict[int, str] = {}  # on the nodes that are up
        for node in range(cluster.nodes):
            self._join(node)
        for absence in absences:
            if absence.notice_s < absence.down_s:
                self._at(absence.notice_s, self._notice, absence.node)
            self._at(absence.down_s, self._fall, absence.node)
            self._at(absence.up_s, self._come, absence.node)

    def run(self) -> Ledger:
        """From a start with all nodes, which costs nothing here, to the end."""
        self._seat([])
        while self._events:
            at, _, act, arguments = heapq.heappop(self._events)
            self._pass(at)
            act(*arguments)
        self._pass(self._cluster.end_s)
        return self._ledger

    def _at(self, time_s: float, act: Callable[..., None], *arguments: Any) -> None:
        if time_s < self._cluster.end_s:
            heapq.heappush(self._events, (time_s, next(self._numbers), act, arguments))

    def _pass(self, to: float) -> None:
        self._ledger.spend(to - self._now, self._training, self._cause)
        self._now = to

    def _join(self, node: int) -> None:
        name = self._workers[node] = f"worker {next(self._numbers)}"
        self.roster.join(Member(name, f"node {node}", 1, "cpu", -1, -1, ("", 1), f"host {node}"), self._now)
        self._joined_s = self._now

    def _notice(self, node: int) -> None:
        self.roster.draining |= {f"node {node}"}
        self._look()

    def _fall(self, node: int) -> None:
        """A node is gone; that is known later."""
        self.roster.draining -= {f"node {node}"}
        name = self._workers.pop(node)
        if name in self.roster.seated:
            if self._cause == "useful":
                self._ledger.turn(self._uncommitted_s(), self._training, "recompute")
            self._cause, self._training, self._stretch = "detect", self._training - 1, self._stretch + 1
        self._at(self._now + self._costs.detect_s, self._lose, name)

    def _lose(self, name: str) -> None:
        member = self.roster.lose(name)
        if member:
            self.roster.lost_on(member.home, self._now)
            self._come_back()
        self._seat(["regroup", "restore", "recompute"])

    def _come(self, node: int) -> None:
        self._join(node)
        self._look()
        self._seat([])

    def _come_back(self) -> None:
        """Whoever sits and is alive asks for a seat in the next generation.

        They all have the same steps, and more than a joiner: 0 stands for any number, -1 for none.
        """
        alive = set(self._workers.values())
        for member in [m for m in self.roster.seated.values() if m.id in alive]:
            self.roster.join(member, self._now)

    def _seat(self, stalls: list[str]) -> None:
        """Form the next generation if all are there who should be; it trains after `stalls`."""
        roster = self.roster
        if roster.training or roster.seated:
            return
        for member in [m for m in roster.ready.values() if roster.must_leave(m)]:
            del roster.ready[member.id]
        if roster.generation and all(m.step < 0 for m in roster.ready.values()):
            raise ValueError("all workers were lost at once, which is not simulated: take more nodes or fewer failures")
        order, alive = roster.form(self._now), set(self._workers.values())
        self._stretch += 1
        if order is None:
            self._cause, self._training = "waiting", len(alive & roster.ready.keys())
            return
        if roster.generation > 1 and any(m.step < 0 for m in order):
            stalls = [*(stall for stall in stalls if stall != "drain"), "join"]
        for rank, member in enumerate(order):
            if member.rank != rank:
                roster.seated[member.id] = dataclasses.replace(member, rank=rank, step=0)
        self._training = len(alive & roster.seated.keys())
        if self._training < len(order):  # a joiner fell before it was seated, and nobody knows
            self._cause = "detect"
        else:
            self._stall(self._stretch, stalls)

    def _stall(self, stretch: int, stalls: list[str]) -> None:
        """Stand still for the first, then for the others, then train."""
        if stretch != self._stretch:
            return
        if stalls:
            self._cause = stalls[0]
            self._at(self._now + getattr(self._costs, f"{stalls[0]}_s"), self._stall, stretch, stalls[1:])
            return
        self._cause, self._begun_s, self._pausing = "useful", self._now, False
        self._look()

    @property
    def _step_s(self) -> float:
        return self._cluster.step_s * self._cluster.nodes / self._training

    def _uncommitted_s(self) -> float:
        """Seconds since the last step."""
        steps = (self._now - self._begun_s) / self._step_s
        return max(0.0, steps - int(steps + 1e-9)) * self._step_s

    def _look(self) -> None:
        """Whether the generation should end; if somebody is there who may want that later, look again then."""
        if self._cause != "useful" or self._pausing:
            return  # when the next stretch begins, it looks again
        if self.roster.wants_pause(self._now):
            self._pausing = True
            steps = math.ceil((self._now - self._begun_s) / self._step_s - 1e-9)
            self._at(self._begun_s + steps * self._step_s, self._pause, self._stretch)
        elif self.roster.ready:
            until = [self.roster.left_out.get(m.home, 0.0) for m in self.roster.ready.values()]
            later = [at + TICK_S for at in (self._joined_s + SETTLE_S, *until) if at + TICK_S > self._now]
            if later and not self._now < self._looks_s <= min(later):
                self._looks_s = min(later)
                self._at(self._looks_s, self._look)

    def _pause(self, stretch: int) -> None:
        """A step boundary."""
        if stretch == self._stretch:
            self._come_back()
            self._seat(["drain"])
