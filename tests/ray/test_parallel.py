"""Models in parts through the command line: who is lost, who goes on, what is taken again, and what reads what."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from commands import events, finish, kept_in, records, result, run, start, wait_for_step
from test_object_storage import KEYS, bucket  # noqa: F401 a fixture
from test_rehearsals import assert_passed, fault, rehearse

from orchestrator.storage import Folder

BERT = (
    "bert", "--hidden-size", "32", "--sequence-length", "16", "--vocab-size", "512", "--shards", "4",
    "--batch-size", "16", "--threads", "1", "--precision", "fp32", "--resources-per-worker", "CPU=0.5",
)  # fmt: skip
RESNET = ("resnet", "--shards", "4", "--threads", "1", "--precision", "fp32", "--resources-per-worker", "CPU=0.5")
NEVER = ("--checkpoint-every", "1000000")


def schedule(folder: Path, *faults: str) -> str:
    file = folder / "faults.toml"
    file.write_text("\n".join(faults))
    return str(file)


def workers_of(folder: Path) -> list[int]:
    """Of each generation."""
    return [generation["workers"] for generation in events(folder, "generation_started")]


def lost(folder: Path) -> dict[str, int]:
    """Kind of incident -> most steps that had to be taken again."""
    found: dict[str, int] = {}
    for incident in result(folder)["incidents"]:
        found[incident["kind"]] = max(found.get(incident["kind"], 0), incident["steps_lost"])
    return found


def assert_as_whole(folder: Path, whole: Path) -> None:
    """The same weights, every step once."""
    assert result(folder)["weights_sha256"] == result(whole)["weights_sha256"]
    assert [(r["step"], r["loss"]) for r in records(folder)] == [(r["step"], r["loss"]) for r in records(whole)]


@pytest.mark.timeout(400)
def test_a_pipeline_goes_back_to_the_newest_checkpoint(cluster: str, tmp_path: Path) -> None:
    """Nobody else holds what a stage held. The same bits follow, and they are those of the model on one worker."""
    command = [*BERT, "--steps", "60", "--checkpoint-every", "20"]
    faults = ["--faults", schedule(tmp_path, fault("kill", 1, step=35))]
    parts = ["--parallel", "pipeline=2", "--workers", "2", *faults]
    processes = [
        start([*command, "--workers", "1", *kept_in(tmp_path, "whole", cluster)]),
        start([*command, *parts, *kept_in(tmp_path, "run", cluster)]),
    ]
    for process in processes:
        done = finish(process)
        assert done.status == 0, done.err
    folder = tmp_path / "run"
    assert_as_whole(folder, tmp_path / "whole")
    assert [e["step"] for e in events(folder, "checkpoint_loaded")] == [20]
    (incident,) = result(folder)["incidents"]
    assert (incident["kind"], incident["workers_after"]) == ("worker_killed", 2)
    assert 14 <= incident["steps_lost"] <= 15
    files = json.loads((folder / "checkpoints" / "step-60" / "manifest.json").read_text())["files"]
    assert sorted(name.partition("/")[2] for name in files) == [".metadata", "__0_0.distcp", "__1_0.distcp"]


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("workload", "schedule"), [(BERT, "1f1b"), (RESNET, "gpipe")], ids=["bert-1f1b", "resnet-gpipe"]
)
def test_stages_of_a_pipeline_are_lost_also_while_they_write(
    workload: tuple[str, ...], schedule: str, tmp_path: Path
) -> None:
    faults = [fault("kill", 1, step=130), fault("kill", 0, step=205, workers=2, during="checkpoint")]
    steps = ("--steps", "300", "--checkpoint-every", "50")
    parts = ("--parallel", "pipeline=2", "--pipeline-schedule", schedule, "--workers", "2")
    done = rehearse(tmp_path, (*workload, *steps), faults, *parts)
    assert_passed(done, tmp_path, "worker_killed", cadence=101)
    assert [e["step"] for e in events(tmp_path / "r-disturbed", "checkpoint_loaded")] == [100, 200]
    whole = run(*workload, *steps, "--workers", "1", *kept_in(tmp_path, "whole"))
    assert whole.status == 0, whole.err
    assert_as_whole(tmp_path / "r-disturbed", tmp_path / "whole")


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_replica_group_that_loses_a_member_leaves_as_a_whole(cluster: str, tmp_path: Path) -> None:
    """Its shards move to the other, nothing is taken again; the replacement makes it whole, and bits stay the same."""
    small = [*BERT, "--layers", "1", "--shards", "2", "--steps", "200", *NEVER, "--parallel", "tensor=2"]
    faults = schedule(tmp_path, fault("kill", 3, step=20, workers=4))
    done = run(*small, "--workers", "4", "--faults", faults, *kept_in(tmp_path, "run", cluster), timeout_s=300)
    assert done.status == 0, done.err
    done = run(*small, "--workers", "2", *kept_in(tmp_path, "two", cluster))
    assert done.status == 0, done.err
    folder = tmp_path / "run"
    assert workers_of(folder)[:3] == [4, 2, 4]
    assert lost(folder) == {"worker_killed": 0, "workers_joined": 0}
    before, without, after = events(folder, "generation_started")[:3]
    assert before["pids"][:2] == without["pids"] == after["pids"][:2], "the other group was restarted"
    assert before["pids"][2] in after["pids"][2:], "the one that was left over waited for another"
    assert (before["ranges"], without["ranges"]) == ([[0, 1]] * 2 + [[1, 2]] * 2, [[0, 2]] * 2)
    assert_as_whole(folder, tmp_path / "two")


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("parallel", "workers"), [("tensor=2", "2:4"), ("hsdp=2", "2:4"), ("pipeline=2", "2:4")])
def test_groups_come_and_go_between_steps_without_loss(parallel: str, workers: str, tmp_path: Path) -> None:
    """A node goes after a notice, another comes; each has room for two workers."""
    faults = [
        fault("drain", 3, step=20, workers=4, seconds=60),
        fault("add-node", step=25),
        fault("kill", 0, step=40, workers=4),
    ]
    model = (*BERT, "--layers", "1", "--steps", "300", *NEVER, "--parallel", parallel)
    done = rehearse(tmp_path, model, faults, "--nodes", "2", "--workers", workers, timeout_s=500)
    assert done.status == 0, done.out + done.err
    folder = tmp_path / "r-disturbed"
    assert workers_of(folder)[:3] == [4, 2, 4]
    assert lost(folder) == {"node_drained": 0, "workers_joined": 0, "worker_killed": 0}


@pytest.mark.long
@pytest.mark.timeout(600)
def test_fsdp_grows_and_shrinks_without_loss_and_goes_back_after_a_kill(tmp_path: Path) -> None:
    faults = [
        fault("drain", 1, step=50, workers=2, seconds=60),
        fault("add-node", step=60),
        fault("kill", 1, step=615, workers=2),
    ]
    model = (*BERT, "--layers", "1", "--steps", "800", "--checkpoint-every", "100", "--parallel", "fsdp")
    done = rehearse(tmp_path, model, faults, "--nodes", "2", "--resources-per-worker", "CPU=1", "--workers", "1:2")
    assert done.status == 0, done.out + done.err
    assert "losses within 0.1%" in done.out
    folder = tmp_path / "r-disturbed"
    assert workers_of(folder)[:4] == [2, 1, 2, 1]
    found = lost(folder)
    assert found["node_drained"] == found["workers_joined"] == 0
    assert 0 < found["worker_killed"] <= 101
    assert [e["step"] for e in events(folder, "checkpoint_loaded")] == [600]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_stopped_run_goes_on_under_any_other_split(tmp_path: Path) -> None:
    """Ctrl-C writes a checkpoint in parts, which the next command reads; pipelines and one worker have one hash."""
    ways = [("pipeline=2", "2"), ("ddp", "1"), ("pipeline=4", "4"), ("ddp", "2")]
    folder, last = tmp_path / "run", 0
    command = [*BERT, "--steps", "400", *NEVER, *kept_in(tmp_path, "run")]
    for number, (parallel, workers) in enumerate(ways):
        process = start([*command, "--parallel", parallel, "--workers", workers])
        if number == len(ways) - 1:
            assert finish(process).status == 0
            break
        wait_for_step(folder, last + 20)
        os.kill(process.pid, signal.SIGINT)
        done = finish(process)
        assert done.status == 130, done.err
        last = records(folder)[-1]["step"]
        kept = json.loads((folder / "checkpoints" / f"step-{last}" / "manifest.json").read_text())["files"]
        assert len(kept) == (1 if parallel == "ddp" else int(workers) + 1)
    assert [e["step"] for e in events(folder, "checkpoint_loaded")] == sorted(
        e["step"] for e in events(folder, "checkpoint_saved") if e["step"] < 400
    )
    whole = run(*BERT, "--steps", "400", *NEVER, "--workers", "1", *kept_in(tmp_path, "whole"))
    assert whole.status == 0, whole.err
    assert result(folder)["weights_sha256"] == result(tmp_path / "whole")["weights_sha256"]


@pytest.mark.long
@pytest.mark.timeout(400)
def test_parts_on_object_storage(bucket: str, tmp_path: Path) -> None:  # noqa: F811
    """Written there, and read from there after a kill."""
    os.environ.update(KEYS)
    faults = schedule(tmp_path, fault("kill", 0, step=75))
    command = [*RESNET, "--steps", "120", "--checkpoint-every", "30", "--parallel", "fsdp", "--workers", "2"]
    done = run(*command, "--faults", faults, "--storage", bucket, "--name", "run", **KEYS)
    assert done.status == 0, done.err
    folder = Folder(bucket).child("run")
    told = [json.loads(line) for line in folder.read("events.jsonl").decode().splitlines()]
    assert [e["step"] for e in told if e["event"] == "checkpoint_loaded"] == [60]
    # The one that was read; at the end there may be one worker, if the other's replacement has not come so soon.
    manifest: Any = json.loads(folder.read("checkpoints/step-60/manifest.json"))
    assert len(manifest["files"]) == 3
    assert folder.read("checkpoints/step-120/manifest.json")
    assert "model.safetensors" in folder.child("model").names()
