"""What result.json says of a run that has ended: pure."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.events import Incident
from orchestrator.failure import Failure
from orchestrator.plan import Plan


@dataclass(frozen=True)
class Course:
    """How far a run came, and what this command did for it.

    Attributes:
        steps: committed, of the run's whole life.
        loss: of the newest one; NaN: there is none.
        first_step: with which this command began; -1: it never began to train.
        wall_s: since the command was typed.
        training_s: of them, in steps.
        generations: of this command.
        incidents: of this command.
    """

    steps: int
    loss: float
    first_step: int
    wall_s: float
    training_s: float
    generations: int
    incidents: Sequence[Incident]


def result_of(
    plan: Plan,
    status: str,
    course: Course,
    weights_sha256: str,
    metrics: Mapping[str, float],
    failure: Failure | None,
    deterministic: bool,
) -> dict[str, Any]:
    """The keys that every result.json has, and `failure` where there was one."""
    schedule, steps = plan.schedule, course.steps
    trained = schedule.samples_before(steps) - schedule.samples_before(min(steps, max(0, course.first_step)))
    return {
        "status": status,
        "workload": plan.workload,
        "steps": steps,
        "samples": schedule.samples_before(steps),
        "loss": None if math.isnan(course.loss) else course.loss,
        "metrics": dict(metrics),
        "weights_sha256": weights_sha256,
        "wall_s": round(course.wall_s, 3),
        "samples_per_s": round(trained / course.training_s, 3) if course.training_s else 0.0,
        "goodput": round(course.training_s / course.wall_s, 4),
        "generations": course.generations,
        "incidents": [dataclasses.asdict(incident) for incident in course.incidents],
        **({"failure": dataclasses.asdict(failure)} if failure else {}),
        "deterministic": deterministic,
    }
