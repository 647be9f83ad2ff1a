"""`python -m orchestrator.report runs/NAME`: one self-contained HTML page of a run, built from its folder alone.

Exit status: 0 written; 2 there is no run, or the page cannot be written.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator import spoken
from orchestrator.charts import (
    anybodys,
    loss_chart,
    metric_charts,
    moment,
    rate_chart,
    shards_chart,
    shares_chart,
    shares_told,
    spans,
    workers_chart,
)
from orchestrator.command import Parser, leave, refuse
from orchestrator.errors import OrchestratorError, UserError
from orchestrator.failure import Failure
from orchestrator.history import History, read_history

PHASES = ("detect_s", "regroup_s", "restore_s", "recompute_s")
SHOWN_WORKERS = 16  # of a generation in its table


def section(title: str, **content: Any) -> dict[str, Any]:
    """A part of the page: charts, tables, a text, a note."""
    identifier = title.lower().replace(" ", "-")
    return {"title": title, "id": identifier, "charts": [], "tables": [], "text": "", "note": ""} | content


def chart(identifier: str, caption: str, spoken: str, drawn: Any) -> dict[str, str]:
    """A chart, what it shows in words, and in numbers for a screen reader."""
    content = json.loads(drawn.to_json())
    content["layout"].pop("template", None)
    return {"id": identifier, "caption": caption, "spoken": spoken, "json": json.dumps(content).replace("</", "<\\/")}


def table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[Any]], folded: bool = False) -> dict[str, Any]:
    """A table; numbers are set to the right."""
    return {"caption": caption, "heads": heads, "rows": rows, "folded": folded}


def facts(history: History) -> list[tuple[str, str]]:
    """What is at the top of the page."""
    result, done = history.result or {}, len(history.column("step"))
    total = history.total_steps
    steps = int(history.column("step")[-1]) if done else 0
    found = [
        ("workload", str(history.config.get("workload", ""))),
        ("steps", f"{steps:,} of {total:,}" if total else f"{steps:,}"),
        ("wall time", duration(history.worked_s)),
        ("incidents", str(len(history.incidents))),
        ("generations", str(len(history.of_kind("generation_started")))),
    ]
    if "samples_per_s" in result:
        found += [
            (f"samples per second{of_last(history)}", f"{result['samples_per_s']:,.0f}"),
            (f"goodput{of_last(history)}", f"{result['goodput']:.1%}"),
        ]
    found += [(name.replace("_", " "), f"{value:.4f}") for name, value in result.get("metrics", {}).items()]
    return found


def of_last(history: History) -> str:
    """What result.json tells is told of the last command alone."""
    return " of the last command" if len(history.of_kind("run_started")) > 1 else ""


def duration(seconds: float) -> str:
    """Such as 1 h 02 min, 3 min 04 s, 5.6 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def failure_section(failure: Failure) -> dict[str, Any]:
    """What failed, where, the worker's last lines, and how to go on."""
    rows = [["what", failure.error], ["kind", failure.kind.replace("_", " ")], ["where", failure.where]]
    rows += [["kept", failure.kept], ["resume with", failure.resume]]
    text = "\n".join(failure.log_tail)
    note = "Above are the last lines of the worker's log." if text else ""
    return section("What failed", tables=[table("The failure", ["", ""], rows)], text=text, note=note)


def training_section(histories: Sequence[History]) -> dict[str, Any]:
    """Loss, metrics, rate."""
    first = histories[0]
    losses = first.column("loss")
    if not len(losses):
        return section("Training", note="No step has been committed yet.")
    incidents = f"; {len(first.incidents)} incidents are marked" if first.incidents else ""
    told = f"Training loss by step: from {losses[0]:.4f} to {losses[-1]:.4f}{incidents}."
    charts = [chart("loss", told, spoken.column(histories, "loss"), loss_chart(histories))]
    for name, drawn in metric_charts(histories).items():
        caption = f"Held-out {name.replace('_', ' ')} by step."
        charts.append(chart(f"metric-{name}", caption, spoken.metric(histories, name), drawn))
    rate = spoken.column(histories, "samples_per_s")
    charts.append(chart("rate", "Samples per second by step.", rate, rate_chart(histories)))
    evaluated = first.of_kind("evaluated")
    names = list(dict.fromkeys(name for event in evaluated for name in event["metrics"]))
    rows = [[event["step"], *(round(event["metrics"].get(n, float("nan")), 5) for n in names)] for event in evaluated]
    tables = [table("Held-out metrics", ["step", *names], rows, folded=len(rows) > 5)] if rows else []
    return section("Training", charts=charts, tables=tables)


def workers_section(history: History) -> dict[str, Any]:
    """Workers over time, and which shards each held."""
    generations = spans(history)
    if not generations:
        return section("Workers", note="No worker has begun to train yet.")
    counts = [event["workers"] for _, _, event in generations]
    workers = f"Workers over time: {min(counts)} to {max(counts)}, in {len(counts)} generations."
    held = "Which worker held which shards: time to the right, shards upwards, a colour for each rank."
    rows = [
        [e["generation"], moment(begin), e["step"], e["workers"], held_by(e)] for begin, _, e in generations
    ]  # fmt: skip
    heads = ["generation", "began (UTC)", "step", "workers", "shards of each worker"]
    return section(
        "Workers",
        charts=[
            chart("workers", workers, spoken.workers(history), workers_chart(history)),
            chart("shards", held, spoken.shards(history), shards_chart(history)),
        ],
        tables=[table("Generations", heads, rows, folded=True)],
    )


