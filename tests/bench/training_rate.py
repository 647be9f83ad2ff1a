"""Samples per second of our command line against a plain torch DDP script under torchrun (baseline_ddp.py), and
against the same job as written with accelerate (resnet18) or transformers' Trainer (bert-mini; baseline_libraries.py).

    python tests/bench/training_rate.py --out training_rate.json
    python tests/bench/training_rate.py --workloads resnet18 --workers 1 --reduce fixed --batch-size 64 --visits 5

resnet18 (3x3 stem, 32x32, random images in CIFAR-10's format) and BERT-mini (sequences of 128 tokens); where named,
resnet50 (224x224, from JPEG files of 400x300) and BERT-base; 1 and 2 workers of one thread each, the same global
batch. A round visits every --reduce and, after each, the script; the rate is that of the steps after the warm-up.
BERT's script comes in two variants, its head at every place (what model(input_ids, labels=labels) does) and at masked
places only (what ours does): either is compared.
With --compile ours is compiled (its seconds of compiling are not in the rate); --against eager compares it with ours
as it is without: python tests/bench/training_rate.py --workloads bert-mini --workers 1 --reduce fixed --compile
--against eager.
With --precision bf16 or auto ours is trained in that, the other side in fp32 as ever.
With --apart our workers share no memory, as if each were on a machine of its own: gradients go over loopback as the
script's do.
The libraries are visited with --against script,library; they need `pip install accelerate`.
Targets, ratio of ours to the script: --reduce fixed >= 0.95, ddp >= 1.0.
"""

import statistics
import tempfile
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import commands
import paired

TARGETS = {"fixed": paired.Target(0.95, at_least=True), "ddp": paired.Target(1.0, at_least=True)}
WORKLOADS = {"resnet18": "resnet", "resnet50": "resnet", "bert-mini": "bert", "bert-base": "bert"}
HEADS = {name: ("full", "masked") if kind == "bert" else ("full",) for name, kind in WORKLOADS.items()}
LIBRARY = "library"
EAGER = "eager"  # ours without --compile
NAMES = {
    **{(name, "full"): "script" for name, kind in WORKLOADS.items() if kind == "resnet"},
    **{(name, EAGER): "not compiled" for name in WORKLOADS},
    **{(name, LIBRARY): "Trainer" if kind == "bert" else "accelerate" for name, kind in WORKLOADS.items()},
}
NEVER = "1000000"  # steps between checkpoints: their cost is checkpoint_stall.py's subject
DIFFERENCES = {
    "both": [
        "ours: fused optimizer kernels, deterministic algorithms, learning rate schedule, loss of every step recorded; "
        "script: torch's default optimizer, constant learning rate, nothing printed",
        "no side writes a checkpoint or evaluates between the steps that are timed",
    ],
    "fixed": ["ours: forward and backward per logical shard (batch / shards samples); script: the worker's whole part"],
    "resnet": ["ours: v2 transforms on tensors, seeded per sample; script: torchvision transforms on PIL images"],
    "bert": [
        "ours: head at masked places only; script: at all places (full) or at masked ones (masked)",
        "ours: exactly the masked share of each sequence; script: DataCollatorForLanguageModeling, on average the same",
    ],
}


def ours(
    settings: Namespace, workload: str, workers: int, reduce: str, data: Path, compiled: bool = False
) -> list[float]:
    """Seconds per step of one visit to our command line."""
    arguments = [
        "--workers", str(workers), "--reduce", reduce, "--shards", str(settings.shards),
        "--precision", settings.precision,
        "--batch-size", str(settings.batch_size), "--steps", str(settings.steps), "--checkpoint-every", NEVER,
        "--resources-per-worker", "CPU=1", "--threads", "1", "--compile", str(compiled).lower(),
    ]  # fmt: skip
    if WORKLOADS[workload] == "resnet":
        kind = "cifar10" if workload == "resnet18" else "imagefolder"
        arguments += ["--model", workload, "--data", f"{kind}:{data}", "--lr", "0.01"]
    else:
        arguments += [
            "--model", workload.removeprefix("bert-"), "--vocab-size", str(settings.vocab_size), "--lr", "0.0001",
            "--sequence-length", str(settings.sequence_length), "--mask-rate", str(settings.mask_rate),
        ]  # fmt: skip
    with commands.visit() as folder:
        _, run = commands.train(WORKLOADS[workload], arguments, folder, settings.apart)
        return [record["step_s"] for record in commands.records(run / "metrics.jsonl")]


def script(settings: Namespace, workload: str, workers: int, head: str, data: Path) -> list[float]:
    """Seconds per step of one visit to the script."""
    arguments = [
        workload, "--data", str(data), "--batch-size", str(settings.batch_size), "--steps", str(settings.steps),
        "--loader-processes", str(settings.script_loader_processes), "--vocab-size", str(settings.vocab_size),
        "--sequence-length", str(settings.sequence_length), "--mask-rate", str(settings.mask_rate), "--head", head,
    ]  # fmt: skip
    file = "baseline_libraries.py" if head == LIBRARY else "baseline_ddp.py"
    with commands.visit() as folder:
        done = commands.torchrun(workers, file, arguments if head != LIBRARY else arguments[:-2], folder)
        return list(commands.last_json(done.stdout)["step_s"])


