"""What the same name on the same storage means: which settings are kept, taken, refused."""

import hashlib
import json
from pathlib import Path

import pytest

from orchestrator.assembly import assemble, build
from orchestrator.config import RunConfig, to_toml
from orchestrator.errors import UserError
from orchestrator.resume import resolve, settle_arithmetic, take_up
from orchestrator.run import main
from orchestrator.runfolder import CONFIG, RunFolder
from orchestrator.storage import Folder
from orchestrator.values import Cadence, WorkerRange
from workloads.registry import WORKLOADS


def started(tmp_path: Path, workload: str = "resnet", **given_then: object) -> RunFolder:
    """A run folder in which a run was begun with these settings."""
    config = resolve(build(WORKLOADS[workload].config_type(), {"name": "r", "storage": str(tmp_path), **given_then}))
    folder = RunFolder(Folder(config.storage).child("r"))
    folder.folder.write(CONFIG, to_toml(take_up(config, given_then, folder, workload), workload).encode())
    return folder


def again(folder: RunFolder, tmp_path: Path, workload: str = "resnet", **given_now: object) -> RunConfig:
    """What a second command takes up, by the same way as orchestrator.run."""
    given_now = {"name": "r", "storage": str(tmp_path), **given_now}
    config = resolve(assemble(WORKLOADS[workload].config_type(), given_now))
    return take_up(config, given_now, folder, workload)


@pytest.mark.parametrize("left", ["result.json", "metrics.jsonl", "checkpoints/step-500/theirs", "model/theirs.bin"])
def test_what_another_program_has_in_the_folder_is_not_touched(tmp_path, left):
    file = tmp_path / "r" / left
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("theirs")
    with pytest.raises(UserError, match=rf"--name r: .*/r has {left.split('/')[0]} and no config.toml.*another --name"):
        started(tmp_path)
    assert [f for f in (tmp_path / "r").rglob("*") if f.is_file()] == [file]
    assert file.read_text() == "theirs"


def test_logs_of_a_start_that_was_refused_leave_the_name_free(tmp_path):
    (tmp_path / "r" / "logs").mkdir(parents=True)
    (tmp_path / "r" / "logs" / "ray.log").write_text("x")
    assert started(tmp_path).config()


def test_a_config_of_another_program_is_no_run(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / CONFIG).write_text("epochs = 30\n")
    folder = RunFolder(Folder(str(tmp_path)).child("r"))
    with pytest.raises(UserError, match=r"--name r: is a run of something else in .*; use another --name"):
        again(folder, tmp_path)


def test_what_is_not_given_keeps_its_stored_value(tmp_path):
    then = {"lr": "0.03", "steps": "40", "shards": "16", "batch_size": "64", "seed": "5", "keep_checkpoints": "7"}
    folder = started(tmp_path, **then)
    config = again(folder, tmp_path)
    assert (config.lr, config.steps, config.epochs, config.seed) == (0.03, 40, None, 5)
    assert (config.shards, config.batch_size, config.keep_checkpoints) == (16, 64, 7)
    assert config.workers == WorkerRange(1, 16)


def test_what_cannot_change_the_result_is_taken(tmp_path):
    now = {
        "workers": "2:3",
        "placement": "spread",
        "keep_checkpoints": "9",
        "checkpoint_every": "5",
        "max_incidents": "1",
    }
    config = again(started(tmp_path, steps="40", lr="0.03"), tmp_path, **now)
    assert config.workers == WorkerRange(2, 3)
    assert (config.placement, config.keep_checkpoints, config.max_incidents) == ("spread", 9, 1)
    assert config.checkpoint_every == Cadence(steps=5)
    assert (config.lr, config.steps) == (0.03, 40)


@pytest.mark.parametrize(
    ("name", "value"),
    sorted(
        {"lr": "0.5", "seed": "9", "steps": "41", "epochs": "3", "shards": "4", "batch_size": "512"}.items()
        | {
            "accelerator": "cuda",
            "precision": "bf16",
            "optimizer": "adam",
            "model": "resnet20",
            "threads": "3",
            "reduce": "ddp",
        }.items()
    ),
)
def test_what_would_change_the_result_is_refused_by_name(tmp_path, name, value):
    folder = started(
        tmp_path, steps="40", lr="0.03", precision="fp32", threads="1", batch_size="256", accelerator="cpu"
    )
    with pytest.raises(UserError) as refusal:
        again(folder, tmp_path, **{name: value})
    assert str(refusal.value).startswith(f"--{name.replace('_', '-')} {value}: ")
    assert "another --name" in str(refusal.value)


