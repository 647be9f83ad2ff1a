"""What `orchestrator.watch` shows, drawn with rich from the records of a run; a pure function of them and the clock."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.pace import clock

BARS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"  # one eighth to eight eighths of a block
SILENT_S = 15.0
WORKERS_SHOWN, INCIDENTS_SHOWN = 12, 6
SPARK = 48
STYLES = {"finished": "bold green", "failed": "bold red", "stopped": "bold yellow"}


@dataclass(frozen=True)
class Sight:
    """What was seen of a run at one moment.

    Attributes:
        config: its settings.
        result: result.json, None while there is none.
        events: events.jsonl.
        steps: the newest records of metrics.jsonl.
        now_s: the moment, seconds since 1970.
    """

    config: dict[str, Any]
    result: dict[str, Any] | None
    events: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    now_s: float

    def newest(self, kind: str) -> dict[str, Any] | None:
        """The last event of a kind."""
        return next((event for event in reversed(self.events) if event["event"] == kind), None)

    def current(self, kind: str) -> dict[str, Any] | None:
        """The last event of a kind that the run's newest command has written."""
        begun = next((i for i in reversed(range(len(self.events))) if self.events[i]["event"] == "run_started"), 0)
        return next((event for event in reversed(self.events[begun:]) if event["event"] == kind), None)

    @property
    def over(self) -> bool:
        """Whether the command's end is written down."""
        return self.result is not None


def sparkline(values: Sequence[float], width: int = SPARK) -> str:
    """The values as bars of eight heights, at most `width` of them, each the mean of a stretch."""
    if not values:
        return ""
    bounds = sorted({len(values) * i // width for i in range(width + 1)})
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(bounds)]
    low, high = min(means), max(means)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


def draw(sight: Sight) -> RenderableType:
    """The whole view."""
    parts: list[RenderableType] = [_headline(sight), _progress(sight), _figures(sight)]
    if sight.steps:
        losses = [record["loss"] for record in sight.steps]
        parts.append(Text(f"loss {sparkline(losses)} of the last {len(losses)} steps"))
    parts += [_workers(sight), _incidents(sight)]
    return Group(*parts)


def _headline(sight: Sight) -> RenderableType:
    state, style = _state(sight)
    text = Text(f"{sight.config.get('name', '')}  ", style="bold")
    text.append(state, style=style)
    if sight.result:
        text.append(f"  weights {sight.result['weights_sha256'][:12]}")
    return Panel(text, title=str(sight.config.get("workload", "")), title_align="left")


def _state(sight: Sight) -> tuple[str, str]:
    """In words what is going on, and how to colour that."""
    if sight.result:
        status = str(sight.result["status"])
        return status, STYLES.get(status, "")
    last_s = max([e["time_s"] for e in sight.events[-1:]] + [r["time_s"] for r in sight.steps[-1:]], default=0.0)
    silent_s = sight.now_s - last_s if last_s else 0.0
    phase = sight.current("phase_began")
    words = phase["phase"] if phase else "starting workers"
    if phase and phase["missing"]:
        words += f": {phase['missing']} more needed, {phase['joined']} there"
    if silent_s > SILENT_S:
        return f"{words}; nothing written for {silent_s:.0f} s", "yellow"
    return words, "cyan"


def _progress(sight: Sight) -> RenderableType:
    started = sight.newest("run_started")
    total = started["total_steps"] if started else 0
    step = sight.steps[-1]["step"] if sight.steps else 0
    row = Table.grid(padding=(0, 1))
    row.add_row(
        ProgressBar(total=max(1, total), completed=step, width=SPARK), f"step {step:,} of {total:,}{_left(sight)}"
    )
    return row


def _left(sight: Sight) -> str:
    """How long it will take at the pace of the newest steps."""
    started = sight.newest("run_started")
    if sight.over or not started or not sight.steps or not sight.current("generation_started"):
        return ""
    recent = sight.steps[-50:]
    pace = sum(record["step_s"] for record in recent) / len(recent)
    seconds = pace * (started["total_steps"] - recent[-1]["step"])
    return f", {clock(seconds)} left" if seconds > 0 else ""


def _figures(sight: Sight) -> RenderableType:
    if not sight.steps:
        return Text("no step has been committed yet")
    last = sight.steps[-1]
    text = f"loss {last['loss']:.4f}  {last['samples_per_s']:,.0f} samples/s  generation {last['generation']}"
    saved = sight.newest("checkpoint_saved")
    if saved:
        text += f"  checkpoint of step {saved['step']:,}, {max(0, sight.now_s - saved['time_s']):.0f} s ago"
    evaluated = sight.newest("evaluated")
    if evaluated:
        text += "  held-out: " + ", ".join(f"{name} {value:.4f}" for name, value in evaluated["metrics"].items())
    return Text(text)


def _workers(sight: Sight) -> RenderableType:
    seated = sight.current("generation_started")
    table = Table(title="workers", title_justify="left", expand=False)
    for head in ("rank", "node", "process", "shards"):
        table.add_column(head)
    if not seated:
        return Text("no worker has begun to train yet")
    rows = list(zip(seated["ranges"], seated["nodes"], seated["pids"], strict=True))
    for rank, ((first, after), node, pid) in enumerate(rows[:WORKERS_SHOWN]):
        held = f"{first} to {after - 1} ({after - first})"
        whose = "any" if sight.config.get("sync") == "parameter-server" else held
        table.add_row(str(rank), str(node)[:16], str(pid), whose)
    if len(rows) > WORKERS_SHOWN:
        table.add_row("", f"and {len(rows) - WORKERS_SHOWN} more", "", "")
    return table


def _incidents(sight: Sight) -> RenderableType:
    incidents = [event for event in sight.events if event["event"] == "incident"]
    if not incidents:
        return Text("no incidents")
    shown = incidents[-INCIDENTS_SHOWN:]
    table = Table(title=f"incidents: {len(incidents)}, the last {len(shown)}", title_justify="left")
    for head in ("ago", "step", "kind", "workers", "steps lost", "recovery"):
        table.add_column(head)
    for event in shown:
        table.add_row(
            f"{max(0, sight.now_s - event['time_s']):.0f} s",
            str(event["step"]),
            event["kind"],
            f"{event['workers_before']} to {event['workers_after']}",
            str(event["steps_lost"]),
            f"{event['recovery_s']:.2f} s",
        )
    return table
