"""config.toml there and back, and what the same name on the same storage means."""

import hashlib
import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.assembly import SYNC_SETTINGS, assemble, build
from orchestrator.config import RunConfig, to_toml
from orchestrator.errors import UserError
from orchestrator.resume import resolve, settle_arithmetic, take_up
from orchestrator.run import main
from orchestrator.runfolder import CONFIG, RunFolder
from orchestrator.settings import settings
from orchestrator.storage import Folder
from orchestrator.values import Cadence, Pairs, WorkerRange
from workloads.registry import WORKLOADS

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


def values(name: str, field, default) -> st.SearchStrategy:
    meta = field.metadata
    if meta["choices"]:
        return st.sampled_from(meta["choices"])
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, float):
        high = meta["high"] if meta["high"] is not None else 1e300
        return st.floats(meta["low"], high, allow_subnormal=False)
    if isinstance(default, int):
        return st.integers(int(meta["low"]), int(meta["high"] or 10**12))
    return {
        "node_labels": st.sampled_from(["", "zone=a", "zone=!a,spot=yes"]),
        "resources_per_worker": st.sampled_from(["", "CPU=0.5", "GPU=1,CPU=8"]),
        "log": st.sampled_from(["", "wandb", "mlflow,tensorboard"]),
        "checkpoint_every": st.integers(1, 10**9).map(str) | st.floats(0.001, 1e9).map(lambda s: f"{s:f}s"),
    }.get(name, TEXT)


def parallel(draw, workload: str, chosen: dict[str, object], fields: dict[str, object]) -> None:
    """Choose how the model is held, and what goes with it; what is settled by that leaves `fields`."""
    schedule = fields.pop("pipeline_schedule")
    del fields["parallel"]
    kinds = ["ddp", "fsdp", "hsdp=2", "pipeline=2", *(["tensor=2"] if workload == "bert" else [])]
    if chosen["sync"] != "allreduce" or chosen["shards"] == 1 or (kind := draw(st.sampled_from(kinds))) == "ddp":
        return
    chosen["parallel"] = kind
    chosen["workers"] = draw(st.sampled_from(["2", f"2:{chosen['shards']}"]))
    if kind.startswith("pipeline"):
        chosen["pipeline_schedule"] = draw(st.sampled_from(schedule.metadata["choices"]))
    structure = ("model", "heads", "layers", "intermediate_size", "attention", "short_length")
    for name in ("reduce", "precision", "compile", *structure):
        fields.pop(name, None)


@st.composite
def configurations(draw, workload: str) -> RunConfig:
    config_type = WORKLOADS[workload].config_type()
    defaults = config_type()
    shards = 1 << draw(st.integers(0, 8))
    chosen: dict[str, object] = {"shards": shards, "batch_size": shards * draw(st.integers(1, 1000))}
    chosen[draw(st.sampled_from(["steps", "epochs"]))] = draw(st.integers(1, 10**9))
    maximum = draw(st.integers(1, shards))
    chosen["workers"] = f"{draw(st.integers(1, maximum))}:{maximum}"
    fields = {n: f for n, f in settings(config_type).items() if n not in (*chosen, "steps", "epochs")}
    chosen["sync"] = draw(st.sampled_from(fields.pop("sync").metadata["choices"]))
    parallel(draw, workload, chosen, fields)
    for name, modes in SYNC_SETTINGS.items():
        field = fields.pop(name)
        if name == "staleness" and chosen["sync"] in modes:
            chosen[name] = draw(st.sampled_from(["0", "3", "inf"]))
        elif chosen["sync"] in modes:
            chosen[name] = draw(values(name, field, getattr(defaults, name)))
    if chosen["sync"] != "allreduce":
        for name in ("reduce", "precision", "loader_processes"):
            del fields[name]
    for name in draw(st.sets(st.sampled_from(sorted(fields)))):
        chosen[name] = draw(values(name, fields[name], getattr(defaults, name)))
    if chosen.get("reduce") == "ddp" or chosen["sync"] == "parameter-server":
        chosen.pop("compile", None)
    return build(config_type, chosen)


@pytest.mark.parametrize("workload", WORKLOADS)
@given(data=st.data())
def test_a_configuration_is_the_same_after_toml(workload, data):
    config = data.draw(configurations(workload))
    content = tomllib.loads(to_toml(config, workload))
    assert content.pop("workload") == workload
    assert build(type(config), content) == config


@given(st.floats(0.001, 1e12) | st.integers(1, 10**12))
def test_a_cadence_is_the_same_after_its_text(number):
    cadence = Cadence(seconds=number) if isinstance(number, float) else Cadence(steps=number)
    assert Cadence.parse(str(cadence)) == cadence


def test_pairs_and_ranges_are_the_same_after_their_text():
    for text in ("", "GPU=1,CPU=8", "zone=!a"):
        assert str(Pairs.parse(text)) == text
    assert str(WorkerRange.parse("1:4")) == "1:4"
    assert str(WorkerRange.parse("4:4")) == "4"


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
        | {"precision": "bf16", "optimizer": "adam", "model": "resnet20", "threads": "3", "reduce": "ddp"}.items()
    ),
)
def test_what_would_change_the_result_is_refused_by_name(tmp_path, name, value):
    folder = started(tmp_path, steps="40", lr="0.03", precision="fp32", threads="1", batch_size="256")
    with pytest.raises(UserError) as refusal:
        again(folder, tmp_path, **{name: value})
    assert str(refusal.value).startswith(f"--{name.replace('_', '-')} {value}: ")
    assert "another --name" in str(refusal.value)


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
