"""Through the real command line: the number of workers changes nothing, in both workloads and precisions."""

from pathlib import Path

import pytest
from commands import events, finish, kept_in, records, result, start

WORKLOADS = {
    # 1,437 images in batches of 256: six steps an epoch, the last one short; ten steps cross an epoch's end.
    "resnet": ["--augment", "shift", "--optimizer", "sgd", "--batch-size", "256", "--steps", "10"],
    "bert": ["--dropout", "0.1", "--optimizer", "adamw", "--batch-size", "32", "--steps", "8"],
}


PAIRS = ((1, 4), (2, 3))
CASES = [  # CI has 40 minutes; resnet's hash for one to three workers is in test_rehearsals.py
    pytest.param("bert", "bf16", ((1, 3),), id="bert-bf16-1-3"),
    *(pytest.param(w, p, PAIRS, marks=pytest.mark.long, id=f"{w}-{p}") for w in WORKLOADS for p in ("fp32", "bf16")),
]


def side_by_side(commands: dict[str, list[str]]) -> None:
    """Runs by name, for most of the time goes into starting."""
    for process in [start(command) for command in commands.values()]:
        done = finish(process)
        assert done.status == 0, done.err


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("workload", "precision", "pairs"), CASES)
def test_one_hash_for_one_to_four_workers(
    workload: str, precision: str, pairs: tuple[tuple[int, int], ...], cluster: str, tmp_path: Path
) -> None:
    hashes, losses = set(), set()
    settings = [workload, *WORKLOADS[workload], "--precision", precision, "--shards", "8", "--balance", "even"]
    for pair in pairs:
        room = {n: ["--workers", str(n), "--resources-per-worker", "CPU=0.5"] for n in pair}
        side_by_side({f"w{n}": [*settings, *room[n], *kept_in(tmp_path, f"w{n}", cluster)] for n in pair})
        for n in pair:
            (generation,) = events(tmp_path / f"w{n}", "generation_started")
            assert generation["workers"] == n
            hashes.add(result(tmp_path / f"w{n}")["weights_sha256"])
            losses.add(tuple(r["loss"] for r in records(tmp_path / f"w{n}")))
    assert len(hashes) == 1
    assert len(losses) == 1


@pytest.mark.long  # equal hashes are not for want of differences: test_elastic_training.py too
def test_another_seed_or_precision_gives_another_hash(cluster: str, tmp_path: Path) -> None:
    """And fp16, which scales its loss, one of its own, with any number of workers."""
    given = {
        "a": ["--workers", "1"],
        "b": ["--workers", "1", "--seed", "1"],
        "bf16": ["--workers", "1", "--precision", "bf16"],
        "c": ["--workers", "1", "--precision", "fp16"],
        "d": ["--workers", "3", "--precision", "fp16"],
    }
    room = ["--resources-per-worker", "CPU=0.5"]
    for some in (("a", "b", "bf16"), ("c", "d")):
        side_by_side({n: ["resnet", "--steps", "6", *room, *given[n], *kept_in(tmp_path, n, cluster)] for n in some})
    hashes = {n: result(tmp_path / n)["weights_sha256"] for n in given}
    assert hashes["c"] == hashes["d"]
    assert len(set(hashes.values())) == 4


@pytest.mark.long  # CI has 40 minutes; the baselines use it
def test_ordinary_ddp_trains(cluster: str, tmp_path: Path) -> None:
    ddp = ["--reduce", "ddp", "--workers", "3", "--resources-per-worker", "CPU=0.5"]
    side_by_side({name: [name, *WORKLOADS[name], *ddp, *kept_in(tmp_path, name, cluster)] for name in WORKLOADS})
    for name in WORKLOADS:
        losses = [r["loss"] for r in records(tmp_path / name)]
        assert losses[-1] < losses[0]
