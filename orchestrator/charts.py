"""The charts of a report, drawn with plotly from a run's history."""

import bisect
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import plotly.graph_objects as go

from orchestrator.history import STEP_PARTS, Floats, History, thin, training_shares

POINTS = 1500
ROWS = 64  # of the strip of shards: runs of neighbouring shards are drawn as one row
# Okabe and Ito 2008, "Color Universal Design": told apart with any kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C00", "#7F7F7F")
SYMBOLS = {"node_lost": "x", "node_drained": "triangle-down", "workers_joined": "triangle-up", "rebalanced": "diamond"}
HEIGHT_PX = 300


def figure(y_title: str, x_title: str = "step", height: int = HEIGHT_PX) -> Any:
    """An empty chart in the page's style; colours of text and lines are set by the page (light or dark)."""
    chart = go.Figure()
    chart.update_layout(
        height=height,
        margin={"l": 60, "r": 15, "t": 45, "b": 45},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hovermode="closest",
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "traceorder": "normal"},
        xaxis={"title": x_title, "zeroline": False},
        yaxis={"title": y_title, "zeroline": False},
    )
    return chart


def colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def add_curve(chart: Any, x: Floats, y: Floats, name: str, i: int) -> None:
    """A line through the means, over a band from the smallest to the largest value of each stretch."""
    curve = thin(x, y, POINTS)
    if len(curve.x) < len(x):
        around = np.concatenate([curve.x, curve.x[::-1]]), np.concatenate([curve.high, curve.low[::-1]])
        chart.add_scatter(
            x=rounded(around[0]),
            y=rounded(around[1]),
            fill="toself",
            mode="none",
            fillcolor=colour(i),
            opacity=0.2,
            hoverinfo="skip",
            showlegend=False,
        )
    line = {"color": colour(i), "width": 1.8}
    mode = "lines" if len(curve.x) > 1 else "markers"
    chart.add_scatter(x=rounded(curve.x), y=rounded(curve.mean), mode=mode, name=name, line=line)


def rounded(values: Floats) -> list[float]:
    """Six digits: more cannot be seen, and the page gets large."""
    return [float(f"{value:.6g}") if np.isfinite(value) else float("nan") for value in values]


def add_incidents(chart: Any, history: History, x: Floats, y: Floats) -> None:
    """A mark on the curve for every incident, with its kind and detail."""
    incidents = history.incidents
    if not incidents or not len(x):
        return
    steps = np.array([float(incident["step"]) for incident in incidents])
    kept = np.isfinite(y)
    chart.add_scatter(
        x=rounded(steps),
        y=rounded(np.interp(steps, x[kept], y[kept])),
        mode="markers",
        name="incident",
        marker={
            "symbol": [SYMBOLS.get(incident["kind"], "circle") for incident in incidents],
            "color": COLOURS[1],
            "size": 9,
            "line": {"width": 1, "color": "white"},
        },
        text=[_told(incident) for incident in incidents],
        hovertemplate="%{text}<extra></extra>",
    )


def _told(incident: dict[str, Any]) -> str:
    workers = f"{incident['workers_before']} -> {incident['workers_after']} workers"
    return f"step {incident['step']}: {incident['kind']}<br>{workers}, {incident['recovery_s']:.2f} s"


def loss_chart(histories: Sequence[History]) -> Any:
    """Training loss by step; the first history's incidents are marked."""
    chart = figure("training loss")
    for i, history in enumerate(histories):
        add_curve(chart, history.column("step"), history.column("loss"), history.name, i)
    add_incidents(chart, histories[0], histories[0].column("step"), histories[0].column("loss"))
    return chart


def taken(history: History, name: str) -> tuple[Floats, Floats]:
    """(steps, values) of a held-out metric; of a step that was evaluated again, the last value."""
    found = {e["step"]: e["metrics"][name] for e in history.of_kind("evaluated") if name in e["metrics"]}
    steps = sorted(found)
    return np.array(steps, float), np.array([found[step] for step in steps], float)


def metric_charts(histories: Sequence[History]) -> dict[str, Any]:
    """A chart for each held-out metric that one of the runs took more than once."""
    names = {name: None for history in histories for event in history.of_kind("evaluated") for name in event["metrics"]}
    charts = {}
    for name in names:
        chart, most = figure(name.replace("_", " ")), 0
        for i, history in enumerate(histories):
            steps, values = taken(history, name)
            most = max(most, len(steps))
            chart.add_scatter(
                x=rounded(steps), y=rounded(values), mode="lines+markers", name=history.name, line={"color": colour(i)}
            )
        if most > 1:
            charts[name] = chart
    return charts


def rate_chart(histories: Sequence[History]) -> Any:
    """Samples per second by step."""
    chart = figure("samples/s")
    for i, history in enumerate(histories):
        add_curve(chart, history.column("step"), history.column("samples_per_s"), history.name, i)
    y = histories[0].column("samples_per_s")
    add_incidents(chart, histories[0], histories[0].column("step"), y)
    chart.update_yaxes(rangemode="tozero")
    return chart


