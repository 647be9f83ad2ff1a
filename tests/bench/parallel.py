"""Models in parts (--parallel) against whole ones: the same training, and less memory a worker.

    python tests/bench/parallel.py --out parallel.json
    python tests/bench/parallel.py --workloads bert --only tensor=2,pipeline=2 --steps 20
    python tests/bench/parallel.py --workloads bert-base,resnet152 --steps 4

ResNet-18 on the digits and BERT-mini on Python's documentation, or models large enough for their state to be most of a
worker's memory, each way through the command line on 2 and on 4 workers, and on 1, 2 and 4 that hold the model whole.
Told of each: whether the final weights are those of one worker bit by bit, the largest difference between any two
parameters or statistics, and between the losses of any step, as a share of that loss; the bytes of parameters,
gradients and optimizer state on the worker with the most, and its largest resident memory, against the whole model's
on as many workers. Target: losses within --tolerance of one worker's.
"""

import json
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import commands
import paired
from safetensors.torch import load_file

from orchestrator.rehearse import stage

SETTINGS = {
    "resnet": ["--model", "resnet18", "--batch-size", "64", "--lr", "0.02"],
    "bert": ["--model", "mini", "--batch-size", "32", "--lr", "0.001"],
    "resnet152": ["--model", "resnet152", "--batch-size", "16", "--lr", "0.02"],
    "bert-base": ["--model", "base", "--batch-size", "16", "--lr", "0.0001", "--vocab-size", "2048"],
}
SMALL = ["resnet", "bert"]
GPIPE = ("--pipeline-schedule", "gpipe")
WAYS: dict[str, list[tuple[str, int, tuple[str, ...]]]] = {  # --parallel, workers, more flags
    "resnet": [
        ("fsdp", 2, ()), ("fsdp", 4, ()), ("hsdp=2", 2, ()), ("hsdp=2", 4, ()), ("pipeline=2", 2, ()),
        ("pipeline=2", 2, GPIPE), ("pipeline=2", 4, ()), ("pipeline=4", 4, ()), ("pipeline=4", 4, GPIPE),
    ],
    "bert": [
        ("fsdp", 2, ()), ("fsdp", 4, ()), ("hsdp=2", 2, ()), ("hsdp=2", 4, ()), ("tensor=2", 2, ()),
        ("tensor=2", 4, ()), ("tensor=4", 4, ()), ("pipeline=2", 2, ()), ("pipeline=2", 2, GPIPE),
        ("pipeline=2", 4, ()), ("pipeline=4", 4, ()),
    ],
    "resnet152": [("fsdp", 2, ()), ("fsdp", 4, ()), ("pipeline=2", 2, ())],
    "bert-base": [("fsdp", 2, ()), ("fsdp", 4, ()), ("tensor=2", 2, ()), ("pipeline=2", 2, ())],
}  # fmt: skip
Trained = dict[str, Any]


def train(
    settings: Namespace, workload: str, address: str, parallel: str, workers: int, more: tuple[str, ...] = ()
) -> Trained:
    """One run of the command line on the cluster at `address`: its losses, its weights, its result."""
    arguments = [
        *SETTINGS[workload], "--steps", str(settings.steps), "--shards", "8", "--threads", "1", "--precision", "fp32",
        "--workers", str(workers), "--resources-per-worker", "CPU=0.5", "--balance", "even",
        "--parallel", parallel, *more, "--address", address,
    ]  # fmt: skip
    name = "-".join((workload, parallel.replace("=", ""), *more[1:], str(workers)))
    kept = ["--storage", str(settings.storage), "--name", name]
    kind = "bert" if "bert" in workload else "resnet"
    commands.run(["-m", "orchestrator.run", kind, *arguments, *kept], settings.storage)
    run = settings.storage / name
    result = json.loads((run / "result.json").read_text())
    if result["incidents"]:
        raise SystemExit(f"{workload} --parallel {parallel}: {result['incidents']}")
    losses = [record["loss"] for record in commands.records(run / "metrics.jsonl")]
    return {"losses": losses, "weights": load_file(run / "model" / "model.safetensors"), **result}


def against(one: Trained, whole: Trained, parts: Trained, tolerance: float) -> dict[str, Any]:
    """The differences to one worker, and the memory as a share of the whole model's on as many workers."""
    apart = [
        float((tensor.double() - parts["weights"][name].double()).abs().max())
        for name, tensor in one["weights"].items()
    ]
    losses = [abs(a - b) / abs(a) for a, b in zip(one["losses"], parts["losses"], strict=True)]
    held, all_held = parts["memory_bytes"], whole["memory_bytes"]
    return {
        "same_bits": parts["weights_sha256"] == one["weights_sha256"],
        "largest_difference": max(apart),
        "largest_weight": max(float(tensor.double().abs().max()) for tensor in one["weights"].values()),
        "largest_loss_difference": max(losses),
        "met": max(losses) <= tolerance,
        "state_bytes": held["state"],
        "state_to_whole": round(held["state"] / all_held["state"], 3),
        "peak_rss_bytes": held["peak_rss"],
        "peak_rss_to_whole": round(held["peak_rss"] / all_held["peak_rss"], 3),
        "samples_per_s_to_whole": round(parts["samples_per_s"] / whole["samples_per_s"], 3),
        "metrics": parts["metrics"],
    }


def compare(settings: Namespace, workload: str, address: str) -> dict[str, Any]:
    """Every way of a workload against the whole model."""
    ways = [way for way in WAYS[workload] if not settings.only or way[0] in settings.only]
    whole: dict[int, Trained] = {}
    for workers in sorted({1, *(workers for _, workers, _ in ways)}):
        paired.say(f"{workload}: the whole model, {workers} workers")
        whole[workers] = train(settings, workload, address, "ddp", workers)
    found: dict[str, Any] = {}
    for parallel, workers, more in ways:
        name = " ".join((parallel, *more[1:], f"on {workers}"))
        paired.say(f"{workload}: {name}")
        parts = train(settings, workload, address, parallel, workers, more)
        found[name] = against(whole[1], whole[workers], parts, settings.tolerance)
        paired.say(json.dumps(found[name]))
    hashes = {run["weights_sha256"] for run in whole.values()}
    memory = {workers: run["memory_bytes"] for workers, run in whole.items()}
    return {"whole": {"memory_bytes": memory, "one_hash": len(hashes) == 1, "metrics": whole[1]["metrics"]}, **found}


def main() -> None:
    parser = paired.parser(__doc__ or "", visits=None)
    parser.add_argument("--workloads", type=paired.words(list(WAYS)), default=SMALL, help=f"[{','.join(SMALL)}]")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], help="these --parallel [all]")
    parser.add_argument("--steps", type=int, default=50, help="[50]")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="of the loss of each step, as a share [0.001]")
    parser.add_argument("--storage", type=Path, help="keep the runs here; those that are there are not run again")
    settings = parser.parse_args()
    report = paired.header("parallel", settings)
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as folder, stage("", nodes=1, cpus=4) as where:
        settings.storage = settings.storage or Path(folder)
        settings.storage.mkdir(parents=True, exist_ok=True)
        report["workloads"] = {name: compare(settings, name, where.address) for name in settings.workloads}
    paired.emit(report, settings.out)


if __name__ == "__main__":
    main()
