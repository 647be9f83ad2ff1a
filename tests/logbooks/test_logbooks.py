"""A run in TensorBoard, MLflow and W&B, read back with their own libraries: every step once, whatever happened."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from logbooks import wandb_files
from report.histories import SHA256, Written, write_run

from orchestrator import logbooks, track
from orchestrator.run import main as run_main

pytest.importorskip("tensorboard", reason="pip install -e '.[tensorboard]'")
STEPS = 200


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def tensorboard(folder: Path) -> Any:
    """What TensorBoard shows of the folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    return found.Reload()


def texts(found: Any, tag: str) -> list[str]:
    return [event.tensor_proto.string_val[0].decode() for event in found.Tensors(tag)]


def mlflow_run(folder: Path) -> tuple[Any, Any]:
    """(client, the only run of the folder's name in its database)."""
    pytest.importorskip("sqlalchemy", reason="pip install -e '.[mlflow]'")
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow/mlflow.db")
    experiments = [e.experiment_id for e in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"attributes.run_name = '{folder.name}'")
    return client, run


def losses(folder: Path, logger: str) -> list[tuple[int, float]]:
    """(step, loss) as the logger has them."""
    if logger == "tensorboard":
        return [(event.step, event.value) for event in tensorboard(folder).Scalars("loss")]
    if logger == "mlflow":
        client, run = mlflow_run(folder)
        return sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss"))
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    return [(row["step"], row["loss"]) for row in wandb_files.read(file)[0] if "loss" in row]


def written(folder: Path, logger: str) -> None:
    """Follow the run as a user does, by hand."""
    need = logbooks.PACKAGES[logger]
    for package in need:
        pytest.importorskip(package, reason=f"pip install -e '.[{logger}]'")
    assert track.main([str(folder), "--log", logger]) == 0


def agrees(folder: Path, logger: str) -> None:
    expected = [(r["step"], pytest.approx(r["loss"], rel=1e-6)) for r in records(folder)]
    assert losses(folder, logger) == expected


with_wandb = pytest.param("wandb", marks=pytest.mark.long)  # in no default extra
every_logger = pytest.mark.parametrize("logger", ["tensorboard", "mlflow", with_wandb])


def test_tensorboard_has_it_all(tmp_path):
    run = write_run(tmp_path / "night", steps=STEPS)
    written(run.folder, "tensorboard")
    agrees(run.folder, "tensorboard")
    found = tensorboard(run.folder)
    times = [r["time_s"] for r in records(run.folder)]
    assert [event.wall_time for event in found.Scalars("lr")] == pytest.approx(times)
    assert {"samples_per_s", "workers", "data_share"} <= set(found.Tags()["scalars"])
    assert [e.step for e in found.Scalars("heldout/accuracy")] == [40, 80, 120, 160, 200]
    assert found.Scalars("final/accuracy")[0].value == pytest.approx(0.9)
    assert [event.step for event in found.Tensors("incident")] == run.incidents
    first = texts(found, "incident")[0]
    assert first == "worker_killed after step 20: 4 to 3 workers, 0 steps lost, 0.41 s. rank 1 <process 7>"
    assert texts(found, "weights_sha256") == [SHA256]
    hparams = str(found.SummaryMetadata("_hparams_/session_start_info"))
    assert "batch_size" in hparams
    assert "resnet" in hparams


@pytest.fixture(scope="session")
def in_mlflow(tmp_path_factory) -> Written:
    """A run that is in MLflow; making a database takes it seconds, so others use this one."""
    run = write_run(tmp_path_factory.mktemp("mlflow") / "night", steps=STEPS)
    written(run.folder, "mlflow")
    return run


def test_mlflow_has_it_all(in_mlflow):
    run = in_mlflow
    agrees(run.folder, "mlflow")
    client, found = mlflow_run(run.folder)
    assert found.info.run_name == "night"
    assert found.info.status == "FINISHED"
    assert found.data.params["batch_size"] == "128"
    assert found.data.tags["weights_sha256"] == SHA256
    assert found.data.metrics["final/accuracy"] == 0.9
    incidents = [value for key, value in sorted(found.data.tags.items()) if key.startswith("incident.")]
    assert [f"after step {step}:" in text for step, text in zip(run.incidents, incidents, strict=True)] == [True] * 3
    evaluated = client.get_metric_history(found.info.run_id, "heldout/accuracy")
    assert sorted(m.step for m in evaluated) == [40, 80, 120, 160, 200]
    last = records(run.folder)[-1]
    lr = client.get_metric_history(found.info.run_id, "lr")
    assert max(m.timestamp for m in lr) == int(last["time_s"] * 1000)