def baselines(settings: Namespace, workload: str) -> list[str]:
    """What ours is compared with: the script's heads, the library."""
    heads = [head for head in HEADS[workload] if head in settings.heads or len(HEADS[workload]) == 1]
    return (heads if "script" in settings.against else []) + [
        other for other in (LIBRARY, EAGER) if other in settings.against
    ]


def sides(settings: Namespace, workload: str, workers: int, data: Path) -> dict[str, Callable[[], list[float]]]:
    """One round: ours and the script by turns, every variant of either at least once."""
    heads = baselines(settings, workload)
    order: dict[str, Callable[[], list[float]]] = {}
    for i in range(max(len(settings.reduce), len(heads))):
        if i < len(settings.reduce):
            reduce = settings.reduce[i]
            order[reduce] = partial(ours, settings, workload, workers, reduce, data, compiled=settings.compile)
        # With fewer variants of the script than of ours it is visited again: each of ours has its own neighbour.
        head, again = heads[i % len(heads)], i // len(heads)
        other = partial(script, head=head) if head != EAGER else partial(ours, reduce=settings.reduce[0])
        order[f"script {head} {again}"] = partial(other, settings, workload, workers, data=data)
    return order


def rate(settings: Namespace, step_s: list[float]) -> float:
    """Samples per second after the warm-up."""
    timed = step_s[settings.warm_up :]
    return settings.batch_size * len(timed) / sum(timed)


def measure(settings: Namespace, workload: str, workers: int, data: Path) -> list[dict[str, Any]]:
    """All comparisons of one workload at one number of workers."""
    paired.say(f"{workload}, {workers} worker(s)")
    found = paired.alternate(sides(settings, workload, workers, data), settings.visits)
    comparisons = []
    for i, reduce in enumerate(settings.reduce):
        heads = baselines(settings, workload)
        for head in heads:
            visits = [name for name in found if name.startswith(f"script {head} ")]
            against = found[visits[i % len(visits)]]
            name = f"{workload}, {workers} worker(s), {reduce} / {NAMES.get((workload, head), f'script ({head} head)')}"
            compared = paired.compare(
                name,
                [rate(settings, step_s) for step_s in found[reduce]],
                [rate(settings, step_s) for step_s in against],
                TARGETS[reduce],
            )
            compared["unit"] = "samples/s"
            compared["ratio_by_median_step"] = round(_median_step(settings, against, found[reduce]), 4)
            compared["differences"] = [
                *DIFFERENCES["both"], *DIFFERENCES[WORKLOADS[workload]], *DIFFERENCES.get(reduce, [])
            ] if head != EAGER else ["ours: --compile true; the other side: the same command without"]  # fmt: skip
            comparisons.append(compared)
    return comparisons


def _median_step(settings: Namespace, slower: list[list[float]], faster: list[list[float]]) -> float:
    """The same ratio from the median step of each visit, which a single disturbed step does not move."""
    pairs = zip(slower, faster, strict=True)
    medians = [statistics.median(a[settings.warm_up :]) / statistics.median(b[settings.warm_up :]) for a, b in pairs]
    return statistics.median(medians)


def main() -> None:
    parser = paired.parser(__doc__ or "", visits=3)
    parser.add_argument("--workloads", type=paired.words(list(WORKLOADS)), default=["resnet18", "bert-mini"])
    parser.add_argument("--workers", type=paired.words(("1", "2", "3", "4")), default=["1", "2"])
    parser.add_argument("--reduce", type=paired.words(list(TARGETS)), default=list(TARGETS))
    parser.add_argument(
        "--baseline-head", dest="heads", type=paired.words(("full", "masked")), default=["full", "masked"]
    )
    parser.add_argument("--against", type=paired.words(("script", LIBRARY, EAGER)), default=["script"])
    parser.add_argument("--compile", action="store_true", help="ours is compiled, with --reduce fixed")
    parser.add_argument("--precision", default="fp32", help="of ours; the other side is in fp32 [fp32]")
    parser.add_argument("--apart", action="store_true", help="our workers share no memory")
    parser.add_argument("--steps", type=int, default=13, help="steps per visit, the warm-up included [13]")
    parser.add_argument("--warm-up", type=int, default=3, help="first steps that are not counted [3]")
    parser.add_argument("--batch-size", type=int, default=128, help="global batch of either side [128]")
    parser.add_argument("--shards", type=int, default=8, help="ours [8]")
    parser.add_argument("--vocab-size", type=int, default=2048, help="of BERT, our workload's default [2048]")
    parser.add_argument("--sequence-length", type=int, default=128, help="of BERT [128]")
    parser.add_argument("--mask-rate", type=float, default=0.15, help="of BERT [0.15]")
    parser.add_argument(
        "--script-loader-processes", type=int, default=0, help="the script's DataLoader num_workers [0]"
    )
    settings = parser.parse_args()
    if settings.steps <= settings.warm_up:
        parser.error("--steps must exceed --warm-up")
    report = paired.header("training_rate", settings)
    with tempfile.TemporaryDirectory(prefix="bench-data-") as scratch:
        data = {"resnet18": commands.write_cifar10(Path(scratch))}
        if "resnet50" in settings.workloads:
            data["resnet50"] = commands.write_photos(Path(scratch), settings.batch_size * 8)
        chosen = product(settings.workloads, map(int, settings.workers))
        report["comparisons"] = [
            c for name, workers in chosen for c in measure(settings, name, workers, data.get(name, Path()))
        ]
    paired.emit(report, settings.out)


if __name__ == "__main__":
    main()
