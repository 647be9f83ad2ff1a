"""What it costs to be elastic while nothing happens: our command line against its own loop alone (bare_loop.py).

    python tests/bench/elastic_cost.py --out elastic_cost.json

Both sides compute the same bits, which is checked. Ours also beats, measures its pace, asks whether to pause, keeps
records and sends them; its coordinator, Ray Train's controller and Ray share the machine with the workers, as on
the first day. Workers leave some of the cores to them (--workers 1 on 2 cores) or none (--workers 2). What is
compared is the median step. Target: at most 1 % more.
"""

import json
import statistics
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import commands
import paired

from orchestrator.own_ray import MALLOC

Measure = Callable[[Namespace, str, int, Path], dict[str, Any]]
TARGET = paired.Target(1.01, at_least=False)


def settings_of(settings: Namespace, workload: str, data: Path) -> list[str]:
    """What both sides are given."""
    shared = [
        "--steps", str(settings.steps), "--shards", "8", "--batch-size", str(settings.batch_size), "--threads", "1",
        "--precision", "fp32", "--checkpoint-every", "1000000",
    ]  # fmt: skip
    if workload == "resnet":
        return ["--model", "resnet18", "--data", f"cifar10:{data}", "--lr", "0.01", *shared]
    return ["--model", "mini", "--sequence-length", "64", *shared]


def ours(settings: Namespace, workload: str, workers: int, data: Path) -> dict[str, Any]:
    """Seconds per step of our command line, and its hash."""
    arguments = [*settings_of(settings, workload, data), "--workers", str(workers), "--resources-per-worker", "CPU=1"]
    with commands.visit() as folder:
        _, run = commands.train(workload, arguments, folder)
        result = json.loads((run / "result.json").read_text())
        if result["incidents"]:
            raise RuntimeError(f"something happened: {result['incidents']}")
        steps = [record["step_s"] for record in commands.records(run / "metrics.jsonl")]
        return {"step_s": steps, "weights_sha256": result["weights_sha256"]}


def bare(settings: Namespace, workload: str, workers: int, data: Path) -> dict[str, Any]:
    """The same of the loop alone."""
    with commands.visit() as folder:
        arguments = [workload, *settings_of(settings, workload, data)]
        # Both sides keep the memory they freed, which is no part of being elastic (orchestrator.own_ray).
        return commands.last_json(commands.torchrun(workers, "bare_loop.py", arguments, folder, **MALLOC).stdout)


def measure(settings: Namespace, workload: str, workers: int, data: Path) -> dict[str, Any]:
    """One comparison."""
    sides = {side.__name__: partial(side, settings, workload, workers, data) for side in (ours, bare)}
    found = paired.alternate(sides, settings.visits)
    hashes = {visit["weights_sha256"] for visits in found.values() for visit in visits}
    if len(hashes) != 1:
        raise RuntimeError(f"the sides did not compute the same: {hashes}")
    medians = {
        side: [statistics.median(visit["step_s"][settings.warm_up :]) for visit in visits]
        for side, visits in found.items()
    }
    name = f"{workload}, {workers} worker(s): seconds of the median step, elastic / bare loop"
    return paired.compare(name, medians["ours"], medians["bare"], TARGET) | {"weights_sha256": hashes.pop()}


def compare_all(benchmark: str, measure: Measure, settings: Namespace) -> None:
    """All comparisons that were asked for, and their report."""
    report = paired.header(benchmark, settings)
    with tempfile.TemporaryDirectory(prefix="bench-data-") as scratch:
        data = commands.write_cifar10(Path(scratch))
        chosen = [(workload, int(workers)) for workload in settings.workloads for workers in settings.workers]
        report["comparisons"] = [measure(settings, workload, workers, data) for workload, workers in chosen]
    paired.emit(report, settings.out)


def parser(doc: str, visits: int) -> ArgumentParser:
    """What is measured, on how many workers."""
    made = paired.parser(doc, visits)
    made.add_argument("--workloads", type=paired.words(("resnet", "bert")), default=["resnet", "bert"])
    made.add_argument("--workers", type=paired.words(("1", "2", "3", "4")), default=["1", "2"])
    made.add_argument("--warm-up", type=int, default=10, help="first steps that are not counted [10]")
    made.add_argument("--batch-size", type=int, default=16, help="global batch of either side [16]")
    return made


def main() -> None:
    flags = parser(__doc__ or "", visits=5)
    flags.add_argument("--steps", type=int, default=60, help="steps per visit, the warm-up included [60]")
    compare_all("elastic_cost", measure, flags.parse_args())


if __name__ == "__main__":
    main()
