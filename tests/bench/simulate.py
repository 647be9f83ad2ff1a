"""What planning costs with thousands of workers, and the goodput of large clusters whose nodes fail: simulated.

    nice python tests/bench/simulate.py --out simulation.json --table simulation.md --plot simulation.svg
    python tests/bench/simulate.py --parts planning --repeats 9

planning    CPU time of single decisions of orchestrator/balance.py and recovery.py; <= 50 ms
clusters    goodput by number of nodes, rate of failures and way to recover (cluster_model.py)
slower      the same at 1,000 nodes, should our stalls, measured with 2 workers, take 3, 10 and 30 times as long there
rates       goodput over the rate of failures at 1,000 nodes: the plot

Ways to recover: ours; ours with a checkpoint an hour on top (--every-s); a restart of the whole group from its last
checkpoint, with fewer nodes or when all are there again, and checkpoints at Daly's optimum interval.

Measured: the stalls, by recovery.py (--reports). Published: 6.50 (RSC-1) and 2.34 (RSC-2) failures in 1,000 node-days
of two clusters: Kokolis et al., Revisiting Reliability in Large-Scale Machine Learning Research Clusters, HPCA 2025,
arXiv:2410.21680. Assumed: all else; what may matter has a flag. Assumed of "spot": each node is taken away once a day
on average (Google's preemptible machines live 24 h at most), with two minutes' notice (as on Amazon EC2).
"""

import dataclasses
import math
import os
import random
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import paired
from cluster_model import LOSSES, Cluster, Costs, Restarting, measured, newest, outages
from elastic_model import Elastic

from orchestrator import balance
from orchestrator.recovery import SETTLE_S, START_GRACE_S, Member, Roster

LIMIT_MS = paired.Target(50.0, at_least=False)
HOPELESS_MS = 2000.0  # what takes as long is timed once
NODES = (100, 1000, 4000)
PUBLISHED = {"RSC-2": 2.34, "RSC-1": 6.50}
SCENARIOS: dict[str, dict[str, float]] = {
    **{name: {"rate": rate} for name, rate in PUBLISHED.items()},
    "spot": {"rate": 1000.0, "notice_s": 120.0},
}
AT_1000: dict[str, dict[str, float]] = {
    "RSC-1, none replaced": {"rate": PUBLISHED["RSC-1"], "provision_s": math.inf},
    "RSC-1, checkpoints in 3 s": {"rate": PUBLISHED["RSC-1"], "checkpoint_s": 3.0},
    "RSC-1, a machine flaps": {"rate": PUBLISHED["RSC-1"], "flapping": 1},
}
FACTORS = (3, 10, 30)
RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
OURS, OURS_SAVING, FEWER, WAITS = "ours", "ours + checkpoints", "restart with fewer", "restart with all"
STYLES = {  # Okabe and Ito's colours, which colour-blind people can tell apart
    OURS: ("#0072B2", "o", "-"),
    OURS_SAVING: ("#56B4E9", "s", "--"),
    FEWER: ("#E69F00", "^", "-"),
    WAITS: ("#D55E00", "v", "--"),
}
Record = dict[str, Any]


