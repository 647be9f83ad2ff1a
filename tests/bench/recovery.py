"""Seconds from a fault to the next committed step, and steps lost, against plain Ray Train (baseline_recovery.py).

    python tests/bench/recovery.py --out recovery.json
    python tests/bench/recovery.py --faults kill drain --workers 2 --workloads resnet18 --repeats 3

A local cluster with a node of one CPU for each worker and a spare one; either side trains on one of its own. Faults
come one after the other, each when the run has all its workers:

    kill        SIGKILL to the process of a rank
    freeze      SIGSTOP to it; what goes beyond --stall-limit counts
    node-loss   SIGKILL to all processes of a rank's node
    drain       notice that a rank's node goes in 60 s; it is shut down when the rank has left it, or then. What
                counts is the stall: the longest time between two steps around it, less a median step

Ours trains with --checkpoint-every 1000000: there is nothing to restore from storage. Targets for the median, a step
being the median one of the workers that are left: kill and freeze <= 0.5 s + a step, node-loss <= 1.5 s + a step,
drain <= 0.5 s; and no committed step lost.
"""

import json
import shutil
import statistics
import sys
import tempfile
import traceback
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import commands
import nodes
import paired
from faults import FAULTS, Breaker, Record, Run, Tail

WORKLOADS = {"resnet18": "resnet", "bert-mini": "bert"}
FIGURES = {"kill": "recovery_s", "freeze": "beyond_limit_s", "node-loss": "recovery_s", "drain": "stall_s"}
BOUNDS_S = {"kill": 0.5, "freeze": 0.5, "node-loss": 1.5, "drain": 0.5}
UNITS = {
    "recovery_s": "s from the fault to the next committed step",
    "beyond_limit_s": "s from the fault to the next committed step, less --stall-limit",
    "stall_s": "s between two steps around the notice, the longest, less a median step",
}
PHASES = ("detect_s", "regroup_s", "restore_s", "recompute_s")
NEVER = "1000000"
START_LIMIT_S = 300.0
STOP_LIMIT_S = 120.0
STOPPED = 130  # exit status of our command after a signal
DIFFERENCES = [
    "ours goes on with the workers that are left until another joins; baseline (num_workers=N, max_failures=-1, Ray's "
    "other defaults) starts all again from the newest of its checkpoints, one every 10 steps",
    "baseline's seconds end with its first optimizer step, though it may have taken that one before: steps_repeated",
    "baseline, freeze: Ray Train notices after 600 s; the benchmark kills the process after --baseline-limit",
]


@dataclass
class Found:
    """What became of one run: its faults' figures, the incidents that it wrote down, and why it broke off, if so."""

    faults: list[Record] = field(default_factory=list)
    incidents: list[Record] = field(default_factory=list)
    error: str = ""


def ours(settings: Namespace, workload: str, workers: int, data: Path, folder: Path, address: str) -> Run:
    """Start our command line."""
    arguments = [
        "--address", address, "--workers", f"1:{workers}", "--steps", NEVER, "--checkpoint-every", NEVER,
        "--batch-size", str(settings.batch_size), "--shards", str(settings.shards), "--precision", "fp32",
        "--stall-limit", str(settings.stall_limit), "--resources-per-worker", "CPU=1", "--threads", "1",
        "--max-incidents", NEVER, "--lr", "0.001", "--storage", str(folder), "--name", "run",
    ]  # fmt: skip
    if workload == "resnet18":
        arguments += ["--model", "resnet18", "--data", f"cifar10:{data}"]
    else:
        arguments += ["--model", "mini", "--sequence-length", "128"]
    process = commands.start(["-m", "orchestrator.run", WORKLOADS[workload], *arguments], folder)
    # Steps first: the generation of a step that was read is then known from the events.
    return Run(process, folder, [Tail(folder / "run" / name) for name in ("metrics.jsonl", "events.jsonl")])


