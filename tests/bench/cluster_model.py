"""A cluster whose nodes fail, what becomes of its time, and a group that recovers by restarting from checkpoints.

Assumed: one worker a node, work in proportion to the workers that train, nodes that fail independently of each other.
"""

import copy
import dataclasses
import json
import math
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
DAY_S = 86_400.0
FLAP_UP_S, FLAP_DOWN_S = 120.0, 30.0  # a flapping machine is up for so long on average, and back after so long
LOSSES = (
    "detect",  # nobody knows of the loss yet
    "regroup",
    "restore",
    "recompute",  # work that has to be done again
    "join",  # all stand still while a joiner is seated
    "drain",  # the same when one leaves in time
    "checkpoint",
    "restart",
    "waiting",  # those that are there stand still until more come
    "missing",  # nodes that are gone, or do not train yet
)


@dataclass(frozen=True)
class Costs:
    """Seconds for which nobody trains, by cause.

    Attributes:
        recompute_s: by which the first step after a loss exceeds a step; what was lost of the step is simulated.
        restart_s: of the whole group, from a loss on.
    """

    detect_s: float
    regroup_s: float
    restore_s: float
    recompute_s: float
    join_s: float
    drain_s: float
    restart_s: float

    def times(self, factor: float) -> "Costs":
        """All of ours slower by a factor."""
        slower = {key: factor * seconds for key, seconds in dataclasses.asdict(self).items()}
        return dataclasses.replace(Costs(**slower), restart_s=self.restart_s)


def measured(reports: Iterable[Path], name: str) -> Costs | None:
    """Medians over all node losses and drains in reports of recovery.py; None: there are none.

    Args:
        name: what the comparisons' names begin with.
    """
    found = [c for report in reports for c in json.loads(report.read_text()).get("comparisons", [])]
    lost, drained = (
        [fault for c in found if c["comparison"] == f"{name}, {kind}" for fault in c.get("faults", [])]
        for kind in ("node-loss", "drain")
    )
    sides = [c["baseline"] for c in found if c["comparison"] == f"{name}, node-loss" and "baseline" in c]
    theirs = [fault for side in sides for fault in side["faults"]]
    if not (lost and drained and theirs):
        return None
    median = lambda faults, key: statistics.median(f[key] for f in faults if f.get(key) is not None)  # noqa: E731
    return Costs(
        detect_s=median(lost, "detect_s"),
        regroup_s=median(lost, "regroup_s"),
        restore_s=median(lost, "restore_s"),
        recompute_s=max(0.0, median(lost, "recompute_s") - median(lost, "step_s_after")),
        join_s=median(lost, "join_stall_s"),
        drain_s=median(drained, "stall_s"),
        restart_s=median(theirs, "stall_s"),
    )


def newest(name: str) -> list[Path]:
    """The last report that has what is needed; empty: none."""
    dated = [(json.loads(path.read_text()).get("date", ""), path) for path in RESULTS.glob("*.json")]
    return next(([path] for _, path in sorted(dated, reverse=True) if measured([path], name)), [])


@dataclass(frozen=True)
class Cluster:
    """What is simulated.

    Attributes:
        rate: failures in 1,000 node-days, while the nodes are up.
        provision_s: until a node that is gone is replaced; infinite: never.
        notice_s: of a failure, before it; 0: none.
        step_s: with all nodes.
        checkpoint_s: for which training stands still at a checkpoint.
        minimum: share of the nodes without which training waits.
        flapping: so many of the machines fail every other minute, and come back.
    """

    nodes: int
    rate: float
    days: float = 30.0
    provision_s: float = 300.0
    notice_s: float = 0.0
    step_s: float = 10.0
    checkpoint_s: float = 30.0
    minimum: float = 0.5
    flapping: int = 0
    seed: int = 0

    @property
    def end_s(self) -> float:
        return self.days * DAY_S

    @property
    def failures_a_day(self) -> float:
        """Of all nodes, on average."""
        return self.rate * self.nodes / 1000 + self.flapping * DAY_S / (FLAP_UP_S + FLAP_DOWN_S)

    @property
    def least(self) -> int:
        return max(1, math.ceil(self.minimum * self.nodes))


@dataclass(frozen=True)
class Outage:
    """A node's absence."""

    node: int
    notice_s: float
    down_s: float
    up_s: float


def outages(cluster: Cluster) -> list[Outage]:
    """All that happen, whatever the run does; each node has its own random numbers."""
    found: list[Outage] = []
    for node in range(cluster.nodes):
        flaps, chance = node < cluster.flapping, random.Random(f"{cluster.seed}/{node}")
        a_second = 1 / FLAP_UP_S if flaps else cluster.rate / (1000 * DAY_S)
        notice_s, gone_s = (0.0, FLAP_DOWN_S) if flaps else (cluster.notice_s, cluster.provision_s)
        at = chance.expovariate(a_second) if a_second else math.inf
        while at < cluster.end_s:
            found.append(Outage(node, at, at + notice_s, at + notice_s + gone_s))
            at = found[-1].up_s + chance.expovariate(a_second)
    return found