@pytest.mark.long
def test_wandb_has_it_all(tmp_path, monkeypatch):
    key = "0123456789abcdef" * 2 + "deadbeef"
    monkeypatch.setenv("WANDB_API_KEY", key)
    run = write_run(tmp_path / "night", steps=STEPS)
    written(run.folder, "wandb")
    agrees(run.folder, "wandb")
    (file,) = run.folder.glob("wandb/offline-run-*/*.wandb")
    rows, config, summary = wandb_files.read(file)
    assert [row["event_step"] for row in rows if "incident" in row] == run.incidents
    assert [row["event_step"] for row in rows if "heldout/accuracy" in row] == [40, 80, 120, 160, 200]
    assert config["batch_size"] == 128
    assert summary["weights_sha256"] == SHA256
    assert summary["final/accuracy"] == 0.9
    assert not [f for f in run.folder.rglob("*") if f.is_file() and key.encode() in f.read_bytes()]


@every_logger
def test_a_run_in_three_commands_is_one(tmp_path, logger, request):
    """Broken off; steps taken again after a checkpoint; finished. Each time the follower goes on."""
    whole = write_run(tmp_path / "whole", steps=STEPS).folder
    folder = tmp_path / "run"
    write_run(folder, steps=STEPS)
    if logger == "mlflow":
        shutil.copytree(request.getfixturevalue("in_mlflow").folder / "mlflow", folder / "mlflow")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    ended = (folder / "result.json").rename(tmp_path / "result.json")
    (folder / "metrics.jsonl").write_text("".join(lines[:90]) + lines[90][:40])
    written(folder, logger)
    assert len(losses(folder, logger)) == 90
    # Cut to step 60, and on to 120: the same losses at other times, as the guarantee has it.
    again = [json.dumps(json.loads(line) | {"time_s": 1.79e9 + n}) + "\n" for n, line in enumerate(lines)]
    (folder / "metrics.jsonl").write_text("".join(lines[:60] + again[60:120]))
    written(folder, logger)
    assert len(losses(folder, logger)) == 120
    (folder / "metrics.jsonl").write_text("".join(lines[:60] + again[60:]))
    shutil.copy(ended, folder / "result.json")
    written(folder, logger)
    written(folder, logger)  # over already: nothing is there twice
    agrees(folder, logger)
    assert [loss for _, loss in losses(folder, logger)] == pytest.approx([r["loss"] for r in records(whole)])


@pytest.mark.long
def test_a_name_that_begins_anew_is_another_run(tmp_path):
    pytest.importorskip("sqlalchemy", reason="pip install -e '.[mlflow]'")
    folder = write_run(tmp_path / "run", steps=20).folder
    written(folder, "mlflow")
    shutil.move(folder / "mlflow", tmp_path / "mlflow")
    shutil.rmtree(folder)
    write_run(folder, steps=20, began_s=1_785_000_000.0)
    shutil.move(tmp_path / "mlflow", folder / "mlflow")
    written(folder, "mlflow")
    with pytest.raises(ValueError, match="too many"):
        mlflow_run(folder)


def test_a_logger_that_fails_leaves_the_others_alone(tmp_path, monkeypatch, capsys):
    """A server that refuses, at an address with a password: no word of that anywhere."""
    pytest.importorskip("mlflow", reason="pip install -e '.[mlflow]'")
    monkeypatch.setitem(logbooks.PACKAGES, "mlflow", ("mlflow",))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:not-to-be-seen@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    folder = write_run(tmp_path / "run", steps=50).folder
    assert track.main([str(folder), "--log", "mlflow,tensorboard"]) == 1
    agrees(folder, "tensorboard")
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("--log mlflow: failed (MlflowException")]
    assert f"later: python -m orchestrator.track {folder} --log mlflow" in line
    logged = (folder / "logs" / "errors.log").read_text()
    assert "--log mlflow: Traceback" in logged
    assert "not-to-be-seen" not in said + logged


@pytest.mark.parametrize("door", ["run", "track"])
def test_a_missing_package_is_refused_before_anything_starts(door, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(logbooks.PACKAGES, "wandb", ("no_such_package",))
    (tmp_path / "no_such_package").mkdir()  # a folder is no package
    monkeypatch.syspath_prepend(tmp_path)
    if door == "run":
        status = run_main(["resnet", "--storage", str(tmp_path / "runs"), "--log", "tensorboard,wandb"])
    else:
        status = track.main([str(write_run(tmp_path / "run").folder), "--log", "tensorboard,wandb"])
    assert status == 2
    said = capfd.readouterr().err
    assert said.startswith("error: --log wandb: no_such_package not installed; type: pip install -e '.[wandb]'")
    assert said.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nowhere"], "no run is there"),
        (["{run}"], "the run names no logger"),
        (["{run}", "--log", "visdom"], "write some of tensorboard, mlflow, wandb"),
        (["{run}", "--logs", "wandb"], "did you mean --log?"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, arguments, part):
    write_run(tmp_path / "run")
    assert track.main([a.format(run=tmp_path / "run") for a in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert part in said
    assert said.count("\n") == 1


def test_two_at_once_are_refused(tmp_path, capsys):
    folder = write_run(tmp_path / "run").folder
    with track.alone("track", str(folder), ""):
        assert track.main([str(folder), "--log", "tensorboard"]) == 2
    assert "another process is writing it" in capsys.readouterr().err
    assert "tensorboard" not in os.listdir(folder)
