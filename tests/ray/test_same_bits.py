"""Through the real command line: the number of workers changes nothing, in both workloads and precisions."""

import subprocess
from pathlib import Path

import pytest
from commands import events, finish, kept_in, records, result, run, start

WORKLOADS = {
    # 1,437 images in batches of 256: six steps an epoch, the last one short; ten steps cross an epoch's end.
    "resnet": ["--augment", "shift", "--optimizer", "sgd", "--batch-size", "256", "--steps", "10"],
    "bert": ["--dropout", "0.1", "--optimizer", "adamw", "--batch-size", "32", "--steps", "8"],
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("workload", list(WORKLOADS))
def test_one_hash_for_one_to_four_workers(workload: str, precision: str, cluster: str, tmp_path: Path) -> None:
    hashes, losses = set(), set()
    settings = [*WORKLOADS[workload], "--precision", precision, "--shards", "8", "--balance", "even"]

    def begin(workers: int) -> "subprocess.Popen[str]":
        room = ["--workers", str(workers), "--resources-per-worker", "CPU=0.5"]
        return start([workload, *settings, *room, *kept_in(tmp_path, f"w{workers}", cluster)])

    for pair in ((1, 4), (2, 3)):  # side by side, for most of the time goes into starting
        for workers, process in [(workers, begin(workers)) for workers in pair]:
            done = finish(process)
            assert done.status == 0, done.err
            folder = tmp_path / f"w{workers}"
            (generation,) = events(folder, "generation_started")
            assert generation["workers"] == workers
            hashes.add(result(folder)["weights_sha256"])
            losses.add(tuple(r["loss"] for r in records(folder)))
    assert len(hashes) == 1
    assert len(losses) == 1


def test_another_seed_or_precision_gives_another_hash(cluster: str, tmp_path: Path) -> None:
    hashes = set()
    for name, extra in (("a", []), ("b", ["--seed", "1"]), ("c", ["--precision", "bf16"])):
        done = run("resnet", "--steps", "3", "--workers", "1", *extra, *kept_in(tmp_path, name, cluster))
        assert done.status == 0, done.err
        hashes.add(result(tmp_path / name)["weights_sha256"])
    assert len(hashes) == 3


@pytest.mark.parametrize("workload", list(WORKLOADS))
def test_ordinary_ddp_trains(workload: str, cluster: str, tmp_path: Path) -> None:
    done = run(workload, *WORKLOADS[workload], "--reduce", "ddp", "--workers", "3", *kept_in(tmp_path, "ddp", cluster))
    assert done.status == 0, done.err
    losses = [r["loss"] for r in records(tmp_path / "ddp")]
    assert losses[-1] < losses[0]


def test_fp16_scales_its_loss(cluster: str, tmp_path: Path) -> None:
    hashes = set()
    for workers in ("1", "3"):
        done = run(
            "resnet",
            "--precision",
            "fp16",
            "--steps",
            "6",
            "--workers",
            workers,
            *kept_in(tmp_path, f"w{workers}", cluster),
        )
        assert done.status == 0, done.err
        hashes.add(result(tmp_path / f"w{workers}")["weights_sha256"])
    assert len(hashes) == 1
