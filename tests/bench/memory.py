"""Memory of the workers of a long run: whether it stays flat.

    python tests/bench/memory.py --minutes 15 --out memory.json
    python tests/bench/memory.py --workloads bert --batch-size 8 --warm-up 0.5 --out memory_bert.json

resnet8 from prepared JPEG files, more of them than the cache on disk may hold, and BERT from prepared tokens; two
workers, neither of which is sent home where other load slows it down. Every two seconds the memory of each worker and
of its loader processes is read, and that of the command with its coordinator (USS: pages that no other process
shares; `held` are those of them that the kernel cannot drop, for the others are pages of prepared files that are mapped
and on disk as well, counted here whenever no other loader has the same file open). The first --warm-up share of the
time is left out; a line is laid through the rest by least squares. A worker keeps the records of its last 8,192 steps
(reporter.KEPT), 0.8 kB each: with small batches those are there before the line begins. Target: the line rises by less
than 1 % of its mean an hour, or by less than its standard error.
"""

import statistics
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import Any

import commands
import numpy as np
import paired
from numpy.typing import NDArray

EVERY_S = 2.0
NEVER = "1000000"
TARGET_SHARE = 0.01
Samples = list[tuple[float, list[NDArray[np.float64]]]]
JOBS = {
    "resnet": ["--model", "resnet8", "--image-size", "32", "--data-cache", "0.1"],
    "bert": ["--hidden-size", "32", "--layers", "1", "--sequence-length", "16", "--lr", "0.0003"],
}


def prepare(settings: Namespace, workload: str, folder: Path) -> str:
    """What `--data` is to be."""
    command = [
        "-m",
        "orchestrator.prepare",
        workload,
        "--out",
        str(folder / "prepared"),
        "--file-mb",
        f"{settings.file_mb:g}",
    ]
    if workload == "resnet":
        command += ["--source", f"imagefolder:{commands.write_photos(folder, settings.images)}"]
    else:
        command += ["--source", "docs", "--sequence-length", "16"]
    commands.run(command, folder)
    return f"parquet:{folder / 'prepared'}"


def train(settings: Namespace, workload: str) -> tuple[Samples, int]:
    """Memory in MB, by seconds since the first step, of each worker with its loaders and of the command; and steps."""
    with commands.visit(alone=False) as folder:
        data = prepare(settings, workload, folder)
        arguments = [
            *JOBS[workload], "--data", data, "--workers", "2", "--steps", NEVER, "--checkpoint-every", "60s",
            "--batch-size", str(settings.batch_size), "--shards", "4", "--resources-per-worker", "CPU=1",
            "--precision", "fp32", "--storage", str(folder), "--name", "run", "--balance", "even",
        ]  # fmt: skip
        process = commands.start(["-m", "orchestrator.run", workload, *arguments], folder)
        try:
            return watch(settings, folder, process.pid), len(commands.records(folder / "run" / "metrics.jsonl"))
        except (AssertionError, OSError) as error:
            raise SystemExit(f"{error!r}\n{commands.said(folder)}") from error
        finally:
            process.terminate()
            process.wait()


def watch(settings: Namespace, folder: Path, command: int) -> Samples:
    metrics = folder / "run" / "metrics.jsonl"
    assert commands.wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, 300), "no step in 300 s"
    events = commands.records(folder / "run" / "events.jsonl")
    pids = next(event["pids"] for event in events if event["event"] == "generation_started")
    found, started = [], time.monotonic()
    while (now_s := time.monotonic() - started) < settings.minutes * 60:
        below = children()
        with suppress(FileNotFoundError, ProcessLookupError):  # a short-lived helper has ended: the next sample will do
            found.append((now_s, [*(sum(map(own_mb, family(pid, below))) for pid in pids), own_mb(command)]))
        events = commands.records(folder / "run" / "events.jsonl")
        assert all(Path(f"/proc/{pid}").exists() for pid in (*pids, command)), f"ended: {events[-5:]}"
        time.sleep(EVERY_S)  # the period of the samples, not a wait for anything
    return found


def children() -> dict[int, list[int]]:
    """Process -> those that it has started."""
    found: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it has ended
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                found.setdefault(parent, []).append(int(entry.name))
    return found


def family(pid: int, below: dict[int, list[int]]) -> list[int]:
    """A process and all that it has started, by themselves or through others."""
    return [pid, *(other for child in below.get(pid, []) for other in family(child, below))]


def own_mb(pid: int) -> NDArray[np.float64]:
    """Pages that no other process shares: all, and those that the kernel cannot drop."""
    words = [text.split() for text in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    clean, dirty = (int(kb) / 1e3 for name, kb, *_ in words if name in ("Private_Clean:", "Private_Dirty:"))
    return np.array([clean + dirty, dirty])


def line(at_s: list[float], mb: list[float]) -> dict[str, Any]:
    """The least squares line: mean, MB an hour and its standard error."""
    hours, values = np.array(at_s) / 3600, np.array(mb)
    (rise, _), covariance = np.polyfit(hours, values, 1, cov=True)
    error = float(np.sqrt(covariance[0, 0]))
    mean = float(values.mean())
    return {
        "mean_mb": round(mean, 1),
        "max_mb": round(float(values.max()), 1),
        "mb_per_hour": round(float(rise), 2),
        "standard_error": round(error, 2),
        "met": bool(rise < TARGET_SHARE * mean or rise < error),
    }


def tenths(mb: list[float]) -> list[float]:
    """The medians of ten stretches of time."""
    return [round(statistics.median(part), 1) for part in np.array_split(mb, 10) if len(part)]


def main() -> None:
    parser = paired.parser(__doc__ or "", visits=None)
    parser.add_argument("--workloads", type=paired.words(list(JOBS)), default=list(JOBS))
    parser.add_argument("--minutes", type=float, default=15.0, help="of training for each [15]")
    parser.add_argument("--warm-up", type=float, default=0.2, help="share of them left out [0.2]")
    parser.add_argument("--batch-size", type=int, default=64, help="global; smaller ones make quicker steps [64]")
    parser.add_argument("--images", type=int, default=5000, help="JPEG files of about 30 kB [5000]")
    parser.add_argument(
        "--file-mb", type=float, default=2.0, help="of a prepared file; smaller ones come and go more often"
    )
    settings = parser.parse_args()
    report = paired.header("memory", settings)
    report["runs"] = []
    for workload in settings.workloads:
        paired.say(f"{workload}: {settings.minutes:g} minutes")
        samples, steps = train(settings, workload)
        kept = [(at_s, mb) for at_s, mb in samples if at_s >= settings.warm_up * settings.minutes * 60]
        at_s = [at_s for at_s, _ in kept]
        *workers, command = [
            {**line(at_s, [mb[i][0] for _, mb in kept]), "held": line(at_s, [mb[i][1] for _, mb in kept])}
            for i in range(3)
        ]
        found = {"workload": workload, "steps": steps, "workers": workers, "command": command}
        courses = {"workers_mb_by_tenths": 0, "workers_held_mb_by_tenths": 1}
        found |= {name: [tenths([mb[i][kind] for _, mb in samples]) for i in (0, 1)] for name, kind in courses.items()}
        report["runs"].append(found)
    paired.emit(report, settings.out)


if __name__ == "__main__":
    main()
