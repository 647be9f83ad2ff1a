"""What a checkpoint costs the training, as a share of 60 s: the cost at one checkpoint a minute.

    python tests/bench/checkpoint_stall.py --out checkpoint_stall.json
    python tests/bench/checkpoint_stall.py --workloads resnet18 --workers 1 --every 6
    python tests/bench/checkpoint_stall.py --workloads bert-base --batch-size 4 --shards 2 --checkpoints 2 \
        --every 12 --sequence-length 64

resnet18 (45 MB of parameters and as much momentum), BERT-mini and, where named, BERT-base (1 GB with its optimizer's
state), one run each with many checkpoints. Two costs are added for each checkpoint: the stall
(checkpoint_saved.stall_s: copying the state, while no step is computed) and the slow-down (steps that ran while the
background write was going on, against the median step between this write and the next checkpoint: both sides
alternate within the run). Target: (stall + slow-down) / 60 s < 0.01.
"""

import statistics
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import commands
import paired

WORKLOADS = {"resnet18": "resnet", "bert-mini": "bert", "bert-base": "bert"}
TARGET_SHARE = 0.01
PERIOD_S = 60.0
Record = dict[str, Any]


def train(settings: Namespace, workload: str, data: Path) -> tuple[list[Record], list[Record]]:
    """One run; its step records and its checkpoint records."""
    # The first period warms up and the last checkpoint has no steps after it: one period more at either end.
    steps = settings.every * (settings.checkpoints + 2)
    arguments = [
        "--workers", str(settings.workers), "--steps", str(steps), "--batch-size", str(settings.batch_size),
        "--checkpoint-every", str(settings.every), "--resources-per-worker", "CPU=1", "--precision", "fp32",
        "--lr", "0.001", "--keep-checkpoints", "2", "--shards", str(settings.shards),
    ]  # fmt: skip
    if workload == "resnet18":
        arguments += ["--model", "resnet18", "--data", f"cifar10:{data}"]
    else:
        arguments += ["--model", workload.removeprefix("bert-"), "--sequence-length", str(settings.sequence_length)]
    with commands.visit() as folder:
        _, run = commands.train(WORKLOADS[workload], arguments, folder)
        events = commands.records(run / "events.jsonl")
        saved = [event for event in events if event["event"] == "checkpoint_saved"]
        return commands.records(run / "metrics.jsonl"), [c for c in saved if c["step"] < steps]


def cost(steps: list[Record], checkpoint: Record, every: int) -> dict[str, float]:
    """What one checkpoint cost, in seconds; steps[i] is step i + 1.

    The write begins when the stall ends, which begins when the step's record is made.
    """
    at = checkpoint["step"]
    write_begins_s = steps[at - 1]["time_s"] + checkpoint["stall_s"]
    write_ends_s = write_begins_s + checkpoint["write_s"]
    period = steps[at : at + every]
    during = [s["step_s"] for s in period if s["time_s"] - s["step_s"] < write_ends_s]
    after = [s["step_s"] for s in period[len(during) :]]
    if not after:
        raise SystemExit(f"step {at}: the write took all {every} steps to the next checkpoint; give a larger --every")
    usual_s = statistics.median(after)
    return {
        "stall_s": checkpoint["stall_s"],
        "slow_down_s": sum(during) - usual_s * len(during),
        "write_s": checkpoint["write_s"],
        "step_s": usual_s,
        "steps_during_write": len(during),
        # What the same sum gives for steps without a write: the noise that the slow-down has to be seen above.
        "noise_s": sum(after) - usual_s * len(after),
    }


def measure(settings: Namespace, workload: str, data: Path) -> dict[str, Any]:
    """The cost of one workload's checkpoints."""
    paired.say(f"{workload}: {settings.checkpoints} checkpoints, one every {settings.every} steps")
    steps, saved = train(settings, workload, data)
    assert [s["step"] for s in steps] == list(range(1, len(steps) + 1))
    costs = [cost(steps, checkpoint, settings.every) for checkpoint in saved[1:]]
    shares = [(c["stall_s"] + c["slow_down_s"]) / PERIOD_S for c in costs]
    median = {key: round(statistics.median(c[key] for c in costs), 5) for key in costs[0]}
    share = statistics.median(shares)
    return {
        "comparison": f"{workload}, {settings.workers} worker(s), cost of a checkpoint / {PERIOD_S:g} s",
        "ratio": round(share, 6),
        "target": f"< {TARGET_SHARE:g}",
        "met": share < TARGET_SHARE,
        "spread": paired.spread(shares),
        "stall_share": round(median["stall_s"] / PERIOD_S, 6),
        "slow_down_share": round(median["slow_down_s"] / PERIOD_S, 6),
        "bytes": saved[-1]["bytes"],
        "median": median,
        "pairs": len(costs),
        "stall_s": paired.spread([c["stall_s"] for c in costs]),
        "slow_down_s": paired.spread([c["slow_down_s"] for c in costs]),
        "noise_s": paired.spread([c["noise_s"] for c in costs]),
    }


def main() -> None:
    parser = paired.parser(__doc__ or "", visits=None)
    parser.add_argument("--workloads", type=paired.words(list(WORKLOADS)), default=["resnet18", "bert-mini"])
    parser.add_argument("--workers", type=int, default=2, help="as many as cores: a write then competes with them [2]")
    parser.add_argument("--checkpoints", type=int, default=10, help="that count [10]")
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints [5]")
    parser.add_argument("--batch-size", type=int, default=32, help="global batch [32]")
    parser.add_argument("--sequence-length", type=int, default=128, help="of BERT [128]")
    parser.add_argument("--shards", type=int, default=8, help="[8]")
    settings = parser.parse_args()
    report = paired.header("checkpoint_stall", settings)
    with tempfile.TemporaryDirectory(prefix="bench-data-") as scratch:
        data = commands.write_cifar10(Path(scratch))
        report["comparisons"] = [measure(settings, workload, data) for workload in settings.workloads]
    paired.emit(report, settings.out)


if __name__ == "__main__":
    main()
