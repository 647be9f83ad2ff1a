"""What being elastic costs at most, by the processor's accounts: needs no quiet machine, as elastic_cost.py does.

    python tests/bench/elastic_time.py --out elastic_time.json

While a run of our command line trains undisturbed, counted per worker and as a share of its training thread's time:
the training thread inside the observer that notes, reports and asks for pauses (py-spy's samples); processor seconds
of all other threads of the worker (heartbeat, reporter, gloo, Ray's own); and of the command, the coordinator and Ray
Train's controller, which the workers share. Less the same of a plain Ray Train job (baseline_recovery.py, without
checkpoints) that trains the same model on the same batch in the same run, by turns. It is a bound from above: other
threads cost the training thread at most what they take. Target: at most 0.01.
"""

import shutil
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import commands
import elastic_cost
import paired

from orchestrator.nodewatch import psutil_of_ray

TARGET = paired.Target(0.01, at_least=False)
SAMPLES_PER_S = 200
OBSERVER = ("committed (orchestrator/recorder.py", "stop_wanted (orchestrator/recorder.py")
CONTROLLERS = ("ray::Coordinator", "ray::TrainController")
COMMANDS = ("orchestrator.run", "baseline_recovery.py")
LOOP = "train (orchestrator/loop.py"
READY_S = 180.0


def threads(pid: int) -> dict[int, float]:
    """Processor seconds of each thread so far."""
    return {thread.id: thread.user_time + thread.system_time for thread in psutil_of_ray().Process(pid).threads()}


def accounts(worker: int, others: list[int], seconds: float) -> dict[str, float]:
    """Processor seconds per second, for a while: the training thread, which takes most, the others, other processes."""
    told = lambda: sum(sum(psutil_of_ray().Process(pid).cpu_times()[:2]) for pid in others)  # noqa: E731
    before, told_before, at_s = threads(worker), told(), time.perf_counter()
    time.sleep(seconds)
    after, told_after, wall_s = threads(worker), told(), time.perf_counter() - at_s
    taken = sorted(used - before.get(thread, 0.0) for thread, used in after.items())
    return {
        "training_thread": taken[-1] / wall_s,
        "other_threads": sum(taken[:-1]) / wall_s,
        "controllers": (told_after - told_before) / wall_s,
    }


def in_observer(worker: int, seconds: float, folder: Path) -> dict[str, int]:
    """py-spy's samples of the training thread, and those of them inside the observer."""
    spy, out = shutil.which("py-spy", path=str(Path(sys.executable).parent)), folder / "stacks"
    command = [str(spy), "record", "--pid", str(worker), "--duration", str(int(seconds)), "--rate", str(SAMPLES_PER_S)]
    subprocess.run([*command, "--idle", "--format", "raw", "--output", str(out)], check=True, capture_output=True)
    stacks = [line.rpartition(" ") for line in out.read_text().splitlines()]
    training = [(stack, int(count)) for stack, _, count in stacks if LOOP in stack]
    noted = sum(count for stack, count in training if any(call in stack for call in OBSERVER))
    return {"samples": sum(count for _, count in training), "in_observer": noted}


def controllers(folder: Path) -> list[int]:
    """The processes of a visit that lead its training: the command, Ray Train's controller, and our coordinator."""
    lines = {pid: psutil_of_ray().Process(pid).cmdline() for pid in commands.processes(folder)}
    return [
        pid
        for pid, words in lines.items()
        if words and (words[0].partition(".")[0] in CONTROLLERS or any(word.endswith(COMMANDS) for word in words))
    ]


@contextmanager
def training(settings: Namespace, arguments: list[str], folder: Path, steps: Path) -> Iterator[Callable[[], int]]:
    """A command that has taken its first steps; what it yields counts them."""
    process = commands.start(arguments, folder, RAY_AUTH_MODE="token")
    taken = lambda: len([r for r in commands.records(steps) if "step_s" in r]) if steps.exists() else 0  # noqa: E731
    try:
        ready = commands.wait_until(lambda: taken() >= settings.warm_up or process.poll() is not None, READY_S)
        if not ready or process.poll() is not None:
            raise RuntimeError(f"no {settings.warm_up} steps:\n{commands.said(folder)}")
        yield taken
    finally:
        process.terminate()
        process.wait()


