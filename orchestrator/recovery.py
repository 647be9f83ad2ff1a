"""Who trains next: members, generations and limits. Facts and times come in, decisions go out; there is no clock here.

A member is a worker process with its training state. It sits in a generation until that ends: at a step boundary
(a pause: somebody joins or leaves) or in the middle of a step (somebody is lost). Then all that are left come back
for a seat in the next one.
"""

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

SETTLE_S = 0.3  # joiners that come together are seated together
GATHER_S = 3.0  # after the last of the survivors of a coordinator has come
START_GRACE_S = 30.0  # after the last joiner a run starts with fewer than it expected
SILENCE_FLOOR_S = 5.0
STALL_STEPS = 20  # a worker that is silent, or stuck in a shard, for as long as this many steps is lost
FIRST_STEP_S = 300.0  # nothing is known of step times yet: kernels are loaded, a loader starts
FLAPS, FLAP_WINDOW_S, LEFT_OUT_S = 3, 600.0, 60.0


@dataclass(frozen=True)
class Holding:
    """Which of how many parts of the state a member has.

    Attributes:
        whole: whether it took all of them along from a step boundary.
        saved: whether a checkpoint was written there.
    """

    part: int = 0
    parts: int = 1
    whole: bool = False
    saved: bool = False

    @property
    def settled(self) -> bool:
        """Whether it takes no others to stop with this state: it is in one hand, or in storage."""
        return self.saved or self.parts == 1


@dataclass(frozen=True)
class Member:
    """A worker process as it asks for a seat.

    Attributes:
        id: unique to the process.
        step: number of committed steps that its state has; -1: it has none.
        rank: in its last generation; -1: it was in none.
        store: host and port of the TCPStore that it serves.
        host: address of its machine, which stays when a node comes back under another id.
        speed: of its machine, as declared: how many times that of others; 0: nothing is said of it.
        holds: what its state is.
        slice, place: the TPU slice that it belongs to, with which it comes and goes, and where there; "": to none.
    """

    id: str
    node: str
    pid: int
    device: str
    step: int
    rank: int
    store: tuple[str, int]
    host: str = ""
    speed: float = 0.0
    holds: Holding = Holding()
    slice: str = ""
    place: int = 0

    @property
    def home(self) -> str:
        """What flaps."""
        return self.host or self.node