def baseline(settings: Namespace, workload: str, workers: int, data: Path, folder: Path, address: str) -> Run:
    """Start plain Ray Train."""
    log = folder / "steps.jsonl"
    arguments = [
        workload, "--address", address, "--workers", str(workers), "--log", str(log), "--data", str(data),
        "--storage", str(folder / "ray-train"), "--batch-size", str(settings.batch_size),
    ]  # fmt: skip
    script = str(commands.BENCH / "baseline_recovery.py")
    return Run(commands.start([script, *arguments], folder, RAY_AUTH_MODE="token"), folder, [Tail(log)])


@contextmanager
def ending(run: Run) -> Iterator[Run]:
    """Its processes are gone at the end."""
    try:
        yield run
    finally:
        run.process.kill()
        run.process.wait()


def stop(run: Run) -> list[Record]:
    """Ask our command to stop; returns the incidents of result.json."""
    run.process.terminate()
    if (status := run.process.wait(STOP_LIMIT_S)) != STOPPED:
        raise RuntimeError(f"exit status {status} instead of {STOPPED} after SIGTERM")
    result = json.loads((run.folder / "run" / "result.json").read_text())
    return list(result["incidents"])


def train(settings: Namespace, start: Callable[..., Run], workload: str, workers: int, data: Path) -> Found:
    """One run of one side, with all its faults; an error ends it and is kept, with what was found before."""
    found, is_ours = Found(), start is ours
    limit_s, repeats = (
        (settings.limit, settings.repeats) if is_ours else (settings.baseline_limit, settings.baseline_repeats)
    )
    if not repeats:
        return found
    paired.say(f"{workload}, {workers} workers, {start.__name__}: {repeats} x {', '.join(settings.faults)}")
    with (
        commands.visit() as folder,
        nodes.cluster(folder, workers + 1) as cluster,
        ending(start(settings, workload, workers, data, folder, cluster.address)) as run,
    ):
        try:
            breaker = Breaker(run, cluster, workers, limit_s, is_ours)
            breaker.become_whole(limit_s=START_LIMIT_S)
            for _, fault in product(range(repeats), settings.faults):
                found.faults.append(breaker.strike(fault))
            found.incidents = stop(run) if is_ours else []
        except Exception as error:  # what was measured is kept, and the other runs are made
            traceback.print_exc()
            found.error, found.incidents = f"{type(error).__name__}: {error}", run.incidents
            paired.say(f"broke off: {found.error}\n{commands.said(folder)}")
            if settings.keep_logs:
                keep_logs(folder, settings.keep_logs / f"{workload}-{workers}-{start.__name__}")
    return found


def keep_logs(folder: Path, kept: Path) -> None:
    """Copy what the run and Ray have said."""
    for file in folder.rglob("*"):
        said = file.suffix in (".log", ".out", ".err", ".jsonl", ".json") or file.name in ("stdout", "stderr")
        if said and file.is_file() and not file.is_symlink():
            target = kept / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    paired.say(f"logs: {kept}")


def summary(settings: Namespace, name: str, fault: str, mine: Found, theirs: Found) -> dict[str, Any]:
    """The comparison of one fault in one run of either side."""
    faults = [with_incident(f, mine.incidents, settings.stall_limit) for f in mine.faults if f["fault"] == fault]
    report: dict[str, Any] = {"comparison": f"{name}, {fault}", "unit": UNITS[FIGURES[fault]], "met": False}
    if mine.error or theirs.error:
        report["broke_off"] = {"ours": mine.error, "baseline": theirs.error}
    if not faults:
        return report
    seconds = [f[FIGURES[fault]] for f in faults]
    step_s = statistics.median(f["step_s_after"] for f in faults)
    target = paired.Target(round(BOUNDS_S[fault] + (0.0 if fault == "drain" else step_s), 3), at_least=False)
    lost = sum(f["steps_lost"] for f in faults if f["incident"])
    known = all(f["incident"] for f in faults)
    against = compared_with(fault, faults, [f for f in theirs.faults if f["fault"] == fault])
    return report | {
        "median": round(statistics.median(seconds), 3),
        "worst": max(seconds),
        "target": str(target) if fault == "drain" else f"{target} ({BOUNDS_S[fault]:g} s + a step)",
        "met": target.met(statistics.median(seconds)) and known and not lost and len(seconds) == settings.repeats,
        "steps_lost": lost if known else None,
        "seconds": seconds,
        "step_s_before": median(f["step_s_before"] for f in faults),
        "step_s_after": median(f["step_s_after"] for f in faults),
        "phases": {phase: median(f.get(phase) for f in faults) for phase in PHASES},
        "incidents": Counter(f["incident"] for f in faults),
        "whole_s": median(f["whole_s"] for f in faults),
        "join_stall_s": median(f["join_stall_s"] for f in faults),
        **against,
        "faults": faults,
        "differences": DIFFERENCES,
    }


