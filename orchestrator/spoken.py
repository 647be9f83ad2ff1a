"""What the charts of a report show, in numbers and sentences: for who hears the page instead of seeing it."""

from collections.abc import Sequence

import numpy as np

from orchestrator.charts import anybodys, moment, spans, taken
from orchestrator.history import STEP_PARTS, Floats, History

NAMED = 12  # incidents in one sentence; all are in their table


def curve(name: str, x: Floats, y: Floats) -> str:
    """A curve over steps in one sentence: first, last, least and greatest value, and at which steps."""
    known = np.isfinite(y)
    x, y = x[known], y[known]
    if not len(x):
        return f"{name}: no values."
    places = (("first", 0), ("last", len(y) - 1), ("least", int(y.argmin())), ("greatest", int(y.argmax())))
    return f"{name}: " + ", ".join(f"{word} {y[i]:.5g} at step {x[i]:.0f}" for word, i in places) + "."


def incidents(history: History) -> str:
    """Where the marks are."""
    found = history.incidents
    if not found:
        return "No incidents."
    marks = ", ".join(f"{event['kind'].replace('_', ' ')} at step {event['step']}" for event in found[:NAMED])
    more = f", and {len(found) - NAMED} more, which the table of incidents has" if len(found) > NAMED else ""
    return f"Incidents marked: {marks}{more}."


def column(histories: Sequence[History], key: str) -> str:
    """A column of metrics.jsonl of every run, and the incidents of the first."""
    told = [curve(h.name, h.column("step"), h.column(key)) for h in histories if len(h.column(key))]
    return " ".join([*told, incidents(histories[0])])


def metric(histories: Sequence[History], name: str) -> str:
    """A held-out metric of every run."""
    return " ".join(curve(history.name, *taken(history, name)) for history in histories)


def workers(history: History) -> str:
    """How many workers there were, and from when."""
    found = spans(history)
    changes = [f"{event['workers']} from {moment(begin)[:19]} UTC, step {event['step']}" for begin, _, event in found]
    more = f", and {len(changes) - NAMED} more, which the table of generations has" if len(changes) > NAMED else ""
    return f"Workers: {'; '.join(changes[:NAMED])}{more}."


def shards(history: History) -> str:
    """How many shards the workers of the first and the last generation held."""
    told = []
    for word, (_, _, event) in zip(("First", "Last"), (spans(history)[0], spans(history)[-1]), strict=True):
        held = [after - first for first, after in event["ranges"]]
        who = f"{word}, generation {event['generation']}: {len(held)} workers"
        each = "any shard" if anybodys(event) else f"{min(held)} to {max(held)} shards each"
        told.append(f"{who} with {each}.")
    return " ".join([*told, "The table of generations has all."])


def shares(history: History) -> str:
    """The parts of a step, each as it began, ended, and was at least and most."""
    steps = history.column("step")
    return " ".join(curve(name, steps, history.column(k)) for name, k in STEP_PARTS.items() if len(history.column(k)))