@dataclass
class Roster:
    """The members of a run and the generation they are in.

    Args:
        minimum: workers without which training waits.
        maximum: workers beyond which nobody is seated.
        expected: workers that the first generation waits for.
        gather: whether workers with state are expected too, for an earlier coordinator was lost.
        size: workers of a replica group in this generation.
        saved: step of the newest checkpoint; -1: there is none.
    """

    minimum: int
    maximum: int
    expected: int
    generation: int = 0
    gather: bool = False
    size: int = 1
    saved: int = -1
    ready: dict[str, Member] = field(default_factory=dict)
    seated: dict[str, Member] = field(default_factory=dict)
    training: bool = False
    draining: frozenset[str] = frozenset()
    left_out: dict[str, float] = field(default_factory=dict)
    unwanted: set[str] = field(default_factory=set)
    _slow: dict[str, float] = field(default_factory=dict)
    _joined_s: float = 0.0
    _losses: dict[str, deque[float]] = field(default_factory=dict)
    _out_s: dict[str, float] = field(default_factory=dict)
    _lost_in: dict[str, int] = field(default_factory=dict)

    @property
    def drained(self) -> bool:
        """Whether somebody trains on a node that will go."""
        return any(self._going(m) for m in self.seated.values())

    @property
    def by_rank(self) -> list[Member]:
        """Who trains."""
        return sorted(self.seated.values(), key=lambda m: m.rank)

    @property
    def everyone(self) -> list[Member]:
        """Who trains, and who waits for a seat."""
        return [*self.seated.values(), *self.ready.values()]

    def shift(self, by_s: float) -> None:
        """The clock was put, or the coordinator was held up: what is remembered is as long ago as before."""
        self._joined_s += by_s

    def join(self, member: Member, now: float) -> None:
        """A member asks for a seat; one that sat in the generation ends it by that."""
        if self.seated.pop(member.id, None):
            self.training = False
        else:
            self._joined_s = now
        self.ready[member.id] = member

    def lose(self, member_id: str) -> Member | None:
        """A member is gone; returns it if it sat in the generation."""
        self.ready.pop(member_id, None)
        member = self.seated.pop(member_id, None)
        self.training &= member is None
        return member

    def lost_on(self, home: str, now: float, generation: int = -1) -> None:
        """A machine lost workers: one that keeps doing so is left out for a while, each time for longer.

        The window in which losses are counted stands still while it is left out: it cannot fail then.

        Args:
            generation: in which it lost them, all of them once; -1: not known.
        """
        if generation >= 0 and self._lost_in.get(home) == generation:
            return
        self._lost_in[home] = generation
        until, out_s = self.left_out.get(home, 0.0), self._out_s.get(home, 0.0)
        used_s = now - out_s + max(0.0, until - now)
        losses = self._losses.setdefault(home, deque(maxlen=64))
        losses.append(used_s)
        recent = sum(used_s - t < FLAP_WINDOW_S for t in losses)
        if recent >= FLAPS:
            self.left_out[home] = now + LEFT_OUT_S * 2 ** min(recent - FLAPS, 4)
            self._out_s[home] = out_s + max(0.0, self.left_out[home] - max(now, until))

    def dismiss(self, member: Member, now: float) -> None:
        """A member is to leave at the next step boundary, for the run is better off without its machine."""
        self.unwanted.add(member.id)
        self.left_out[member.home] = self._slow[member.home] = now + LEFT_OUT_S * 8

    def form(self, now: float) -> list[Member] | None:
        """The members of the next generation in rank order, who are seated by this; None: not yet."""
        candidates = [] if self.training or self.seated else self._candidates(now)
        if len(candidates) < self.minimum or not candidates:
            return None
        fresh = all(m.step < 0 for m in candidates)
        settled = now - self._joined_s >= (START_GRACE_S if fresh else GATHER_S)
        there = sum(m.step >= 0 for m in candidates) if self.gather else len(candidates)
        if (fresh or self.gather) and there < self.expected and not settled:
            return None
        self.gather = False
        # State comes from rank 0, which has the most steps; otherwise ranks stay as they were.
        order = self._ranked(self._choose(candidates, now))
        self.seated = {m.id: m for m in order}
        self.ready = {key: m for key, m in self.ready.items() if key not in self.seated}
        self.generation += 1
        self.training = True
        return order

    def gathered(self, since_s: float, now: float) -> bool:
        """Whether those that an earlier coordinator had are back, as far as they come; `since_s`: its successor."""
        if not self.ready:
            return now - since_s >= START_GRACE_S
        back = sum(m.step >= 0 for m in self.ready.values())
        return not self.gather or back >= self.expected or now - self._joined_s >= GATHER_S

    def _ranked(self, members: list[Member]) -> list[Member]:
        """The members that sit, in rank order."""
        return beside_each_other(sorted(members, key=lambda m: (-m.step, m.rank < 0, m.rank)))

    def _there(self) -> list[Member]:
        """Those that wait for a seat and could have one."""
        return list(self.ready.values())

    def _going(self, member: Member) -> bool:
        """Whether a member's machine will be taken away."""
        return member.node in self.draining

    def _candidates(self, now: float) -> list[Member]:
        """Those that may sit: on nodes that stay, unless only the others have the state or the number."""
        everyone = self._there()
        staying = [m for m in everyone if not self._avoided(m, now)]
        newest = max((m.step for m in everyone), default=-1)
        enough = len(staying) >= self.minimum and any(m.step == newest for m in staying)
        return staying if enough else everyone

    def _choose(self, candidates: list[Member], now: float) -> list[Member]:
        """The `maximum` that sit: those that stay before those that leave, but one with the newest state."""
        order = sorted(candidates, key=lambda m: (self._avoided(m, now), -m.step, m.rank < 0, m.rank))
        chosen, newest = order[: self.maximum], max(candidates, key=lambda m: m.step)
        return chosen if any(m.step == newest.step for m in chosen) else [newest, *chosen[:-1]]

    def _avoided(self, member: Member, now: float) -> bool:
        # Who is new where one was dismissed would have its place: no machine's fault that others of it train well.
        if self._going(member) or (member.rank < 0 and self._slow.get(member.home, 0.0) > now):
            return True
        if self.left_out.get(member.home, 0.0) <= now:
            return False
        # A machine that others train on is in use anyway.
        return not any(m.home == member.home and m.step >= 0 for m in (*self.seated.values(), *self.ready.values()))

    def wants_pause(self, now: float) -> bool:
        """Whether the generation should end at its next step boundary, for another one would be better."""
        if not self.training:
            return False
        staying = [m for m in self.seated.values() if not self._going(m)]
        joining = [m for m in self._there() if not self._avoided(m, now)]
        leaves = len(staying) < len(self.seated) and len(staying) + len(joining) >= self.minimum
        room = len(self.seated) < self.maximum
        grows = bool(joining) and (room or leaves) and now - self._joined_s >= SETTLE_S
        return grows or (leaves and bool(staying))  # with none left, joiners are seated beside the leaving first

    @property
    def saves(self) -> bool:
        """Whether a pause has to write the state down: nobody who stays could take it along."""
        return False

    def must_leave(self, member: Member) -> bool:
        """Whether a member that came back has to go: it is unwanted, or its node goes, and others hold its state."""
        if not self._leaves(member):
            return False
        others = [m for m in (*self.ready.values(), *self.seated.values()) if not self._leaves(m)]
        return len(others) >= self.minimum and any(m.step >= member.step for m in others)

    def _leaves(self, member: Member) -> bool:
        return self._going(member) or member.id in self.unwanted

    def by_state(self) -> list[Member]:
        """Those who wait for a seat, one that can stop with the newest state first; none where nobody can alone."""
        order = sorted(self.ready.values(), key=lambda m: (-m.step, not m.holds.settled, m.rank))
        return order if order and order[0].step >= 0 and order[0].holds.settled else []

    def missing(self) -> int:
        """How many more members training waits for."""
        there = len(self._there()) + len(self.seated)
        wanted = self.expected if not self.generation else self.minimum
        return max(0, wanted - there)

    @property
    def misses(self) -> bool:
        """Whether anybody is waited for."""
        return self.missing() > 0 or self.gather


def beside_each_other(members: list[Member]) -> list[Member]:
    """The same order, but those of one node together: neighbouring shards meet before they cross the network."""
    nodes = {node: number for number, node in enumerate(dict.fromkeys(m.node for m in members))}
    return sorted(members, key=lambda m: nodes[m.node])


def stall_limit_s(given_s: float, step_s: Iterable[float], begun: bool) -> float:
    """Seconds without a sign of life, or of progress, after which a worker is given up.

    Args:
        given_s: as configured; 0: derived from the run's own steps.
        step_s: seconds of recent steps.
        begun: whether the generation has committed a step.
    """
    if given_s:
        return given_s
    recent = list(step_s)
    if not begun or not recent:
        return FIRST_STEP_S
    return max(SILENCE_FLOOR_S, STALL_STEPS * statistics.median(recent))


def silence_limit_s(given_s: float, step_s: Iterable[float]) -> float:
    """Seconds without a heartbeat after which a worker is given up; heartbeats do not wait for steps."""
    if given_s:
        return given_s
    recent = list(step_s)
    return min(30.0, max(SILENCE_FLOOR_S, 2 * statistics.median(recent))) if recent else 30.0
