"""Makes the faults of a schedule happen: the coordinator's part decides when, the worker's part does it."""

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

from orchestrator.events import FaultFired
from orchestrator.faults import COORDINATOR, SERVER, WORKER_KINDS, Fault
from orchestrator.journal import Journal
from orchestrator.membership import Membership
from orchestrator.nodewatch import drain_node
from orchestrator.recovery import Member

HOLD_S, HOLD_STEPS = 0.25, 120  # half a minute in all: replacements that are not there by then may never come
log = logging.getLogger("orchestrator.injector")


class InjectedError(RuntimeError):
    """A fault of kind exception."""


def target(fault: Fault, seated: Iterable[Member], nodes: Iterable[str]) -> Member | None:
    """Whom a fault is to befall; None: nobody has that rank or node now, a later generation may.

    Args:
        nodes: that trained in this run, in order, any number of times each.
    """
    met = list(dict.fromkeys(nodes))
    node = met[fault.node] if 0 <= fault.node < len(met) else ""
    return next((m for m in seated if m.rank == fault.rank or m.node == node), None)


class FaultSchedule:
    """The coordinator's part: which faults are due, each once; what is not a worker's own doing is done here.

    Attributes:
        fired: numbers of those that have happened.
        begun_s: when training began, seconds since 1970; 0: it has not.
        end_server: kills a parameter server, by its number; returns what went wrong, or "".
    """

    end_server: Callable[[int], Coroutine[Any, Any, str]]

    def __init__(self, faults: tuple[Fault, ...], journal: Journal, members: Membership) -> None:
        self.faults, self._journal, self._members = faults, journal, members
        self.fired: set[int] = journal.fired
        self.begun_s = 0.0
        if not journal.recorded:  # this command's first coordinator; what is loaded may be older than that
            self._leave_behind(journal.saved)

    def begin(self) -> None:
        """A generation has begun; what a resumed run had behind it then does not happen once more."""
        self.begun_s = self.begun_s or time.time()
        self._leave_behind(self._journal.first_step)

    def _leave_behind(self, step: int) -> None:
        self.fired |= {number for number, fault in enumerate(self.faults) if 0 <= fault.step < step}

    def due(self, steps_done: int, workers: int) -> list[int]:
        """Numbers of the faults that the coordinator has to start now; those of a worker's step start there."""
        trained_s = time.time() - self.begun_s if self.begun_s else -1.0
        return [
            number
            for number, fault in enumerate(self.faults)
            if number not in self.fired
            and not (fault.kind in WORKER_KINDS and fault.step >= 0)
            and fault.is_due(steps_done, trained_s, workers)
        ]

    def note(self, number: int, rank: int, node: str = "", problem: str = "") -> None:
        """A fault happens now."""
        self.fired.add(number)
        kind = self.faults[number].kind
        self._journal.log(FaultFired(number, kind, rank, node, self._journal.recorded, problem))

    def start(self) -> None:
        """Make happen what is due: faults of nodes and servers, and those that come by the clock."""
        seated = self._members.roster.seated.values()
        due = self.due(self._journal.recorded, len(seated)) if self._members.begun else []
        for number in due:
            fault = self.faults[number]
            member = target(fault, seated, self._journal.nodes)
            if fault.kind == "add-node":
                self.note(number, -1)
            elif fault.kind == COORDINATOR:
                self.note(number, -1)
                self._members.start(self._end_coordinator())
            elif fault.kind == SERVER:
                self.fired.add(number)
                self._members.start(self._end_server(number, fault.rank))
            elif member is None:
                continue
            elif fault.kind == "drain":
                self.fired.add(number)
                self._members.start(self._drain(number, member.node, fault.seconds))
            else:
                self.note(number, member.rank, member.node)
                self._members.desk.tell(member.id, "fault", number)

    async def _drain(self, number: int, node: str, seconds: float) -> None:
        import ray

        address = ray.get_runtime_context().gcs_address
        refused = await asyncio.to_thread(drain_node, address, node, seconds, "fault schedule")
        self.note(number, -1, node, refused)

    async def _end_server(self, number: int, server: int) -> None:
        self.note(number, server, "", await self.end_server(server))

    async def _end_coordinator(self) -> None:
        await asyncio.to_thread(self._journal.flush)  # the next one must know that this has happened
        os.kill(os.getpid(), signal.SIGKILL)