class Ledger:
    """What becomes of the time: `seconds` by cause, "useful" among them. A node's second is 1 / nodes of a second."""

    def __init__(self, cluster: Cluster) -> None:
        self._nodes, self._total_s = cluster.nodes, cluster.end_s
        self.seconds = dict.fromkeys(("useful", *LOSSES), 0.0)

    def spend(self, seconds: float, workers: int, cause: str) -> None:
        """So many workers spend the time on `cause`; the other nodes are missing."""
        share = workers / self._nodes
        self.seconds[cause] += seconds * share
        self.seconds["missing"] += seconds * (1 - share)

    def turn(self, seconds: float, workers: int, cause: str) -> None:
        """What so many workers seemed to do usefully was for nothing."""
        self.seconds["useful"] -= seconds * workers / self._nodes
        self.seconds[cause] += seconds * workers / self._nodes

    def with_checkpoints(self, every_s: float, checkpoint_s: float) -> "Ledger":
        """The same, had training also stood still for a checkpoint every so often."""
        other, share = copy.deepcopy(self), checkpoint_s / (every_s + checkpoint_s)
        other.turn(self.seconds["useful"] * share, self._nodes, "checkpoint")
        return other

    @property
    def goodput(self) -> float:
        """Work done, of what all nodes would have done without a failure."""
        return self.seconds["useful"] / self._total_s


def optimum_interval_s(checkpoint_s: float, mtbf_s: float) -> float:
    """Work between two checkpoints, so that checkpoints and work lost by failures cost least.

    Reference: J. T. Daly, A higher order estimate of the optimum checkpoint interval for restart dumps, Future
    Generation Computer Systems 22(3), 2006. Its first term is J. W. Young's (CACM 17(9), 1974).
    """
    if checkpoint_s >= 2 * mtbf_s:
        return mtbf_s
    x = checkpoint_s / (2 * mtbf_s)
    return math.sqrt(2 * checkpoint_s * mtbf_s) * (1 + math.sqrt(x) / 3 + x / 9) - checkpoint_s


class Restarting:
    """A group that stops when it loses a node, and starts again from its last checkpoint.

    It needs all nodes, or goes on with `fewer`; then it starts again when one was replaced, right after a checkpoint,
    so that this loses no work. Checkpoints come at the best interval. Notice is not used: plain Ray Train, as measured
    by recovery.py, trains until the node's end.
    """

    def __init__(self, cluster: Cluster, restart_s: float, absences: Sequence[Outage], fewer: bool) -> None:
        self._cluster, self._restart_s, self._absences = cluster, restart_s, absences
        self._least = cluster.least if fewer else cluster.nodes
        mtbf_s = DAY_S / cluster.failures_a_day if cluster.failures_a_day else math.inf
        best_s = optimum_interval_s(cluster.checkpoint_s, mtbf_s) if mtbf_s < math.inf else cluster.end_s
        self._work_s = max(cluster.step_s, best_s)
        self._cycle_s = self._work_s + cluster.checkpoint_s
        self._ledger = Ledger(cluster)
        self._up = set(range(cluster.nodes))
        self._group = set(self._up)  # that trains; empty: nobody does
        self._now = self._since_s = 0.0  # the group trains since
        self._starts_s = math.inf

    def run(self) -> Ledger:
        """From a start with all nodes, which costs nothing here, to the end."""
        changes = [(o.down_s, False, o.node) for o in self._absences]
        for at, comes, node in sorted(changes + [(o.up_s, True, o.node) for o in self._absences]):
            if at >= self._cluster.end_s:
                break
            self._pass(at)
            self._up ^= {node}
            if node in self._group and not comes:
                self._stop(lost=True)
            elif not self._group and (not comes or self._starts_s == math.inf):
                self._start()
        self._pass(self._cluster.end_s)
        if self._group:
            self._stop(lost=False)
        return self._ledger

    def _start(self) -> None:
        """Begin to start anew, or wait for nodes."""
        self._starts_s = self._now + self._restart_s if len(self._up) >= self._least else math.inf

    def _stop(self, lost: bool) -> None:
        """The group's stretch ends, and the next start begins."""
        seconds, workers = self._now - self._since_s, len(self._group)
        cycles = int(seconds / self._cycle_s + 1e-9)
        rest_s = max(0.0, seconds - cycles * self._cycle_s)
        unsaved_s = min(rest_s, self._work_s)
        self._ledger.spend(seconds, workers, "useful")
        self._ledger.turn(cycles * self._cluster.checkpoint_s + rest_s - unsaved_s, workers, "checkpoint")
        if lost:
            self._ledger.turn(unsaved_s, workers, "recompute")
        self._group = set()
        self._start()

    def _pass(self, to: float) -> None:
        """Time passes, in which the nodes stay as they are."""
        while self._now < to:
            if self._group:
                cycles = math.ceil((self._now - self._since_s) / self._cycle_s - 1e-9)
                grows_s = self._since_s + cycles * self._cycle_s if self._up - self._group else math.inf
                self._now = min(to, max(grows_s, self._now))
                if grows_s <= to:
                    self._stop(lost=False)
                continue
            until = min(to, self._starts_s)
            self._ledger.spend(until - self._now, len(self._up), "waiting" if self._starts_s == math.inf else "restart")
            self._now = until
            if self._starts_s <= to:
                self._group, self._since_s = set(self._up), self._now
