"""What being elastic costs at most, by the processor's accounts: needs no quiet machine, as elastic_cost.py does.

    python tests/bench/elastic_time.py --out elastic_time.json

While a run of our command line trains undisturbed, counted per worker and as a share of its training thread's time:
the training thread inside the observer that notes, reports and asks for pauses (py-spy's samples); processor seconds
of all other threads of the worker (heartbeat, reporter, reading ahead, Ray's own); and of the coordinator's process.
Their sum is a bound from above: other threads cost the training thread at most what they take, and part of it is
reading ahead and Ray, which a run that is not elastic has too. Target: at most 0.01.
"""

import shutil
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import commands
import elastic_cost
import paired

from orchestrator.nodewatch import psutil_of_ray

TARGET = paired.Target(0.01, at_least=False)
SAMPLES_PER_S = 200
OBSERVER = ("committed (orchestrator/recorder.py", "stop_wanted (orchestrator/recorder.py")
LOOP = "train (orchestrator/loop.py"
READY_S = 180.0


def threads(pid: int) -> dict[int, float]:
    """Processor seconds of each thread so far."""
    return {thread.id: thread.user_time + thread.system_time for thread in psutil_of_ray().Process(pid).threads()}


def accounts(worker: int, coordinator: int, seconds: float) -> dict[str, float]:
    """Processor seconds per second, for a while: the training thread, which takes most, the others, the coordinator."""
    before, process = threads(worker), psutil_of_ray().Process(coordinator)
    at_s, told = time.perf_counter(), sum(process.cpu_times()[:2])
    time.sleep(seconds)
    after, wall_s = threads(worker), time.perf_counter() - at_s
    taken = sorted(used - before.get(thread, 0.0) for thread, used in after.items())
    return {
        "training_thread": taken[-1] / wall_s,
        "other_threads": sum(taken[:-1]) / wall_s,
        "coordinator": (sum(process.cpu_times()[:2]) - told) / wall_s,
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


def visit(settings: Namespace, workload: str, workers: int, data: Path) -> dict[str, Any]:
    """One undisturbed run."""
    arguments = elastic_cost.settings_of(settings, workload, data)
    with commands.visit() as folder:
        run = folder / "run"
        kept = ["--storage", str(folder), "--name", "run", "--resources-per-worker", "CPU=1", "--balance", "even"]
        command = ["-m", "orchestrator.run", workload, *arguments, "--workers", str(workers), *kept]
        process = commands.start(command, folder)
        trained = lambda: (run / "metrics.jsonl").exists() and len(commands.records(run / "metrics.jsonl"))  # noqa: E731
        try:
            ready = commands.wait_until(lambda: trained() >= settings.warm_up or process.poll() is not None, READY_S)
            if not ready or process.poll() is not None:
                raise RuntimeError(f"no {settings.warm_up} steps:\n{commands.said(folder)}")
            events = {event["event"]: event for event in commands.records(run / "events.jsonl")}
            worker, coordinator = events["generation_started"]["pids"][0], events["run_started"]["coordinator_pid"]
            first, since_s = trained(), time.time()
            found = accounts(worker, coordinator, settings.seconds)
            steps = commands.records(run / "metrics.jsonl")[first:]
            spied = in_observer(worker, settings.seconds, folder)
        finally:
            process.terminate()
            process.wait()
        ended_s = since_s + 2 * settings.seconds
        later = [event for event in commands.records(run / "events.jsonl") if since_s < event["time_s"] < ended_s]
        if happened := [event for event in later if event["event"] == "incident"]:
            raise RuntimeError(f"something happened: {happened}")
    aside = found["other_threads"] + found["coordinator"] / workers
    share = spied["in_observer"] / spied["samples"] + aside / found["training_thread"]
    return {"share": share, "step_s": statistics.median(r["step_s"] for r in steps), **found, **spied}


def measure(settings: Namespace, workload: str, workers: int, data: Path) -> dict[str, Any]:
    """All visits of one kind."""
    visits = []
    for number in range(settings.visits):
        paired.say(f"{workload}, {workers} worker(s), visit {number + 1}/{settings.visits}")
        visits.append(visit(settings, workload, workers, data))
    shares = [found["share"] for found in visits]
    return {
        "comparison": f"{workload}, {workers} worker(s): elastic work as a share of training, at most",
        "ratio": round(statistics.median(shares), 5),
        "target": str(TARGET),
        "met": TARGET.met(statistics.median(shares)),
        "spread": paired.spread(shares),
        "visits": [{key: round(value, 6) for key, value in found.items()} for found in visits],
    }


def main() -> None:
    flags = elastic_cost.parser(__doc__ or "", visits=3)
    flags.add_argument("--seconds", type=float, default=20.0, help="of each of the two counts of a visit [20]")
    flags.set_defaults(steps=1_000_000)
    elastic_cost.compare_all("elastic_time", measure, flags.parse_args())


if __name__ == "__main__":
    main()