@pytest.mark.parametrize(
    ("begun", "now", "was"), [("steps", "epochs", "--steps 40"), ("epochs", "steps", "--epochs 40")]
)
def test_the_other_way_to_give_a_length_is_named(tmp_path, begun, now, was):
    folder = started(tmp_path, **{begun: "40"})
    with pytest.raises(UserError, match=f"^--{now} 7: run .* was started with {was}, and another value changes its"):
        again(folder, tmp_path, **{now: "7"})


def test_the_same_value_again_and_auto_are_fine(tmp_path):
    folder = started(tmp_path, steps="40", lr="0.03", precision="bf16", threads="2")
    config = again(folder, tmp_path, lr="0.030", steps=40, precision="auto", threads="0")
    assert (config.precision, config.threads) == ("bf16", 2)


def test_threads_are_settled_before_they_are_stored_and_the_precision_by_the_workers(tmp_path):
    stored = started(tmp_path, steps="40", resources_per_worker="CPU=2").config()
    assert stored["precision"] == "auto"
    assert stored["threads"] == 2
    assert settle_arithmetic(build(RunConfig, {"steps": 1, "resources_per_worker": "CPU=0.5"}), False).threads == 1
    served = build(RunConfig, {"steps": 1, "sync": "parameter-server"})
    assert [settle_arithmetic(served, gpu).precision for gpu in (False, True)] == ["fp32", "bf16"]


def test_a_resumed_run_has_the_precision_that_was_measured(tmp_path):
    folder = started(tmp_path, steps="40")
    assert again(folder, tmp_path).precision == "auto", "it was stopped before its workers were there"
    folder.settle_precision("bf16")
    assert again(folder, tmp_path).precision == "bf16"
    assert again(folder, tmp_path, precision="auto").precision == "bf16"
    with pytest.raises(UserError, match="started with bf16"):
        again(folder, tmp_path, precision="fp32")


def test_the_accelerator_is_settled_once(tmp_path):
    folder = started(tmp_path, steps="40")
    assert again(folder, tmp_path, accelerator="cuda").accelerator == "cuda", "nothing was computed yet"
    folder.settle(accelerator="cpu", accelerator_type="")
    assert again(folder, tmp_path).accelerator == again(folder, tmp_path, accelerator="auto").accelerator == "cpu"
    with pytest.raises(UserError, match="started with cpu"):
        again(folder, tmp_path, accelerator="cuda")


def test_another_workload_under_the_name_is_refused(tmp_path):
    folder = started(tmp_path, steps="40")
    with pytest.raises(UserError, match="is a run of resnet"):
        again(folder, tmp_path, "bert", steps="40")


def test_more_workers_than_the_default_shards_may_resume_a_run_of_many_shards(tmp_path):
    """The run has 32 shards; its resumption need not repeat that to get 20 workers."""
    folder = started(tmp_path, steps="40", shards="32", batch_size="64")
    assert again(folder, tmp_path, workers="20").workers == WorkerRange(20, 20)


def test_more_workers_than_the_stored_shards_are_refused(tmp_path):
    folder = started(tmp_path, steps="40", shards="2")
    with pytest.raises(UserError, match="more workers than shards"):
        again(folder, tmp_path, workers="8")


def test_a_pipeline_may_go_on_without_one(tmp_path):
    folder = started(tmp_path, parallel="pipeline=2", pipeline_schedule="gpipe", workers="2")
    assert again(folder, tmp_path).pipeline_schedule == "gpipe"
    whole = again(folder, tmp_path, parallel="ddp", workers="1")
    assert (str(whole.parallel), whole.pipeline_schedule) == ("ddp", "1f1b")
    with pytest.raises(UserError, match="--pipeline-schedule gpipe: goes with --parallel pipeline=N"):
        again(folder, tmp_path, parallel="fsdp", pipeline_schedule="gpipe")


