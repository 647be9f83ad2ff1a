"""An incident from the moment that a generation ends until the next step is committed."""

from dataclasses import dataclass, field

from orchestrator.events import Incident

PAUSES = ("workers_joined", "node_drained", "rebalanced", "straggler_left")  # at a step boundary
VAGUE = (*PAUSES, "connection_lost")  # what a fault that is found next explains better
KILLED = ("worker_killed", "worker_frozen", "connection_lost")


@dataclass
class OpenIncident:
    """An incident whose recovery is going on. Times in seconds since 1970."""

    kind: str
    detail: str
    workers_before: int
    step: int
    detect_s: float
    ended_s: float
    connected_s: float = 0.0
    restore_s: float = 0.0
    workers_after: int = 0
    generation: int = 0
    steps_lost: int = 0
    begun_s: float = 0.0
    nodes: set[str] = field(default_factory=set)

    def another(self, kind: str, detail: str, detect_s: float) -> None:
        """A fault during recovery: steps of the generation that it broke, reported late, do not end the incident."""
        self.begun_s = 0.0
        if self.kind in VAGUE:
            self.kind, self.detect_s = kind, detect_s
        if detail:
            self.detail = f"{self.detail}; {detail}".removeprefix("; ")

    def lost(self, steps: int) -> None:
        """So many committed steps have to be taken again."""
        self.steps_lost = max(self.steps_lost, steps)

    def closed(self, now: float) -> Incident:
        """What is written down of it when the next step is committed, or when the run is over."""
        if not self.begun_s:  # nobody went on after it
            self.connected_s, self.begun_s, self.workers_after, self.restore_s = now, now, 0, 0.0
        return Incident(
            kind=self.kind,
            step=self.step,
            workers_before=self.workers_before,
            workers_after=self.workers_after,
            steps_lost=self.steps_lost,
            recovery_s=round(now - self.ended_s, 4),
            detect_s=round(self.detect_s, 4),
            regroup_s=round(self.connected_s - self.ended_s, 4),
            restore_s=round(self.restore_s, 4),
            recompute_s=round(now - self.begun_s, 4),
            generation=self.generation,
            detail=self.detail,
        )