def with_incident(found: Record, incidents: Sequence[Record], stall_limit_s: float) -> Record:
    """A fault's figures with those of the incident that it led to: the one that its first new generation ended."""
    own = next((i for i in incidents if i["generation"] >= found["generation"]), None)
    told = {key: own[key] for key in (*PHASES, "steps_lost", "detail")} if own else {}
    beyond_s = round(found["recovery_s"] - stall_limit_s, 3)
    return {**found, "beyond_limit_s": beyond_s, "incident": own["kind"] if own else "", **told}


def compared_with(fault: str, mine: Sequence[Record], theirs: Sequence[Record]) -> dict[str, Any]:
    """The baseline's figures and the ratio of the medians, None where the baseline did not go on in time."""
    if not theirs:
        return {}
    key = "stall_s" if fault == "drain" else "recovery_s"
    ours_s, baseline_s = median(f[key] for f in mine), median(f[key] for f in theirs)
    return {
        "ratio": round(ours_s / baseline_s, 4) if ours_s is not None and baseline_s else None,
        "baseline": {
            "median": baseline_s,
            "seconds": [f[key] for f in theirs],
            "not_within_s": [f["not_within_s"] for f in theirs if f[key] is None],
            "to_a_new_step_s": [f["new_step_s"] for f in theirs],
            "steps_repeated": [f["steps_repeated"] for f in theirs],
            "faults": list(theirs),
        },
    }


def median(values: Iterable[float | None]) -> float | None:
    """Of those that there are."""
    there = [value for value in values if value is not None]
    return round(statistics.median(there), 4) if there else None


def main() -> None:
    parser = paired.parser(__doc__ or "", visits=None)

    def several(name: str, allowed: Sequence[str], default: Sequence[str], text: str) -> None:
        parser.add_argument(name, nargs="+", choices=allowed, default=list(default), help=text)

    several("--faults", FAULTS, FAULTS, "in this order, --repeats times [all]")
    several("--workers", ("2", "3", "4"), ("2", "3"), "[2 3]")
    several("--workloads", list(WORKLOADS), list(WORKLOADS), "[both]")
    parser.add_argument("--repeats", type=int, default=10, help="of each fault in ours [10]")
    parser.add_argument("--baseline-repeats", type=int, default=1, help="of each fault in the baseline [1]")
    parser.add_argument("--batch-size", type=int, default=32, help="global batch of either side [32]")
    parser.add_argument("--shards", type=int, default=8, help="ours [8]")
    parser.add_argument("--stall-limit", type=float, default=5.0, help="ours, seconds [5]")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds in which ours has to go on [180]")
    parser.add_argument("--baseline-limit", type=float, default=240.0, help="the same of the baseline [240]")
    parser.add_argument("--keep-logs", type=Path, help="folder for the logs of a run that broke off")
    settings = parser.parse_args()
    report = paired.header("recovery", settings)
    report["comparisons"] = []
    with tempfile.TemporaryDirectory(prefix="bench-data-") as scratch:
        data = commands.write_cifar10(Path(scratch))
        for workload, workers in product(settings.workloads, map(int, settings.workers)):
            mine, theirs = (train(settings, start, workload, workers, data) for start in (ours, baseline))
            name = f"{workload}, {workers} workers"
            report["comparisons"] += [summary(settings, name, fault, mine, theirs) for fault in settings.faults]
            if settings.out:  # it takes long: what there is, is there
                settings.out.write_text(json.dumps(report, indent=1) + "\n")
    paired.emit(report, settings.out)
    if any("broke_off" in comparison for comparison in report["comparisons"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
