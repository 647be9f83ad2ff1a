"""Fault schedules: what is to go wrong in a rehearsal, where and when. A TOML file of [[fault]] tables.

[[fault]]
kind = "kill"     # kill, stop, exception, slow: of a worker, by rank
rank = 1
step = 20         # or time_s = 3.5, seconds since training began
workers = 3       # if so many train by then; else as soon as they do: 120 steps are held up meanwhile
during = "step"   # or restore, checkpoint: halfway through the first handing over of state, or checkpoint, after it

[[fault]]
kind = "kill-server"  # with --sync parameter-server: of a server, by its number as rank
rank = 0
step = 30

[[fault]]
kind = "kill-coordinator"  # of none; Ray starts it anew
step = 35

[[fault]]
kind = "drain"    # drain, node-loss, network-cut: of a node, by the rank of a worker on it; add-node: of none
rank = 2          # or node = 1: the second node of those that ever trained in this run
step = 40
seconds = 10      # drain: until the node goes; slow: added to its next `steps` steps, if it has its even share of work
"""

import dataclasses
import math
import tomllib
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import UserError

WORKER_KINDS = ("kill", "stop", "exception", "slow")
NODE_KINDS = ("drain", "node-loss", "network-cut")
MOMENTS = ("step", "restore", "checkpoint")
SERVER, COORDINATOR = "kill-server", "kill-coordinator"
WITHOUT_RANK = ("add-node", COORDINATOR)
KINDS = (*WORKER_KINDS, *NODE_KINDS, SERVER, *WITHOUT_RANK)


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong, once.

    Attributes:
        rank: of the worker, or of a worker on the node, or the number of the parameter server; -1 for others, and where
            `node` is given.
        node: its number in the order in which nodes came to train, from 0; -1: by rank.
        step: when that many steps are committed, and never where a resumed run has more; -1: by time.
        time_s: seconds since the first generation began to train; -1: by step.
        seconds: drain: notice before the node goes; slow: added to each step of a worker with an even share of the
            shards; more with more, less with fewer.
        steps: slow: how many steps.
        workers: not before so many train: 0 does not wait for the replacements of earlier faults. Steps are held up
            meanwhile (injector.HOLD_S), so that a quick model is not past the next fault's step when they are there;
            not with --sync parameter-server, nor for faults by time.
        during: what a worker has to be doing; with kill and stop, by step.
    """

    kind: str
    rank: int = -1
    node: int = -1
    step: int = -1
    time_s: float = -1.0
    seconds: float = 1.0
    steps: int = 10
    workers: int = 0
    during: str = "step"

    def is_due(self, steps_done: int, trained_s: float, workers: int) -> bool:
        """Whether its moment has come, with `workers` training."""
        return workers >= self.workers and (0 <= self.step <= steps_done or 0 <= self.time_s <= trained_s)


def parse_faults(text: str, name: str) -> tuple[Fault, ...]:
    """The faults of a schedule; raises UserError with one line that names the file and the fault.

    Args:
        text: TOML.
        name: of the file, for messages.
    """
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--faults {name}: not valid TOML ({error})") from None
    tables = content.pop("fault", None)
    if content or not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
        raise UserError(f"--faults {name}: write [[fault]] tables and nothing else; see orchestrator/faults.py")
    return tuple(_fault(table, f"--faults {name}: fault {number}") for number, table in enumerate(tables, 1))


def _fault(table: dict[str, Any], where: str) -> Fault:
    known: dict[str, Any] = {f.name: f.type for f in dataclasses.fields(Fault)}
    for key, value in table.items():
        if key not in known:
            raise UserError(f"{where}: {key}: no such key; use {', '.join(known)}")
        allowed: tuple[type, ...] = {str: (str,), int: (int,), float: (int, float)}[known[key]]
        if isinstance(value, bool) or not isinstance(value, allowed):
            raise UserError(f"{where}: {key} = {value!r}: not {allowed[-1].__name__}")
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            raise UserError(f"{where}: {key} = {value}: not a finite number from 0")
    kind = table.get("kind", "")
    if kind not in KINDS:
        raise UserError(f"{where}: kind = {kind!r}: not known; use {', '.join(KINDS)}")
    if ("step" in table) == ("time_s" in table):
        raise UserError(f"{where}: give step or time_s, one of them")
    if "node" in table and ("rank" in table or kind not in NODE_KINDS):
        raise UserError(f"{where}: node: goes with {', '.join(NODE_KINDS)}, and without rank")
    if kind not in WITHOUT_RANK and not {"rank", "node"} & set(table):
        whose = "the number of a server as rank" if kind == SERVER else "the rank of a worker"
        alternative = " on the node, or the number of the node" if kind in NODE_KINDS else ""
        raise UserError(f"{where}: {kind} needs {whose}{alternative}")
    fault = Fault(**table)
    if fault.during not in MOMENTS:
        raise UserError(f"{where}: during = {fault.during!r}: not known; use {', '.join(MOMENTS)}")
    if fault.during != "step" and (kind not in ("kill", "stop") or fault.step < 0):
        raise UserError(f"{where}: during: goes with kill or stop, and with step")
    return fault
