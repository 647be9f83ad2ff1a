"""Breaks a training run again and again, and measures how it goes on: recovery.py's part that acts.

A run is known by its .jsonl files only, be it our run folder's or baseline_recovery.py's: a record a committed step
(step, step_s, time_s, generation) and records `generation_started` (generation, workers, pids and nodes by rank).
"""

import itertools
import json
import random
import signal
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import commands
import nodes
import paired

Record = dict[str, Any]
FAULTS = ("kill", "freeze", "node-loss", "drain")
NOTICE_S = 60.0  # between a drain's announcement and the node's end
SETTLED = 4  # steps of a generation before the next thing happens to it
LOSSES_A_NODE = 2  # at the third within ten minutes ours leaves a node out (orchestrator.recovery.FLAPS)


class Tail:
    """A growing .jsonl file, each line read once."""

    def __init__(self, file: Path) -> None:
        self._file, self._offset = file, 0

    def new(self) -> list[Record]:
        """The whole lines that were added; raises RuntimeError if some were taken back."""
        if not self._file.exists():
            return []
        with self._file.open("rb") as stream:
            if stream.seek(0, 2) < self._offset:
                raise RuntimeError(f"{self._file.name} was cut: committed steps were taken back")
            stream.seek(self._offset)
            whole, newline, _ = stream.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return [json.loads(line) for line in whole.splitlines()]


@dataclass
class Run:
    """A training that goes on, and what its files have told so far."""

    process: "subprocess.Popen[bytes]"
    folder: Path
    tails: list[Tail]
    steps: list[Record] = field(default_factory=list)
    generations: list[Record] = field(default_factory=list)
    incidents: list[Record] = field(default_factory=list)

    def look(self) -> None:
        """Read what is new; raises RuntimeError when the command has ended."""
        if (status := self.process.poll()) is not None:
            raise RuntimeError(f"the training ended early, exit status {status}")
        kinds = {"": self.steps, "generation_started": self.generations, "incident": self.incidents}
        for record in [record for tail in self.tails for record in tail.new()]:
            kinds.get(record.get("event", ""), []).append(record)

    def wait(self, condition: Callable[[], bool], limit_s: float) -> bool:
        """Whether the condition came true in time, looking meanwhile."""

        def there() -> bool:
            self.look()
            return condition()

        return commands.wait_until(there, limit_s)

    @property
    def newest(self) -> int:
        """The newest generation."""
        return int(self.generations[-1]["generation"]) if self.generations else 0

    def of(self, generation: int) -> list[Record]:
        """The steps of a generation."""
        return [s for s in self.steps if s["generation"] == generation]

    def settled(self, generation: int) -> bool:
        """Whether a generation has got so far, or is over."""
        return len(self.of(generation)) >= SETTLED or self.newest > generation


def figures(steps: list[Record], hit: int, at_s: float) -> Record | None:
    """What a fault did to a run; None until a step is committed that no generation before had.

    Args:
        steps: all records, in order.
        hit: the generation that was struck.
        at_s: when, in seconds since 1970.
    """
    last = max(s["step"] for s in steps if s["generation"] <= hit)
    after = [s for s in steps if s["generation"] > hit and s["time_s"] > at_s]
    beyond = [s for s in after if s["step"] > last]
    if not beyond:
        return None
    first = after[0]
    taken_s = [s["step_s"] for s in after if s["generation"] == first["generation"]]
    step_s = statistics.median(taken_s[1:] or taken_s)
    before = [s for s in steps if s["time_s"] <= at_s][-1:]
    meanwhile = [s for s in steps if s["time_s"] > at_s and s["generation"] <= hit]
    around = [s["time_s"] for s in before + meanwhile + after[:3]]
    gaps = [b - a for a, b in itertools.pairwise(around)]
    return {
        "generation": first["generation"],
        "recovery_s": round(first["time_s"] - at_s, 3),
        "new_step_s": round(beyond[0]["time_s"] - at_s, 3),
        "steps_repeated": last + 1 - first["step"],
        "step_s_before": round(statistics.median([s["step_s"] for s in steps if s["generation"] == hit]), 4),
        "step_s_after": round(step_s, 4),
        "stall_s": round(max(gaps) - step_s, 3),
    }


def joining(steps: list[Record], first: int, whole: int, at_s: float) -> Record:
    """How the generation that is whole again began: seconds since the fault, and what joining cost the others."""
    index = next(i for i, s in enumerate(steps) if s["generation"] == whole)
    found: Record = {"whole_s": round(steps[index]["time_s"] - at_s, 3), "join_stall_s": None}
    if whole > first:
        taken_s = [s["step_s"] for s in steps[index:] if s["generation"] == whole]
        gap_s = steps[index]["time_s"] - steps[index - 1]["time_s"]
        found["join_stall_s"] = round(gap_s - statistics.median(taken_s[1:] or taken_s), 3)
    return found