def moment(time_s: float) -> str:
    """Seconds since 1970 as UTC, in the form that plotly reads."""
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def spans(history: History) -> list[tuple[float, float, dict[str, Any]]]:
    """Each generation: from when, until when (seconds since 1970), its event."""
    started = history.of_kind("generation_started")
    ends = [(e["time_s"], e["time_s"]) for e in history.of_kind("generation_started", "run_ended")]
    # A command that was killed wrote nothing of its end: it was there until the last thing that it wrote.
    ends += [(e["time_s"], history.newest_before(e["time_s"])) for e in history.of_kind("run_started")]
    ends.sort()
    found = []
    for event in started:
        begin = float(event["time_s"])
        later = bisect.bisect_right(ends, begin, key=lambda end: end[0])
        found.append((begin, max(begin, float(ends[later][1] if later < len(ends) else history.last_s)), event))
    return found


def workers_chart(history: History) -> Any:
    """The number of workers over time."""
    chart = figure("workers", "time (UTC)", 220)
    x: list[str] = []
    y: list[int] = []
    for begin, end, event in spans(history):
        if x and x[-1] != moment(begin):  # nobody trained in between
            x += [x[-1], moment(begin)]
            y += [0, 0]
        x += [moment(begin), moment(end)]
        y += [event["workers"]] * 2
    chart.add_scatter(x=x, y=y, mode="lines", line={"color": COLOURS[0]}, fill="tozeroy", name="workers")
    chart.update_yaxes(rangemode="tozero", dtick=1 if max([0, *y]) < 10 else None)
    return chart


def anybodys(generation: Mapping[str, Any]) -> bool:
    """Whether a shard is no worker's in particular: with parameter servers, each takes whichever is next."""
    ranges = generation["ranges"]
    return len(ranges) > 1 and all(held == ranges[0] for held in ranges)


def shards_chart(history: History) -> Any:
    """Which worker held which shards in each generation: time to the right, shards upwards, a colour a rank."""
    shards = int(history.config.get("shards", 1))
    rows = min(shards, ROWS)
    edges: list[str] = []
    columns: list[list[float | None]] = []
    notes: list[list[str]] = []
    for begin, end, event in spans(history):
        bounds = [first * rows / shards for first, _ in event["ranges"]]
        ranks = [int(np.searchsorted(bounds, row, side="right")) - 1 for row in range(rows)]
        if edges and edges[-1] != moment(begin):  # nobody trained in between
            edges.append(moment(begin))
            columns.append([None] * rows)
            notes.append([""] * rows)
        edges += [moment(begin), moment(end)] if not edges else [moment(end)]
        columns.append([rank % len(COLOURS) + 0.5 for rank in ranks])
        whose = [f"rank {rank}" for rank in ranks]
        if anybodys(event):
            columns[-1], whose = [0.5] * rows, ["any worker"] * rows
        notes.append([f"generation {event['generation']}, {who}" for who in whose])
    chart = figure(
        "shard" if rows == shards else f"shards (rows of {shards // rows})", "time (UTC)", min(520, 140 + 12 * rows)
    )
    scale = [[i / len(COLOURS), COLOURS[i]] for i in range(len(COLOURS))]
    stepped = [[(i + k) / len(COLOURS), c] for i, (_, c) in enumerate(scale) for k in (0, 1)]
    chart.add_heatmap(
        x=edges,
        y=[row * shards / rows for row in range(rows + 1)],
        z=[list(row) for row in zip(*columns, strict=True)],
        text=[list(row) for row in zip(*notes, strict=True)],
        zmin=0,
        zmax=len(COLOURS),
        colorscale=stepped,
        showscale=False,
        ygap=1 if rows <= 32 else 0,
        hovertemplate="%{text}<extra></extra>",
    )
    return chart


def shares_chart(history: History) -> Any:
    """Where the time of steps goes, over the run."""
    chart = figure("share of a step")
    steps = history.column("step")
    total = np.zeros(len(steps))
    for i, (name, key) in enumerate(STEP_PARTS.items()):
        if key not in history.steps:
            continue
        total = total + history.column(key)
        _stack(chart, steps, history.column(key), name, i)
    _stack(chart, steps, np.clip(1.0 - total, 0.0, 1.0), "optimizer and the rest", len(STEP_PARTS))
    chart.update_yaxes(range=[0, 1], tickformat=".0%")
    return chart


def _stack(chart: Any, x: Floats, y: Floats, name: str, i: int) -> None:
    curve = thin(x, y, POINTS // 4)
    chart.add_scatter(
        x=rounded(curve.x),
        y=rounded(curve.mean),
        stackgroup="shares",
        mode="lines",
        line={"width": 0.5, "color": colour(i)},
        name=name,
    )


def shares_told(history: History) -> str:
    """The same in words."""
    return ", ".join(f"{name} {share:.1%}" for name, share in training_shares(history).items())
