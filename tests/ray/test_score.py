"""`python -m orchestrator.score` as a user types it: the run's figures, for any number of workers, whoever is lost."""

import json
import os
import signal
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import begin, finish, kept_in, ray_processes, result, run, wait_until
from finished_runs import finish as finished_run

from orchestrator.rehearse import stage
from workloads.resnet.config import ResnetConfig

SCORE = [sys.executable, "-m", "orchestrator.score"]


def scored(folder: Path, *flags: str) -> dict:
    done = finish(begin([*SCORE, str(folder), "--json", *flags]))
    assert done.status == 0, done.out + done.err
    return json.loads(done.out)


def scorers() -> list[int]:
    """Process ids of the workers on this machine."""
    return sorted(ray_processes(("ray::Scorer",)))


def many_digits(folder: Path, samples: int) -> str:
    """Random pixels in the files of Fashion-MNIST, for an evaluation that takes a while."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for stem, count in (("train", 128), ("t10k", samples)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = random.integers(0, 10, count, dtype=np.uint8)
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, *images.shape) + images.tobytes())
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, count) + labels.tobytes())
    return f"fashion-mnist:{folder}"


def many(tmp_path: Path, samples: int) -> Path:
    """A finished run whose held-out split is large."""
    data = many_digits(tmp_path / "data", samples)
    config = ResnetConfig(data=data, precision="fp32", threads=1, storage="runs", name="many")
    finished_run(tmp_path, "resnet", config, steps=0)
    return tmp_path


@pytest.mark.long  # CI has 40 minutes; README's command scores a run there
@pytest.mark.timeout(400)
def test_the_run_s_own_figures_with_one_worker_and_three_one_of_them_killed(cluster: str, tmp_path: Path) -> None:
    done = run("resnet", "--steps", "30", "--workers", "2", *kept_in(tmp_path, "run", cluster))
    assert done.status == 0, done.err
    own = scored(tmp_path / "run", "--workers", "1", "--address", cluster)
    assert own["metrics"] == result(tmp_path / "run")["metrics"]
    assert (own["samples"], own["workers"], own["workers_lost"]) == (360, 1, 0)
    folder = many(tmp_path / "many", 12_800)
    alone = scored(folder, "--workers", "1", "--address", cluster, "--out", str(tmp_path / "alone.json"))
    assert json.loads((tmp_path / "alone.json").read_text()) == alone
    disturbed = disturb(folder, cluster, kill=True)
    assert disturbed["workers_lost"] == 1
    assert disturbed["workers"] >= 3
    assert disturbed["metrics"] == alone["metrics"]
    assert disturbed["samples"] == alone["samples"] == 12_800


def disturb(folder: Path, cluster: str, kill: bool) -> dict:
    """Evaluate with three workers, one of which stops in the middle; `kill` it when the two others are there."""
    command = [*SCORE, str(folder), "--json", "--workers", "3", "--address", cluster]
    process = begin([*command, "--out", str(folder / "found.json")])
    assert process.stderr is not None
    said = [""]
    while not said[-1].endswith("workers\n") or said[-1].startswith("0 of"):
        said.append(process.stderr.readline())
        assert said[-1], "".join(said)
    stopped = scorers()[0]
    os.kill(stopped, signal.SIGSTOP)
    if kill:
        wait_until(lambda: len(scorers()) >= 3, 60, "three workers")
        os.kill(stopped, signal.SIGKILL)
    done = finish(process)
    assert done.status == 0, "".join(said) + done.err
    return json.loads((folder / "found.json").read_text())


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_frozen_worker_is_replaced(cluster: str, tmp_path: Path) -> None:
    folder = many(tmp_path / "many", 12_800)
    alone = scored(folder, "--workers", "1", "--address", cluster)
    disturbed = disturb(folder, cluster, kill=False)
    assert disturbed["workers_lost"] == 1
    assert disturbed["metrics"] == alone["metrics"]
    wait_until(lambda: not scorers(), 60, "the workers to be gone")


@pytest.mark.long
@pytest.mark.timeout(600)
def test_nodes_come_and_go(tmp_path: Path) -> None:
    """One of two nodes is lost, and a third one joins: it gets workers too."""
    folder, out = many(tmp_path / "many", 200_000), tmp_path / "found.json"
    with stage("", 2, 1) as nodes:
        alone = scored(folder, "--workers", "1", "--address", nodes.address)
        process = begin([*SCORE, str(folder), "--address", nodes.address, "--out", str(out)])
        wait_until(lambda: len(scorers()) >= 2, 60, "two workers")
        nodes.cluster.remove_node(next(iter(nodes.cluster.worker_nodes)), allow_graceful=False)
        nodes.add_node()
        done = finish(process)
        assert done.status == 0, done.err
    disturbed = json.loads(out.read_text())
    assert disturbed["metrics"] == alone["metrics"]
    assert disturbed["workers_lost"] == 1
    assert disturbed["workers"] >= 2


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("workload", "quantize"), [("resnet", "static"), ("bert", "dynamic"), ("bert", "none")])
def test_exported_models_have_the_figures_of_their_table(
    workload: str, quantize: str, cluster: str, tmp_path: Path
) -> None:
    for package in ("onnx", "onnxruntime", "torchao"):
        pytest.importorskip(package)
    small = ["--hidden-size", "32"] if workload == "bert" else []
    done = run(workload, "--steps", "60", *small, "--workers", "2", *kept_in(tmp_path, "run", cluster))
    assert done.status == 0, done.err
    folder = tmp_path / "run"
    export = [sys.executable, "-m", "orchestrator.export", str(folder), "--quantize", quantize, "--rounds", "3"]
    assert finish(begin(export), 400).status == 0
    out = folder / "export" / quantize
    table = json.loads((out / "export.json").read_text())["table"]
    (row,) = [r for r in table if r["engine"] == "onnxruntime" and (r["model"] == "fp32") == (quantize == "none")]
    for workers in ("1", "3"):
        found = scored(out, "--workers", workers, "--address", cluster)
        assert found["metrics"] == row["metrics"]
    assert scored(folder, "--address", cluster)["metrics"] == result(folder)["metrics"]
