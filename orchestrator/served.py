"""What the parts of a parameter service say to each other: dispatcher, servers and workers."""

from dataclasses import dataclass
from typing import Any

from orchestrator.handout import Unit


@dataclass(frozen=True)
class Done:
    """What a worker says of a microbatch that all servers have.

    Attributes:
        loss: summed over its items; count: of the items.
        samples: of the microbatch; ledger: a number that tells sets of samples apart.
        staleness: updates that the servers had applied between this worker's pull and its push, the most of all.
        data_s, compute_s, exchange_s: seconds for reading samples, computing, pulling and pushing.
    """

    unit: Unit
    loss: float
    count: float
    samples: int
    ledger: int
    staleness: int
    data_s: float
    compute_s: float
    exchange_s: float


@dataclass(frozen=True)
class Posting:
    """Where a worker works.

    Attributes:
        rank: its number, which others had before it and may have after it.
        era: counts how often the servers were put back to a checkpoint; what is of another era is void.
        servers: their actors, in the order of their parameters.
    """

    rank: int
    era: int
    servers: tuple[Any, ...]


@dataclass(frozen=True)
class Job:
    """What a worker does next.

    Attributes:
        kind: "train" (on `unit`), "evaluate" (the parameters as they are, reported as of `step`) or "finish".
        step: steps that are finished.
        workers: that are there.
    """

    kind: str
    step: int
    workers: int
    unit: Unit | None = None


@dataclass(frozen=True)
class Restored:
    """What a server begins with.

    Attributes:
        step: of the checkpoint; -1: there was none, it has the initial state.
        rejected: checkpoints that were passed over, a line each.
        problem: why it cannot begin, "" if it can.
    """

    step: int
    rejected: tuple[str, ...] = ()
    problem: str = ""