class Saboteur:
    """The worker's part: what happens to this process, its node or its network."""

    def __init__(
        self,
        faults: tuple[Fault, ...],
        may_fire: Callable[[int], bool],
        failed: Callable[[int, str], object] = lambda number, problem: None,
    ) -> None:
        """Args:
        may_fire: asks the coordinator, which answers yes once for each fault.
        failed: tells it that a fault could not be made to happen, and why.
        """
        self._faults, self._may_fire, self._failed = faults, may_fire, failed
        self._done: set[int] = set()
        self._raise = ""
        self._slow_s, self._slow_steps, self._drag_s = 0.0, 0, 0.0

    def at(self, moment: str, rank: int, workers: int, steps_done: int) -> None:
        """Do what the schedule has for this rank at this step, at a moment as in Fault.during."""
        for number, fault in enumerate(self._faults):
            here = fault.kind in WORKER_KINDS and fault.rank == rank and number not in self._done
            if here and fault.during == moment and fault.step >= 0 and fault.is_due(steps_done, -1.0, workers):
                fires = self._may_fire(number)  # raises where the coordinator is away: it is asked again
                self._done.add(number)
                if fires:
                    self.do(number)
                    break  # one at a time: the next has its step

    def before_step(self, rank: int, workers: int, steps_done: int, shards: int) -> None:
        """As `at`; raises InjectedError for an exception.

        Args:
            shards: of the whole step; a slow worker is so for each of its own.
        """
        self.at("step", rank, workers, steps_done)
        if self._raise:
            text, self._raise = self._raise, ""
            raise InjectedError(text)
        self._drag_s = self._slow_s * workers / shards if self._slow_steps else 0.0
        self._slow_steps = max(0, self._slow_steps - 1)

    def hold(self, workers: int, steps_done: int, fired: frozenset[int]) -> None:
        """Hold a step up if a fault has come to its step but not to its workers.

        Else a quick model is steps ahead by hundreds when they are there, and what was to happen one after the other
        happens at once.

        Args:
            fired: faults that had happened when this generation began.
        """
        late = [
            number
            for number, fault in enumerate(self._faults)
            if number not in fired
            and 0 <= fault.step <= steps_done < fault.step + HOLD_STEPS
            and workers < fault.workers
        ]
        if late:
            time.sleep(HOLD_S)

    def drag(self, pieces: int) -> None:
        """Before pieces of work: be slow, if that was asked for."""
        if self._drag_s:
            time.sleep(self._drag_s * pieces)

    def do(self, number: int) -> None:
        """Make fault `number` happen, from any thread."""
        fault = self._faults[number]
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault.kind == "exception":
            self._raise = f"fault {number + 1} of the schedule"
        elif fault.kind == "slow":
            self._slow_s, self._slow_steps = fault.seconds, fault.steps
        elif fault.kind == "node-loss":
            end_node()
        elif fault.kind == "network-cut" and (problem := cut_network()):
            self._failed(number, problem)


def end_node() -> None:
    """SIGKILL to this node's raylet, to all its other workers, and to this process."""
    raylet = os.getppid()
    children = [int(word) for word in Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()]
    for pid in (raylet, *(c for c in children if c != os.getpid()), os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def cut_network() -> str:
    """Take this network namespace's interfaces down; returns why that is impossible, or "".

    Only where it is one of `ip netns` (needs root): a machine's own network is not cut.
    """
    own, named = os.stat("/proc/self/ns/net").st_ino, Path("/run/netns")
    if not (named.is_dir() and any(file.stat().st_ino == own for file in named.iterdir())):
        return "this node has no network of its own (ip netns)"
    for name in sorted(set(os.listdir("/sys/class/net")) - {"lo"}):
        done = subprocess.run(["ip", "link", "set", "dev", name, "down"], capture_output=True, text=True, check=False)
        if done.returncode:
            return f"ip: {done.stderr.strip()}"
    return ""
