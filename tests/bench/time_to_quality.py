"""Seconds of training until a held-out accuracy is reached, fast recipe against textbook recipe, on Fashion-MNIST.

    apt-get install dataset-fashion-mnist
    python tests/bench/time_to_quality.py --out time_to_quality.json
    python tests/bench/time_to_quality.py --textbook-model resnet20 --visits 1

Both recipes are files beside the workload, fast-airbench-fashion-mnist.toml and textbook-resnet18-cifar10.toml (Adam,
no schedule; with this data), on 2 workers of one core each. The held-out split is evaluated on the way, and counted is
what was spent on steps until the first evaluation with the accuracy: not the evaluations themselves, and not start-up
with the fast recipe's whitening, which start_s has, from the command to the first step. A side that has reached all
accuracies is stopped; a textbook run that was stopped before (--limit-s) counts with the seconds it had, in favour of
the textbook. The fast recipe reaches what it reaches at its end, when the learning rate falls; the textbook's has no
end that matters. Target: at most half the time.
"""

import json
import os
import signal
import subprocess
import time
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import commands
import paired

TARGET = paired.Target(0.5, at_least=False)
DATA = "/usr/share/datasets/fashion-mnist"
RECIPES = commands.ROOT / "workloads" / "resnet"
FAST, TEXTBOOK = RECIPES / "fast-airbench-fashion-mnist.toml", RECIPES / "textbook-resnet18-cifar10.toml"
NEVER = "1000000"  # steps between checkpoints


def side(settings: Namespace, recipe: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """One run until the highest accuracy is reached; evaluations, and seconds until each accuracy or None."""
    with commands.visit() as folder:
        run = folder / "run"
        command = ["-m", "orchestrator.run", "resnet", "--config", str(recipe)]
        command += ["--data", f"fashion-mnist:{settings.data}", "--checkpoint-every", NEVER]
        command += ["--workers", str(settings.workers), "--resources-per-worker", "CPU=1", "--threads", "1"]
        command += ["--storage", str(folder), "--name", "run", *arguments]
        began_s = time.time()
        process = commands.start(command, folder)
        try:
            _follow(process, run, max(settings.accuracies), settings.limit_s)
        finally:
            if process.poll() is None:
                process.kill()
        steps = commands.records(run / "metrics.jsonl")
        evaluations = [(e["step"], e["metrics"]["accuracy"]) for e in _evaluations(run)]
    if not evaluations:
        raise RuntimeError(f"no evaluation within {settings.limit_s:g} s; see --limit-s")
    seconds = list(accumulate((record["step_s"] for record in steps), initial=0.0))
    reached = {a: next((seconds[step] for step, found in evaluations if found >= a), None) for a in settings.accuracies}
    paired.say(f"{recipe.stem}: {reached}; {evaluations}")
    start_s = round(steps[0]["time_s"] - steps[0]["step_s"] - began_s, 3)
    visit = {"reached_s": reached, "evaluations": evaluations, "trained_s": seconds[-1], "steps": len(steps)}
    return {**visit, "start_s": start_s}


def _evaluations(run: Path) -> list[dict[str, Any]]:
    """Those of a run, on the way or done."""
    if not (run / "events.jsonl").exists():
        return []
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    events = [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be half written
    return [event for event in events if event["event"] == "evaluated"]


def _follow(process: "subprocess.Popen[bytes]", run: Path, accuracy: float, limit_s: float) -> None:
    """Wait until the run ends; ask it to when it has reached `accuracy`, or after `limit_s` since its start."""
    until, asked = time.monotonic() + limit_s, False
    while process.poll() is None:
        reached = any(e["metrics"]["accuracy"] >= accuracy for e in _evaluations(run))
        if (reached or time.monotonic() > until) and not asked:
            asked = True
            os.kill(process.pid, signal.SIGINT)
        time.sleep(0.5)
    if process.returncode not in (0, 130):
        raise RuntimeError(f"exit status {process.returncode}\n{commands.said(run.parent)}")


def compared(accuracy: float, fast: Sequence[dict[str, Any]], textbook: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The comparison for one accuracy; a textbook run that was stopped earlier counts with the time it had."""
    if any(visit["reached_s"][accuracy] is None for visit in fast):
        return {"comparison": f"seconds to {accuracy:.0%}", "met": False, "why": "a fast run did not reach it"}
    ours = [visit["reached_s"][accuracy] for visit in fast]
    theirs = [visit["reached_s"][accuracy] or visit["trained_s"] for visit in textbook]
    found = paired.compare(f"seconds to {accuracy:.0%}, fast / textbook", ours, theirs, TARGET)
    found["textbook_reached"] = [visit["reached_s"][accuracy] is not None for visit in textbook]
    return {**found, "unit": "s"}


def main() -> None:
    parser = paired.parser(__doc__ or "", visits=2)
    parser.add_argument("--data", default=DATA, help=f"folder with the IDX files [{DATA}]")
    parser.add_argument("--workers", type=int, default=2, help="[2]")
    parser.add_argument("--accuracies", nargs="+", type=float, default=[0.90, 0.92], help="[0.90 0.92]")
    parser.add_argument("--textbook-model", default="resnet18", help="network of the textbook recipe [resnet18]")
    parser.add_argument("--fast-eval-every", default="0.25", help="epochs between the fast recipe's evaluations [0.25]")
    parser.add_argument("--textbook-eval-every", default="0.25", help="the textbook recipe's [0.25]")
    parser.add_argument("--limit-s", type=float, default=5400.0, help="seconds after which a run is stopped [5400]")
    settings = parser.parse_args()
    if not Path(settings.data).is_dir():
        parser.error(f"--data {settings.data}: no such folder; apt-get install dataset-fashion-mnist")
    report = paired.header("time_to_quality", settings)
    textbook = ["--model", settings.textbook_model, "--eval-every", settings.textbook_eval_every]
    sides = {
        "fast": partial(side, settings, FAST, ["--eval-every", settings.fast_eval_every]),
        "textbook": partial(side, settings, TEXTBOOK, textbook),
    }
    found = paired.alternate(sides, settings.visits)
    report["visits"] = found
    report["comparisons"] = [compared(a, found["fast"], found["textbook"]) for a in settings.accuracies]
    paired.emit(report, settings.out)


if __name__ == "__main__":
    main()
