"""What cannot be exported is one line that says what to do, and exit status 2; the table says what int8 misses."""

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from finished_runs import finish
from PIL import Image

from orchestrator import exported
from orchestrator.errors import TrainingError, UserError
from orchestrator.export import export, main, parser
from orchestrator.exporter import Exporter
from orchestrator.measured import Row, compared, table
from workloads.bert.config import BertConfig
from workloads.bert.data import prepare
from workloads.registry import WORKLOADS
from workloads.resnet.config import ResnetConfig


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    finish(folder, "resnet", ResnetConfig(storage="runs", name="first"), steps=0)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def refusal(capsys, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    return shown.err


def test_folders_without_a_finished_run(run, tmp_path, capsys):
    assert "no run is there (no config.toml)" in refusal(capsys, tmp_path / "none")
    (run / "result.json").write_text(json.dumps({"status": "stopped"}))
    words = "has not finished; let it finish with: python -m orchestrator.run resnet --storage runs --name first"
    assert words in refusal(capsys, run)
    (run / "result.json").unlink()
    assert words in refusal(capsys, run)


@pytest.mark.parametrize("number", ["--threads", "--rounds", "--calibration-samples", "--fine-tune-lr"])
def test_numbers_out_of_range(run, capsys, number):
    assert number in refusal(capsys, run, number, "0")


@pytest.mark.parametrize(
    ("number", "given"),
    [
        ("--threads", "20000"),
        ("--fine-tune-lr", "inf"),
        ("--fine-tune-lr", "nan"),
        ("--round-seconds", "nan"),
        ("--round-seconds", "-1"),
        ("--accuracy-limit", "nan"),
    ],
)
def test_numbers_that_are_none(run, capsys, number, given):
    assert f"{number} {given}" in refusal(capsys, run, number, given)


def test_words_that_are_not_known(run, capsys):
    assert "invalid choice: 'int4'" in refusal(capsys, run, "--quantize", "int4")
    assert "did you mean --rounds?" in refusal(capsys, run, "--round", "3")


def test_missing_packages_are_named(monkeypatch):
    with pytest.raises(UserError, match=r"no_such_package: not installed; .*pip install -e '\.\[export\]'"):
        exported.need("json", "no_such_package")


for _name in exported.PACKAGES:  # what follows exports, or comes so far that it would
    pytest.importorskip(_name)


def test_a_quantization_that_the_workload_has_not(run, capsys):
    assert "use --quantize static" in refusal(capsys, run, "--quantize", "dynamic")


def test_models_that_are_missing_or_damaged(run, capsys):
    weights = run / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "model/ of the run cannot be loaded" in refusal(capsys, run)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "is not what its result.json tells" in refusal(capsys, run)
    shutil.rmtree(run / "model")
    assert "no trained model is there" in refusal(capsys, run)


def test_data_that_is_gone(run, tmp_path, capsys):
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace('data = "digits"', f'data = "imagefolder:{tmp_path}/gone"'))
    assert "--data imagefolder:" in refusal(capsys, run)


class Seen(Exception):
    """What an export would be made of."""


@pytest.fixture
def seen(monkeypatch):
    def made(name, config, workload, *_):
        raise Seen(workload)

    monkeypatch.setattr("orchestrator.exporter.Exporter", made)

    def workload(folder):
        with pytest.raises(Seen) as found:
            export(parser().parse_args([str(folder)]))
        return found.value.args[0]

    return workload