def held_by(generation: dict[str, Any]) -> str:
    """Shards, node and process of each worker of a generation."""
    parts = [
        f"{'any shard' if anybodys(generation) else f'{first}-{after - 1}'} {node} ({pid})"
        for (first, after), node, pid in zip(
            generation["ranges"], generation["nodes"], generation["pids"], strict=True
        )
    ]  # fmt: skip
    more = len(parts) - SHOWN_WORKERS
    return ", ".join(parts[:SHOWN_WORKERS]) + (f" and {more} more" if more > 0 else "")


def incidents_section(history: History) -> dict[str, Any]:
    """A line for each incident, with the seconds of its phases."""
    if not history.incidents:
        return section("Incidents", note="None.")
    heads = ["time (UTC)", "step", "kind", "workers", "steps lost", *(p.replace("_s", " s") for p in PHASES)]
    rows = [
        [
            moment(event["time_s"]),
            event["step"],
            event["kind"],
            f"{event['workers_before']} to {event['workers_after']}",
            event["steps_lost"],
            *(round(event[phase], 3) for phase in PHASES),
            round(event["recovery_s"], 3),
            event["detail"],
        ]
        for event in history.incidents
    ]
    lost = sum(event["steps_lost"] for event in history.incidents)
    caption = f"{len(rows)} incidents, {lost} committed steps lost, seconds per phase"
    return section("Incidents", tables=[table(caption, [*heads, "recovery s", "what is known"], rows)])


def time_section(history: History) -> dict[str, Any]:
    """Goodput and the parts of a step."""
    if not len(history.column("step_s")):
        return section("Where the time goes", note="No step has been committed yet.")
    wall_s = history.worked_s
    useful_s = float(history.column("step_s").sum())
    goodput = (history.result or {}).get("goodput", useful_s / wall_s if wall_s else 0.0)
    told = f"Parts of a step, over the run. In all: {shares_told(history)}."
    of = of_last(history) if history.result else " so far"
    note = f"Goodput{of}, the share of wall time that went into steps that count: {goodput:.1%}."
    drawn = chart("shares", told, spoken.shares(history), shares_chart(history))
    return section("Where the time goes", charts=[drawn], note=note)


def comparison_section(histories: Sequence[History]) -> dict[str, Any]:
    """The runs side by side, and the settings in which they differ."""
    heads = ["run", "outcome", "steps", "wall time", "incidents", "weights"]
    rows = [
        [
            history.name,
            history.outcome,
            len(history.column("step")),
            duration(history.worked_s),
            len(history.incidents),
            (history.result or {}).get("weights_sha256", "")[:16],
        ]
        for history in histories
    ]
    hashes = {(history.result or {}).get("weights_sha256") or history.uri for history in histories}
    names = sorted({name for history in histories for name in history.config})
    differing = [
        [name, *(str(history.config.get(name, "")) for history in histories)]
        for name in names
        if len({str(history.config.get(name, "")) for history in histories}) > 1
    ]
    settings = table("Settings in which they differ", ["setting", *(h.name for h in histories)], differing)
    note = "All ended with the same weights." if len(hashes) == 1 else "They did not all end with the same weights."
    return section("Comparison", tables=[table("Runs", heads, rows), settings], note=note)


def plan_section(history: History) -> dict[str, Any]:
    """What was asked for: the plan in a line each, then the complete configuration."""
    started = history.of_kind("run_started")
    rows = [
        [moment(event["time_s"]), event["data"], event["total_steps"], event["shards"], event["batch_size"],
         "resumed" if event["resumed"] else "begun"]
        for event in started
    ]  # fmt: skip
    heads = ["time (UTC)", "data", "steps", "shards", "global batch", "this command"]
    lines = "\n".join(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in history.config.items())
    return section("Plan and configuration", tables=[table("Commands", heads, rows)], text=lines)


def page(histories: Sequence[History]) -> str:
    """The whole page of the first history, the others beside it."""
    import jinja2
    from plotly.offline import get_plotlyjs

    history = histories[0]
    ended = history.of_kind("run_ended")
    sections = [failure_section(history.failure)] if history.failure else []
    sections += [training_section(histories), workers_section(history), incidents_section(history)]
    sections += [time_section(history), plan_section(history)]
    if len(histories) > 1:
        sections.insert(0, comparison_section(histories))
    source = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(source)
    return template.render(
        name=history.name,
        outcome=history.outcome,
        reason=ended[-1]["reason"] if ended and history.result else "",
        sha256=(history.result or {}).get("weights_sha256", ""),
        facts=facts(history),
        sections=sections,
        uri=history.uri,
        read_at=moment(history.read_s)[:19],
        plotly=get_plotlyjs(),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = Parser(
        prog="python -m orchestrator.report",
        description="One self-contained HTML page of a run: finished, going on, or broken off.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="the run's folder, such as runs/NAME or s3://bucket/runs/NAME")
    parser.add_argument("--compare", metavar="RUN", nargs="+", default=[], help="other runs, drawn beside it")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("report.html"), help="the page to write")
    try:
        settings = parser.parse_args(arguments)
        histories = [read_history(uri) for uri in (settings.run, *settings.compare)]
        text = page(histories)
        try:
            settings.out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {settings.out}: cannot be written ({error.strerror}); give another file") from None
    except OrchestratorError as error:
        return refuse(error)
    print(f"{histories[0].name}: {histories[0].outcome}; open {settings.out.absolute()} in a browser")
    return 0


if __name__ == "__main__":
    leave(main)