def ours(settings: Namespace, workload: str, workers: int, data: Path) -> dict[str, float]:
    """One undisturbed run of our command line."""
    arguments = elastic_cost.settings_of(settings, workload, data)
    with commands.visit() as folder:
        run = folder / "run"
        kept = ["--storage", str(folder), "--name", "run", "--resources-per-worker", "CPU=1", "--balance", "even"]
        command = ["-m", "orchestrator.run", workload, *arguments, "--workers", str(workers), *kept]
        with training(settings, command, folder, run / "metrics.jsonl") as taken:
            events = {event["event"]: event for event in commands.records(run / "events.jsonl")}
            worker, first, since_s = events["generation_started"]["pids"][0], taken(), time.time()
            found = accounts(worker, controllers(folder), settings.seconds)
            steps = commands.records(run / "metrics.jsonl")[first:]
            spied = in_observer(worker, settings.seconds, folder)
        ended_s = since_s + 2 * settings.seconds
        later = [event for event in commands.records(run / "events.jsonl") if since_s < event["time_s"] < ended_s]
        if happened := [event for event in later if event["event"] == "incident"]:
            raise RuntimeError(f"something happened: {happened}")
    return {"step_s": statistics.median(r["step_s"] for r in steps), **found, **spied}


def plain(settings: Namespace, workload: str, workers: int, data: Path) -> dict[str, float]:
    """The same of plain Ray Train."""
    with commands.visit() as folder:
        log = folder / "steps.jsonl"
        command = [
            str(commands.BENCH / "baseline_recovery.py"), "resnet18" if workload == "resnet" else "bert-mini",
            "--address", "local", "--workers", str(workers), "--log", str(log), "--data", str(data),
            "--storage", str(folder / "ray-train"), "--batch-size", str(settings.batch_size),
            "--sequence-length", "64", "--checkpoint-every", "1000000",
        ]  # fmt: skip
        with training(settings, command, folder, log):
            return accounts(commands.records(log)[0]["pids"][0], controllers(folder), settings.seconds)


def aside(found: dict[str, float], workers: int) -> float:
    """A worker's part of what is not training, over what its training thread takes."""
    return (found["other_threads"] + found["controllers"] / workers) / found["training_thread"]


def measure(settings: Namespace, workload: str, workers: int, data: Path) -> dict[str, Any]:
    """All visits of one kind."""
    sides = {side.__name__: partial(side, settings, workload, workers, data) for side in (ours, plain)}
    found = paired.alternate(sides, settings.visits)
    observer = [visit["in_observer"] / visit["samples"] for visit in found["ours"]]
    grosses = [aside(visit, workers) + inside for visit, inside in zip(found["ours"], observer, strict=True)]
    shares = [gross - aside(visit, workers) for gross, visit in zip(grosses, found["plain"], strict=True)]
    return {
        "comparison": f"{workload}, {workers} worker(s): elastic work as a share of training, at most",
        "ratio": round(statistics.median(shares), 5),
        "target": str(TARGET),
        "met": TARGET.met(statistics.median(shares)),
        "spread": paired.spread(shares),
        "with_what_plain_ray_train_takes_too": round(statistics.median(grosses), 5),
        "visits": {side: [{k: round(v, 6) for k, v in visit.items()} for visit in found[side]] for side in found},
    }


def main() -> None:
    flags = elastic_cost.parser(__doc__ or "", visits=3)
    flags.add_argument("--seconds", type=float, default=20.0, help="of each of the two counts of a visit [20]")
    flags.set_defaults(steps=1_000_000)
    elastic_cost.compare_all("elastic_time", measure, flags.parse_args())


if __name__ == "__main__":
    main()