def test_text_that_has_changed_is_split_as_the_model_learnt_it(tmp_path, seen):
    lines = [f"Sentence {n}: the old dog sees the {['cat', 'bird'][n % 2]} and goes home." for n in range(200)]
    (tmp_path / "a.txt").write_text("\n\n".join(lines))
    sizes = {"hidden_size": 32, "layers": 1, "heads": 2, "vocab_size": 300, "sequence_length": 16}
    config = BertConfig(data=f"text:{tmp_path}/*.txt", storage="runs", name="r", **sizes)
    finish(tmp_path / "run", "bert", config, steps=0)
    before, known = WORKLOADS["bert"].build(config), prepare(config).vocabulary.tokens
    (tmp_path / "b.txt").write_text("\n\n".join(f"Xylophones zigzag {n} quietly." for n in range(400)))
    after = seen(tmp_path / "run")
    assert after._prepared.vocabulary.tokens == known
    assert prepare(config).vocabulary.tokens != known
    assert len(after.samples("heldout")) != len(before.samples("heldout"))


def test_classes_keep_the_model_s_numbers_or_are_refused(tmp_path, capsys, seen):
    for part in ("train", "val"):
        for number, name in enumerate(("ape", "bee", "cat")):
            (tmp_path / "data" / part / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), (80 * number, 0, 0)).save(tmp_path / "data" / part / name / "0.png")
    config = ResnetConfig(data=f"imagefolder:{tmp_path}/data", image_size=32, storage="runs", name="r")
    finish(tmp_path / "run", "resnet", config, steps=0)
    for part in ("train", "val"):
        shutil.rmtree(tmp_path / "data" / part / "ape")
    assert seen(tmp_path / "run").samples("heldout").microbatch(np.arange(2), 0)["labels"].tolist() == [1, 2]
    for part in ("train", "val"):
        (tmp_path / "data" / part / "bee").rename(tmp_path / "data" / part / "dog")
    assert "the model does not know 1 of its classes (dog)" in refusal(capsys, tmp_path / "run")


def test_a_full_disk_for_temporary_files_is_told_as_that(run, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert f"{tempfile.gettempdir()}: No space left on device; make room, or set TMPDIR to another" in refusal(
        capsys, run
    )


def test_a_folder_with_other_files_is_left_alone(run, tmp_path, capsys):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("dear")
    assert "holds other files" in refusal(capsys, run, "--out", tmp_path / "letters")
    assert (tmp_path / "letters" / "letter.txt").read_text() == "dear"


def test_the_table_says_what_int8_misses():
    rows = [
        Row("fp32", "torch", 1000, {"accuracy": 0.9}, {1: 2.0, 32: 8.0}),
        Row("fp32", "onnxruntime", 900, {"accuracy": 0.9}, {1: 1.0, 32: 10.0}),
        Row("int8", "onnxruntime", 270, {"accuracy": 0.896}, {1: 1.5, 32: 4.0}),
    ]
    found = compared(rows, "accuracy")[2]
    assert found["size_ratio"] == 0.3
    assert found["points_lost"] == pytest.approx(0.4)
    assert found["latency_ratio"] == {"1": 1.5, "32": 0.5}  # of the fastest fp32, whatever runs it
    assert list(found["meets"].values()) == [True, True, False, True]
    assert table(compared(rows, "accuracy"), ["accuracy"]).splitlines()[-1] == (
        "int8 with onnxruntime is not: faster at batch 1"
    )


@pytest.mark.parametrize(
    ("real", "filled_up", "passes"),
    [(1e-5, 1e-3, True), (1e-2, 0.0, False), (0.0, 6000.0, False), (0.0, float("nan"), False)],
)
def test_words_that_fill_a_vocabulary_up_hide_no_difference(real, filled_up, passes):
    """Their logits are some 10,000 below the others, of which the largest here is 2."""
    logits = torch.tensor([[1.0, -2.0, -10000.0]])
    other = logits + torch.tensor([[real, 0.0, filled_up]])
    exporter = SimpleNamespace(_exporting=SimpleNamespace(inputs=["x"]))
    check = lambda: Exporter._check(exporter, lambda _: logits, lambda _: other, {"x": None})  # noqa: E731
    if passes:
        assert check() == pytest.approx(real, rel=0.1)
    else:
        with pytest.raises(TrainingError, match="nothing is exported"):
            check()
