"""What the coordinator and its workers say to each other: who is asked for what."""

from dataclasses import dataclass
from typing import Any

from orchestrator.faults import Fault
from orchestrator.plan import Plan
from orchestrator.shards import Placement

NAMESPACE = "orchestrator"  # of the coordinator's name in Ray
READ_BACK_S = 5e-5  # a step: what a coordinator that is started anew may need to read its record back
OVER, LEFT = "the run is over", "this worker left the run"  # what the train function returns


@dataclass(frozen=True)
class Assignment:
    """What a coordinator is made for.

    Attributes:
        uri: of the run folder.
        token: of the command that the run belongs to.
        description: of the data, for people.
        started_s: when the command was typed, seconds since 1970.
        expected: workers that it starts with.
        maximum: workers that it may have.
        faults: of a rehearsal.
        loopback: whether all workers are on this machine: then nothing listens to the outside.
    """

    plan: Plan
    uri: str
    token: str
    description: str
    started_s: float
    expected: int
    maximum: int
    loopback: bool
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True)
class Seat:
    """A worker's place in a generation.

    Attributes:
        store: host and port of rank 0's TCPStore.
        step: committed steps of rank 0's state; -1: nobody has any, rank 0 loads a checkpoint.
        share: whether rank 0 hands its state to the others.
        recorded: the newest step that the run folder knows of.
        size: workers of a replica group; the placement deals the shards out to groups.
        fired: numbers of the faults that have happened.
        unsaved_s: seconds since the newest checkpoint, or since training began.
    """

    generation: int
    rank: int
    placement: Placement
    store: tuple[str, int]
    step: int
    share: bool
    recorded: int
    size: int = 1
    fired: frozenset[int] = frozenset()
    unsaved_s: float = 0.0

    @property
    def workers(self) -> int:
        return self.placement.workers * self.size


@dataclass(frozen=True)
class Order:
    """What a worker does instead of training.

    Attributes:
        word: "over" (the run is), "leave" (its node goes), "stop" (on request), "excluded" (it was given up), "save":
            write down the state, and ask again, or "attach": ask for a seat anew (parameter servers).
        lead: whether it writes the checkpoint of a stop.
    """

    word: str
    lead: bool = False


@dataclass(frozen=True)
class Status:
    """What the driver shows. `outcome` is "" while the run goes on; `missing` workers are waited for.

    `notice`: what a person should know of the run, once.
    """

    joined: int
    workers: int
    missing: int
    generation: int
    step: int
    loss: float
    samples_per_s: float
    steps_per_s: float
    phase: str
    outcome: str
    message: str
    exit_status: int
    result: dict[str, Any] | None
    notice: str = ""
