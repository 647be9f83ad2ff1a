"""Seconds to a first step on a cluster that is up: of a node that has joined, and of a job that was submitted.

    python tests/bench/joining.py --out joining.json

join: `--workers 1:2` trains resnet18 on the only node; then a second node comes up. From the moment Ray has the node
to the first step that is computed with it, how long those that were training stood still, and what it is made of.
submit: from `ray job submit` to the first committed step, two workers, against plain Ray Train's script
(baseline_ray_train.py), submitted to the same cluster by turns.
"""

import json
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import commands
import nodes
import paired
from faults import Run, Tail, joining

START_LIMIT_S = 120.0
RAY = ["-m", "ray.scripts.scripts"]
TARGET = paired.Target(1.0, at_least=False)


def join(settings: Namespace, data: Path) -> dict[str, Any]:
    """One run and the node that joins it."""
    arguments = [
        "--workers", "1:2", "--steps", "1000000", "--checkpoint-every", "1000000", "--model", "resnet18",
        "--data", f"cifar10:{data}", "--lr", "0.001", "--precision", "fp32", "--batch-size", "32", "--shards", "8",
    ]  # fmt: skip
    with commands.visit() as folder, nodes.cluster(folder, 1) as cluster:
        kept = ["--storage", str(folder), "--name", "run", "--address", cluster.address]
        process = commands.start(["-m", "orchestrator.run", "resnet", *arguments, *kept], folder)
        run = Run(process, folder, [Tail(folder / "run" / name) for name in ("metrics.jsonl", "events.jsonl")])
        try:
            if not run.wait(lambda: len(run.steps) > 4, START_LIMIT_S):
                raise TimeoutError(commands.said(folder))
            asked_s, hit = time.time(), run.newest
            cluster.add()
            ready_s = time.time()
            if not run.wait(lambda: len(run.of(run.newest)) > 4 and run.newest > hit, START_LIMIT_S):
                raise TimeoutError(commands.said(folder))
        finally:
            process.terminate()
            process.wait(60)
        found = joining(run.steps, hit, run.newest, ready_s)
        incident = next(i for i in run.incidents if i["generation"] == run.newest)
    return {
        "first_step_s": found["whole_s"],
        "stall_s": found["join_stall_s"],
        "node_start_s": round(ready_s - asked_s, 3),
        **{phase: incident[phase] for phase in ("regroup_s", "restore_s", "recompute_s", "steps_lost")},
    }


@contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """A head with two CPUs that takes jobs."""
    try:
        commands.run([*RAY, "start", "--head", "--num-cpus=2", "--port=0", "--dashboard-port=8275"], folder)
        if not commands.wait_until(lambda: _takes_jobs(folder), START_LIMIT_S):
            raise TimeoutError(commands.said(folder))
        yield
    finally:
        commands.wait_until(lambda: not nodes.sweep(folder), nodes.GONE_TIMEOUT_S)


def _takes_jobs(folder: Path) -> bool:
    """Whether the node's agent is up, which starts jobs, some seconds after the dashboard answers."""
    try:
        submitted(["true"], folder)
    except RuntimeError:
        return False
    return True


def submitted(entrypoint: list[str], folder: Path) -> commands.Finished:
    """A job to its end."""
    command = [*RAY, "job", "submit", "--address", "http://127.0.0.1:8275", "--working-dir", str(commands.ROOT), "--"]
    return commands.run([*command, *entrypoint], folder, RAY_AUTH_MODE="token")


def ours(workload: str, folder: Path, name: str) -> float:
    """Seconds from the submission to the first step."""
    kept = ["--storage", str(folder / "runs"), "--name", name]
    done = submitted(["python", "-m", "orchestrator.run", workload, "--workers", "2", "--steps", "2", *kept], folder)
    first = commands.records(folder / "runs" / name / "metrics.jsonl")[0]
    return float(first["time_s"] - done.started_s)


def baseline(workload: str, folder: Path) -> float:
    """The same of plain Ray Train."""
    done = submitted(["python", "tests/bench/baseline_ray_train.py", workload, "--steps", "2"], folder)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith('{"first_step_s"'))
    return float(json.loads(line)["first_step_s"] - done.started_s)


def submit(settings: Namespace, workload: str) -> dict[str, Any]:
    """The comparison of one workload; a first visit to each side is not counted."""
    with commands.visit() as folder, cluster(folder):
        names = (f"run{number}" for number in range(1000))
        sides = {"ours": lambda: ours(workload, folder, next(names)), "ray train": lambda: baseline(workload, folder)}
        paired.alternate(sides, 1)
        found = paired.alternate(sides, settings.visits)
    name = f"{workload}, seconds from ray job submit to the first step, ours / Ray Train"
    return paired.compare(name, found["ours"], found["ray train"], TARGET)


def main() -> None:
    parser = paired.parser(__doc__ or "", visits=3)
    parser.add_argument("--parts", type=paired.words(("join", "submit")), default=["join", "submit"])
    parser.add_argument("--workloads", type=paired.words(("resnet", "bert")), default=["resnet", "bert"])
    settings = parser.parse_args()
    report = paired.header("joining", settings)
    if "join" in settings.parts:
        with tempfile.TemporaryDirectory(prefix="bench-data-") as scratch:
            data = commands.write_cifar10(Path(scratch))
            visits = paired.alternate({"join": lambda: join(settings, data)}, settings.visits)["join"]
        medians = {key: round(statistics.median(visit[key] for visit in visits), 3) for key in visits[0]}
        report["join"] = {"median": medians, "visits": visits}
    if "submit" in settings.parts:
        report["comparisons"] = [submit(settings, workload) for workload in settings.workloads]
    paired.emit(report, settings.out)


if __name__ == "__main__":
    main()