def roster(workers: int, missing: int = 0) -> Roster:
    """All but so many wait for the first generation."""
    made = Roster(workers // 2, workers, workers)
    for number in range(workers - missing):
        made.join(Member(f"w{number}", f"n{number}", 1, "cpu", -1, -1, ("", 1), f"h{number}"), 0.0)
    return made


def training(workers: int, joiners: int = 0) -> Roster:
    """So many train, and others came when they did."""
    made = roster(workers, missing=joiners)
    for rank, member in enumerate(made.form(START_GRACE_S) or []):
        made.seated[member.id] = dataclasses.replace(member, rank=rank, step=1)
    for number in range(joiners):
        made.join(Member(f"j{number}", f"m{number}", 1, "cpu", -1, -1, ("", 1), f"m{number}"), START_GRACE_S)
    return made


def lose_one(at: Roster) -> None:
    """A worker is lost, all others come back for the next generation."""
    at.lose(next(iter(at.seated)))
    for member in list(at.seated.values()):
        at.join(member, START_GRACE_S)
    assert at.form(START_GRACE_S)


def decisions(workers: int, shards: int, seed: int) -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """Name -> what makes the situation, and the decision in it."""
    chance = random.Random(seed)
    # A few percent of spread, and one in a hundred is half as fast.
    seconds = [chance.gauss(1, 0.03) * (2 if number % 100 == 0 else 1) for number in range(workers)]
    paces = [balance.ShardPace(s, 10.0) for s in seconds]
    even = [shards * (n + 1) // workers - shards * n // workers for n in range(workers)]
    later = START_GRACE_S + 2 * SETTLE_S
    return {
        "balance.shares": (lambda: [1 / s for s in seconds], lambda speeds: balance.shares(shards, speeds)),
        "balance.speeds, placement": (
            lambda: [0.0] * workers,
            lambda declared: balance.placement(shards, balance.speeds(paces, declared)),
        ),
        "balance.better": (lambda: even, lambda counts: balance.better(counts, paces, 10.0, 10_000, 0.5)),
        "balance.stragglers": (lambda: paces, lambda known: balance.stragglers(shards, known)),
        "Roster.form, not yet: one is awaited": (lambda: roster(workers, missing=1), lambda r: r.form(SETTLE_S)),
        "Roster.form, the first": (lambda: roster(workers), lambda r: r.form(SETTLE_S)),
        "Roster.lose, join by all others, form": (lambda: training(workers), lose_one),
        "Roster.wants_pause, 1 joiner": (lambda: training(workers, 1), lambda r: r.wants_pause(later)),
        "Roster.wants_pause, half are joiners": (
            lambda: training(workers, workers // 2),
            lambda r: r.wants_pause(later),
        ),
    }


def planning(settings: Namespace) -> Iterator[Record]:
    """Milliseconds of each decision; CPU time, for the machine is shared and a decision waits for nothing."""
    for name, (prepare, decide) in decisions(settings.workers, settings.shards, settings.seed).items():
        found: list[float] = []
        for _ in range(settings.repeats):
            situation, begun_s = prepare(), time.process_time()
            decide(situation)
            found.append(round(1000 * (time.process_time() - begun_s), 3))
            if found[-1] > HOPELESS_MS:
                break
        median = statistics.median(found)
        paired.say(f"{name}: {median:.1f} ms")
        yield {
            "comparison": f"{name}; {settings.workers} workers, {settings.shards} shards",
            "unit": "ms of CPU time",
            "median": median,
            "worst": max(found),
            "target": str(LIMIT_MS),
            "met": LIMIT_MS.met(median),
            "ms": found,
        }


def cluster(settings: Namespace, nodes: int, **scenario: Any) -> Cluster:
    """As the flags say; for as many days as the failures that are enough take."""
    keys = ("provision_s", "step_s", "checkpoint_s", "minimum", "seed")
    made = Cluster(nodes, **{**{key: getattr(settings, key) for key in keys}, **scenario})
    return dataclasses.replace(made, days=min(settings.days, settings.most_failures / made.failures_a_day))


def outcomes(settings: Namespace, costs: Costs, of: Cluster, ways: Iterable[str] = tuple(STYLES)) -> Iterator[Record]:
    """What becomes of a cluster's time, by the way to recover."""
    absences = outages(of)
    ours = Elastic(of, costs, absences).run()
    saving = ours.with_checkpoints(settings.every_s, of.checkpoint_s)
    for way in ways:
        if way in (OURS, OURS_SAVING):
            ledger = ours if way == OURS else saving
        else:
            ledger = Restarting(of, costs.restart_s, absences, fewer=way == FEWER).run()
        yield {
            "nodes": of.nodes,
            "failures_in_1000_node_days": of.rate,
            "way": way,
            "goodput": round(ledger.goodput, 5),
            "failures": len(absences),
            "days": round(of.days, 3),
            "seconds": {cause: round(seconds, 3) for cause, seconds in ledger.seconds.items()},
        }


def clusters(settings: Namespace, costs: Costs) -> Iterator[Record]:
    """The table."""
    for name, scenario in {**SCENARIOS, **AT_1000}.items():
        for nodes in (1000,) if name in AT_1000 else NODES:
            paired.say(f"{nodes} nodes, {name}")
            for record in outcomes(settings, costs, cluster(settings, nodes, **scenario)):
                yield {"scenario": name, **record}


def slower(settings: Namespace, costs: Costs) -> Iterator[Record]:
    """The same, if our stalls take so many times as long."""
    for name, factor in ((name, factor) for name in ("RSC-1", "spot") for factor in FACTORS):
        paired.say(f"1000 nodes, {name}, stalls x {factor}")
        found = outcomes(settings, costs.times(factor), cluster(settings, 1000, **SCENARIOS[name]), (OURS, OURS_SAVING))
        for record in found:
            yield {"scenario": f"{name}, stalls x {factor}", **record}


def rates(settings: Namespace, costs: Costs) -> Iterator[Record]:
    """The plot's points; no failure gives notice."""
    for rate in RATES:
        paired.say(f"1000 nodes, {rate} failures in 1,000 node-days")
        yield from outcomes(settings, costs, cluster(settings, 1000, rate=float(rate)))


def table(records: Iterable[Record]) -> str:
    """Markdown; what was lost in percent of the time."""
    heads = ["nodes", "scenario", "failures", "way", "goodput", *(f"{cause} %" for cause in LOSSES)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for r in records:
        total_s = sum(r["seconds"].values())
        lost = [f"{100 * r['seconds'][cause] / total_s:.3f}" if r["seconds"][cause] else "" for cause in LOSSES]
        row = [f"{r['nodes']:,}", r["scenario"], str(r["failures"]), r["way"], f"{100 * r['goodput']:.2f} %", *lost]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def plot(records: list[Record], file: Path) -> None:
    """Goodput over the rate of failures, a line for each way."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "simulate"  # the same points give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for way, (colour, marker, line) in STYLES.items():
        points = [(r["failures_in_1000_node_days"], 100 * r["goodput"]) for r in records if r["way"] == way]
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=line, label=way)
    for name, rate in PUBLISHED.items():
        axes.axvline(rate, color="0.5", linestyle=":", zorder=0)
        axes.text(rate, 2, f"{name}, {rate:.2f}", rotation=90, va="bottom", ha="right", color="0.3")
    axes.set(xscale="log", xlim=(RATES[0], RATES[-1]), ylim=(0, 101))
    axes.set_xticks(RATES[::3], [f"{rate:,}" for rate in RATES[::3]])
    axes.set(xlabel="failures in 1,000 node-days", ylabel="goodput, % of 1,000 nodes without failures")
    axes.set_title("1,000 nodes that fail, simulated from measured recoveries")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(file, format="svg", metadata={"Date": None})


def parsed() -> Namespace:
    parser = paired.parser(__doc__ or "", visits=None)
    parts = ("planning", "clusters", "slower", "rates")
    parser.add_argument("--parts", type=paired.words(parts), default=list(parts), help="separated by commas [all]")
    parser.add_argument("--reports", nargs="+", help="of recovery.py [the newest in results/]")
    parser.add_argument("--measured", default="resnet18, 2 workers", help="its comparisons that count [%(default)s]")
    parser.add_argument("--table", type=Path, help="write the table to this file, not to stderr")
    parser.add_argument("--plot", type=Path, help="write the plot to this SVG file; needs matplotlib")
    for name, default, text in (
        ("--workers", 10_000, "of planning"),
        ("--shards", 65_536, "of planning"),
        ("--repeats", 5, "of each decision"),
        ("--days", 30.0, "simulated, unless there are --most-failures sooner"),
        ("--most-failures", 200, "of one simulation, on average"),
        ("--provision-s", 300.0, "until a lost node is replaced; inf: never"),
        ("--step-s", 10.0, "of a step with all nodes"),
        ("--checkpoint-s", 30.0, "for which training stands still at a checkpoint"),
        ("--every-s", 3600.0, f"between checkpoints of '{OURS_SAVING}'"),
        ("--minimum", 0.5, "share of the nodes without which training waits"),
        ("--seed", 0, "of all random numbers"),
    ):
        parser.add_argument(name, type=type(default), default=default, help=f"{text} [{default}]")
    settings = parser.parse_args()
    if settings.plot and "rates" not in settings.parts:
        parser.error("--plot shows the part rates: add it to --parts")
    if settings.plot and not find_spec("matplotlib"):
        parser.error("--plot needs matplotlib, which is not installed: pip install matplotlib")
    settings.reports = [os.path.relpath(path) for path in settings.reports or newest(settings.measured)]
    return settings


def main() -> None:
    settings = parsed()
    costs = measured(map(Path, settings.reports), settings.measured)
    if costs is None:
        sys.exit(f"no node-loss with its baseline and drain of {settings.measured!r}: give --reports of recovery.py")
    report = paired.header("simulate", settings) | {"measured": dataclasses.asdict(costs)}
    report["comparisons"] = list(planning(settings)) if "planning" in settings.parts else []
    for part in (clusters, slower, rates):
        report[part.__name__] = list(part(settings, costs)) if part.__name__ in settings.parts else []
    lines = table(report["clusters"] + report["slower"])
    if settings.table:
        settings.table.write_text(lines)
    else:
        paired.say(f"\n{lines}")
    if settings.plot:
        plot(report["rates"], settings.plot)
    paired.emit(report, settings.out)


if __name__ == "__main__":
    main()