@dataclass
class Breaker:
    """Breaks one run.

    Attributes:
        workers: without which the run is not whole.
        limit_s: after which a run is said not to go on.
        ours: then nothing but going on is accepted, and no node loses more than LOSSES_A_NODE workers.
    """

    run: Run
    nodes: nodes.Nodes
    workers: int
    limit_s: float
    ours: bool
    losses: Counter[str] = field(default_factory=Counter)
    turns: Counter[str] = field(default_factory=Counter)
    chance: random.Random = field(default_factory=lambda: random.Random(0))

    def become_whole(self, newer_than: int = 0, limit_s: float = 0.0) -> None:
        """Wait until a generation of all workers has settled; raises TimeoutError after a limit [that of the run]."""

        def whole() -> bool:
            run = self.run
            if run.newest <= newer_than or run.generations[-1]["workers"] < self.workers:
                return False
            return len(run.of(run.newest)) >= SETTLED

        limit_s = limit_s or self.limit_s
        if not self.run.wait(whole, limit_s):
            known = self.run.generations[-1:] + self.run.steps[-1:]
            raise TimeoutError(f"not all {self.workers} workers train after {limit_s:g} s; newest: {known}")

    def strike(self, fault: str) -> Record:
        """One fault, from a run that is whole to one that is whole again; returns its figures."""
        rank, pid, node = self._victim(fault)
        if self.ours and fault in ("kill", "freeze"):
            while self.losses[node] >= LOSSES_A_NODE:
                paired.say("exchanging a node")
                self.strike("drain")
                rank, pid, node = self._victim(fault)
            self.losses[node] += 1
        self.turns[fault] += 1
        hit = self.run.newest
        usual_s = statistics.median([s["step_s"] for s in self.run.of(hit)])
        time.sleep(self.chance.uniform(0, usual_s))  # not to strike always at the moment when records arrive
        at_s = time.time()
        if fault in ("kill", "freeze"):
            nodes.kill(pid, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        elif fault == "node-loss":
            at_s = self.nodes.cut(node)
        else:
            self.nodes.drain(node, NOTICE_S)
        in_time = self._go_on(fault, hit, at_s, pid, node)
        found = {"fault": fault, "rank": rank, **self._mend(fault, hit, at_s, node)}
        if not in_time:
            found |= {"recovery_s": None, "new_step_s": None, "stall_s": None, "not_within_s": self.limit_s}
        paired.say(json.dumps(found))
        return found

    def _victim(self, fault: str) -> tuple[int, int, str]:
        """(rank, process, node): ranks take turns; nodes that lost workers are spared, or taken away first."""
        seats, sign = self.run.generations[-1], -1 if fault in ("node-loss", "drain") else 1
        order = sorted(range(self.workers), key=lambda rank: (rank - self.turns[fault]) % self.workers)
        rank = min(order, key=lambda rank: sign * self.losses[seats["nodes"][rank]])
        return rank, seats["pids"][rank], seats["nodes"][rank]

    def _go_on(self, fault: str, hit: int, at_s: float, pid: int, node: str) -> bool:
        """Wait for the next new step; whether it came in time. Raises TimeoutError where it has to."""

        def gone_on() -> bool:
            return figures(self.run.steps, hit, at_s) is not None

        if fault == "drain":
            if self.run.wait(gone_on, NOTICE_S):
                return True
            self.nodes.cut(node)
        if self.run.wait(gone_on, self.limit_s):
            return True
        if self.ours or fault != "freeze":
            raise TimeoutError(f"{fault}: no new step after {self.limit_s:g} s")
        if pid in commands.processes(self.run.folder):
            nodes.kill(pid, signal.SIGKILL)
        if not self.run.wait(gone_on, self.limit_s):
            raise TimeoutError(f"{fault}: no new step {self.limit_s:g} s after the frozen process was killed")
        return False

    def _mend(self, fault: str, hit: int, at_s: float, node: str) -> Record:
        """Wait until the run is whole and has its spare node again; returns the fault's figures."""
        run = self.run
        first = (figures(run.steps, hit, at_s) or {})["generation"]
        run.wait(lambda: run.settled(first), self.limit_s)
        if fault == "drain":
            self.nodes.remove(node)
        self.become_whole(hit)
        found = (figures(run.steps, hit, at_s) or {}) | joining(run.steps, first, run.newest, at_s)
        if fault in ("node-loss", "drain"):
            self.nodes.add()
            steps = len(run.steps)
            run.wait(lambda: len(run.steps) >= steps + SETTLED, self.limit_s)
            self.become_whole(hit)
        return found
