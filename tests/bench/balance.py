"""Throughput with one slow worker: shards by measured speed against even shares, and against the sum of speeds.

    python tests/bench/balance.py --out balance.json
    python tests/bench/balance.py --workers 2 --visits 1

Every worker gets a CPU quota of its own (a cgroup; needs root). After a stretch in which all are equal one of them
is cut to half. Ideal is what the speeds add up to: the first stretch's rate, less half a worker's part of it.
"""

import contextlib
import os
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import commands
import paired
from faults import Run, Tail

PERIOD_US = 20_000  # of the quota
SLOWER = 0.5
START_LIMIT_S = 300.0
AT_LEAST = paired.Target(0.9, at_least=True)


class Quota:
    """A cgroup (version 1 or 2) that limits the CPU time of one process."""

    def __init__(self, name: str) -> None:
        first = Path("/sys/fs/cgroup/cpu")
        self._old = first.is_dir()
        self._folder = (first if self._old else Path("/sys/fs/cgroup")) / name
        self._folder.mkdir()

    def limit(self, pid: int, cpus: float) -> None:
        """Let the process have so many CPUs' time."""
        if self._old:
            (self._folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (self._folder / "cpu.cfs_quota_us").write_text(str(int(cpus * PERIOD_US)))
        else:
            (self._folder / "cpu.max").write_text(f"{int(cpus * PERIOD_US)} {PERIOD_US}")
        (self._folder / "cgroup.procs").write_text(str(pid))

    def remove(self) -> None:
        """Its process has ended."""
        commands.wait_until(lambda: not (self._folder / "cgroup.procs").read_text(), 30)
        self._folder.rmdir()


@contextlib.contextmanager
def quotas(count: int) -> Iterator[list[Quota]]:
    """So many, gone at the end."""
    made: list[Quota] = []
    try:
        for number in range(count):
            made.append(Quota(f"bench-{os.getpid()}-{number}"))
        yield made
    finally:
        for quota in made:
            quota.remove()


def rate(run: Run, seconds: float) -> float:
    """Samples a second over the next stretch: of the steps in it, by the median of their seconds."""
    run.look()
    known, end = len(run.steps), time.monotonic() + seconds
    run.wait(lambda: time.monotonic() > end, seconds + 10)
    steps = run.steps[known + 1 :]
    return float(steps[0]["samples"]) / statistics.median(s["step_s"] for s in steps)


def train(settings: Namespace, balance: str, workers: int, data: Path) -> dict[str, Any]:
    """One run; its rates before and after one worker is slowed, and the shares it had then."""
    cpus = min(0.9, 0.9 * (os.cpu_count() or 1) / workers)
    arguments = [
        "--workers", str(workers), "--resources-per-worker", "CPU=0.5", "--threads", "1", "--steps", "1000000",
        "--checkpoint-every", "1000000", "--model", "resnet18", "--data", f"cifar10:{data}", "--precision", "fp32",
        "--batch-size", str(settings.batch_size), "--shards", str(settings.shards), "--lr", "0.001",
        "--balance", balance,
    ]  # fmt: skip
    with commands.visit() as folder, quotas(workers) as limits:
        command = ["-m", "orchestrator.run", "resnet", *arguments, "--storage", str(folder), "--name", "run"]
        process = commands.start(command, folder)
        run = Run(process, folder, [Tail(folder / "run" / name) for name in ("metrics.jsonl", "events.jsonl")])
        try:
            if not run.wait(lambda: bool(run.generations and len(run.steps) > 2), START_LIMIT_S):
                raise TimeoutError(commands.said(folder))
            pids = run.generations[-1]["pids"]
            for quota, pid in zip(limits, pids, strict=True):
                quota.limit(pid, cpus)
            run.wait(lambda: False, settings.settle)
            before = rate(run, settings.stretch)
            limits[-1].limit(pids[-1], cpus * SLOWER)
            run.wait(lambda: False, settings.settle)
            after = rate(run, settings.stretch)
            shares = [high - low for low, high in run.generations[-1]["ranges"]]
        finally:
            process.terminate()
            process.wait(120)
    found = {"before": before, "after": after, "ideal": before * (workers - 1 + SLOWER) / workers, "shares": shares}
    paired.say(str(found))
    return found


def main() -> None:
    parser = paired.parser(__doc__ or "", visits=2)
    parser.add_argument("--workers", nargs="+", type=int, default=[2, 3], help="[2 3]")
    parser.add_argument("--batch-size", type=int, default=64, help="global batch [64]")
    parser.add_argument("--shards", type=int, default=32, help="[32]")
    parser.add_argument("--settle", type=float, default=20.0, help="seconds before a stretch is measured [20]")
    parser.add_argument("--stretch", type=float, default=15.0, help="seconds that are measured [15]")
    settings = parser.parse_args()
    report = paired.header("balance", settings)
    report["comparisons"] = []
    with tempfile.TemporaryDirectory(prefix="bench-data-") as scratch:
        data = commands.write_cifar10(Path(scratch))
        for workers in settings.workers:
            sides = {kind: partial(train, settings, kind, workers, data) for kind in ("measured", "even")}
            found = paired.alternate(sides, settings.visits)
            ours, even = found["measured"], found["even"]
            rates, name = [f["after"] for f in ours], f"resnet18, {workers} workers, one at half speed"
            for against, baseline in (
                ("ideal", [f["ideal"] for f in ours]),
                ("even shares", [f["after"] for f in even]),
            ):
                entry = paired.compare(f"{name}: samples/s, measured / {against}", rates, baseline, AT_LEAST)
                report["comparisons"].append({**entry, "shares": [f["shares"] for f in ours]})
    paired.emit(report, settings.out)


if __name__ == "__main__":
    main()