def test_a_run_of_given_steps_resumes_by_its_name_alone(tmp_path):
    """The command that an interrupted run prints for its resumption has name and storage only."""
    folder = started(tmp_path, "bert", steps="40")
    assert again(folder, tmp_path, "bert").steps == 40


def test_torn_files_of_a_run_are_told_in_one_line(tmp_path):
    folder = started(tmp_path, steps="40")
    folder.folder.write("result.json", b'{"status": "fini')
    with pytest.raises(UserError, match=r"result\.json: not valid JSON"):
        folder.result()
    folder.folder.write(CONFIG, b"lr = ")
    with pytest.raises(UserError, match=r"config\.toml: not valid TOML"):
        again(folder, tmp_path)


def tree(folder: Path) -> dict[str, str]:
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() + str(f.stat().st_mtime_ns)
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


@pytest.mark.parametrize("given_now", [[], ["--workers", "2"], ["--steps", "40"]])
def test_a_finished_run_says_so_and_changes_nothing(tmp_path, capsys, given_now):
    folder = started(tmp_path, steps="40")
    folder.folder.write(
        "result.json", json.dumps({"status": "finished", "steps": 40, "weights_sha256": "ab" * 32}).encode()
    )
    folder.folder.write("checkpoints/step-40/state.safetensors", b"x")
    before = tree(tmp_path)
    assert len(before) == 3
    assert main(["resnet", "--storage", str(tmp_path), "--name", "r", *given_now]) == 0
    assert "finished already" in capsys.readouterr().out
    assert tree(tmp_path) == before


def test_a_changed_setting_of_a_finished_run_is_refused_all_the_same(tmp_path, capsys):
    folder = started(tmp_path, steps="40")
    folder.folder.write("result.json", json.dumps({"status": "finished", "steps": 40, "weights_sha256": "ab"}).encode())
    before = tree(tmp_path)
    assert main(["resnet", "--storage", str(tmp_path), "--name", "r", "--lr", "7"]) == 2
    assert capsys.readouterr().err.startswith("error: --lr 7.0: run r was started with")
    assert tree(tmp_path) == before


def test_other_data_than_that_of_the_checkpoints_are_refused(tmp_path, capsys):
    """They would all be passed over, and training begin anew."""
    folder = started(tmp_path, steps="40")
    folder.folder.write("checkpoints/step-20/manifest.json", b'{"identity": "of other data"}')
    folder.folder.write("checkpoints/step-30/manifest.json", b"torn")
    before = tree(tmp_path)
    assert main(["resnet", "--storage", str(tmp_path), "--name", "r"]) == 2
    line = capsys.readouterr().err
    assert "--name r: its checkpoints are of other data (digits has changed since)" in line
    assert line.count("\n") == 1
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "x" * 100])
def test_names_that_are_fine(name, tmp_path):
    assert resolve(build(RunConfig, {"steps": 1, "name": name, "storage": str(tmp_path)})).name == name


def test_a_name_is_made_where_none_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, other = (resolve(build(RunConfig, {"steps": 1})) for _ in range(2))
    assert one.name != other.name
    assert one.storage == f"{tmp_path}/runs"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert resolve(build(RunConfig, {"steps": 1})).storage == str(Path("~/runs").expanduser())
    assert resolve(build(RunConfig, {"steps": 1, "storage": "s3://b/r"})).storage == "s3://b/r"


def test_a_folder_that_goes_with_a_submitted_job_keeps_no_run(tmp_path, monkeypatch):
    sent = tmp_path / "working_dir_files" / "_ray_pkg_0a1b2c"
    sent.mkdir(parents=True)
    monkeypatch.chdir(sent)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UserError, match=r"^--storage runs: a submitted job's folder is deleted after it; give an"):
        resolve(build(RunConfig, {"steps": 1, "storage": "runs"}))
    for kept, found in ((str(tmp_path), str(tmp_path)), ("s3://b/r", "s3://b/r"), ("~/x", str(Path.home() / "x"))):
        assert resolve(build(RunConfig, {"steps": 1, "storage": kept})).storage == found
