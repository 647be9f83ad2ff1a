"""What a trained model can be evaluated on: other data is made ready as the model knows it, or refused in one line."""

import dataclasses
import json
import os
import pickle
import shutil
from socket import gethostname
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from finished_runs import finish
from PIL import Image
from preparing import do, job

from orchestrator.errors import UserError
from orchestrator.evaluate import CHUNK, sums_of, totals
from orchestrator.precision import Precision
from orchestrator.score import find_model, main
from orchestrator.scorer import Scorer, Task
from workloads.bert.config import BertConfig
from workloads.bert.exporting import BertExporting
from workloads.registry import WORKLOADS
from workloads.resnet.config import ResnetConfig
from workloads.resnet.exporting import ResnetExporting


def image_folder(folder, names, size=40):
    random = np.random.default_rng(0)
    for part, each in (("train", 1), ("val", 3)):
        for number, name in enumerate(names):
            (folder / part / name).mkdir(parents=True)
            for n in range(each):
                pixels = random.integers(0, 256, (size, size + number, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{n}.png")
    return f"imagefolder:{folder}"


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    """A run's folder whose model knows three classes."""
    folder = tmp_path_factory.mktemp("animals")
    data = image_folder(folder / "images", ["ape", "bee", "cat"])
    config = ResnetConfig(data=data, image_size=32, storage="runs", name="animals")
    return folder, config, finish(folder, "resnet", config, steps=0)


def test_fewer_classes_keep_the_model_s_labels(animals, tmp_path):
    """And the pixels its normalization: a class alone is summed as among the others."""
    folder, config, model = animals
    exporting = ResnetExporting(config)
    about = exporting.about(config, folder / "model")
    about["mean"] = [0.1, 0.2, 0.3]
    shutil.copytree(folder / "images", tmp_path / "some")
    for part in ("train", "val"):
        shutil.rmtree(tmp_path / "some" / part / "ape")
    found = {}
    for data in (config.data, f"imagefolder:{tmp_path}/some"):
        asked = exporting.settings_for(data, about, folder / "model")
        workload = exporting.workload_for(asked, about)
        samples = workload.samples("heldout")
        batch = samples.microbatch(np.arange(len(samples)), 0)
        found[data] = batch["labels"].tolist(), batch["images"]
    (all_labels, all_images), (labels, images) = found.values()
    assert all_labels == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert labels == [1, 1, 1, 2, 2, 2]
    assert torch.equal(images, all_images[3:])
    plain = exporting.workload_for(asked, exporting.about(config, folder / "model")).samples("heldout")
    assert not torch.equal(plain.microbatch(np.arange(6), 0)["images"], images)
    names, rows = sums_of(workload, model, Precision("fp32", "cpu"), samples, range(1), 0, torch.device("cpu"))
    assert len(samples) < CHUNK
    assert totals(names, rows)["count"] == 6


def test_a_scorer_leaves_no_files(animals, tmp_path, monkeypatch):
    """Though it is killed: it needs none once it has begun."""
    folder, config, _ = animals
    monkeypatch.setattr("orchestrator.scorer.prepare_torch", lambda threads, same_bits: None)  # for the whole process
    monkeypatch.setattr("ray.get_gpu_ids", list)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    files = {file.name: file.read_bytes() for file in (folder / "model").iterdir()}
    sha256 = json.loads((folder / "result.json").read_text())["weights_sha256"]
    about = ResnetExporting(config).about(config, folder / "model")
    found = WORKLOADS["resnet"].check_data(config).fingerprint
    scorer = Scorer(Task("resnet", config, config.data, about, sha256, 1, found))
    assert scorer.begin(files) == ("node", os.getpid())
    assert not list(tmp_path.glob("orchestrator-score-*"))
    assert scorer.metrics(*scorer.sums(range(1))).keys() >= {"accuracy"}
    with pytest.raises(UserError, match=f"what {gethostname()} has is not what the command has") as refused:
        Scorer(Task("resnet", config, config.data, about, sha256, 1, "of other data")).begin(files)
    assert refused.value.node == "node"
    assert pickle.loads(pickle.dumps(refused.value)).node == "node"


def refusal(capsys, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    shown = capsys.readouterr()
    assert not shown.out
    assert shown.err.count("\n") == 1
    return shown.err


def test_mistakes_are_one_line(animals, tmp_path, capsys):
    folder, _, _ = animals
    strange = image_folder(tmp_path / "strange", ["ape", "dog", "emu"])
    assert "does not know 2 of its classes (dog, emu)" in refusal(capsys, folder, "--data", strange)
    assert "10 of its classes (0, 1, 2, 3, 4, ...)" in refusal(capsys, folder, "--data", "digits")
    assert "no such kind of data" in refusal(capsys, folder, "--data", "digitz")
    assert "no run is there" in refusal(capsys, tmp_path / "none")
    assert "--workers -1" in refusal(capsys, folder, "--workers", "-1")
    assert "reserves nothing" in refusal(capsys, folder, "--resources-per-worker", "CPU=0")
    assert "no file can be written" in refusal(capsys, folder, "--out", tmp_path / "no" / "where.json")
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / "model" / "config.json").write_text("{")
    assert "cannot be loaded" in refusal(capsys, damaged)
    unfinished = shutil.copytree(folder, tmp_path / "unfinished")
    (unfinished / "result.json").write_text(json.dumps({"status": "stopped"}))
    assert "has not finished" in refusal(capsys, unfinished)


def test_an_export_of_an_older_version(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    record = {"format": 1, "workload": "resnet", "output": "y", "about": {}, "files": [], "external_data": False}
    (tmp_path / "export.json").write_text(json.dumps(record))
    assert "export the run again" in refusal(capsys, tmp_path)


def write_text(folder, words):
    lines = [f"Sentence {n}: the old {words[n % 6]} sees the {words[n // 6 % 6]} and goes." for n in range(300)]
    folder.mkdir()
    (folder / "text.txt").write_text("\n\n".join(lines))
    return f"text:{folder}/*.txt"


def test_text_is_split_with_the_model_s_tokenizer(tmp_path):
    """Also that of the run itself, once it has changed, for training made the tokenizer from it."""
    one = write_text(tmp_path / "one", ["dog", "cat", "bird", "fish", "horse", "snake"])
    two = write_text(tmp_path / "two", ["table", "chair", "lamp", "shelf", "desk", "couch"])
    config = BertConfig(data=one, hidden_size=32, layers=1, heads=2, vocab_size=300, sequence_length=16, batch_size=16)
    finish(tmp_path, "bert", config, steps=0)
    model = find_model(str(tmp_path))
    assert model.config == config
    exporting = BertExporting(model.config)
    about = exporting.about(config, tmp_path / "model")
    assert exporting.settings_for(one, about, tmp_path / "model") == config
    other = exporting.settings_for(two, about, tmp_path / "model")
    vocabularies = [
        exporting.workload_for(asked, about)._prepared.vocabulary
        for asked in (config, other, dataclasses.replace(other, tokenizer=""))
    ]
    assert vocabularies[0] == vocabularies[1] != vocabularies[2]
    shutil.copy(tmp_path / "two" / "text.txt", tmp_path / "one" / "text.txt")
    assert exporting.settings_for(one, about, tmp_path / "model") == dataclasses.replace(other, data=one)


def test_prepared_text_has_to_have_the_model_s_tokenizer(tmp_path):
    one = write_text(tmp_path / "one", ["dog", "cat", "bird", "fish", "horse", "snake"])
    two = write_text(tmp_path / "two", ["table", "chair", "lamp", "shelf", "desk", "couch"])
    config = BertConfig(data=one, hidden_size=32, layers=1, heads=2, vocab_size=300, sequence_length=16, batch_size=16)
    finish(tmp_path, "bert", config, steps=0)
    exporting, model = BertExporting(config), tmp_path / "model"
    about = exporting.about(config, model)
    for name, source, own in (
        ("same", two, {"tokenizer": str(model), "sequence_length": "12"}),
        ("other", two, {"vocab_size": "300", "sequence_length": "16"}),
        ("long", two, {"tokenizer": str(model), "sequence_length": "24"}),
    ):
        flags = [word for key, value in own.items() for word in ("--" + key.replace("_", "-"), value)]
        do(job("bert", source, tmp_path / name, *flags, **own))
    asked = exporting.settings_for(f"parquet:{tmp_path}/same", about, model)
    assert asked.sequence_length == 12
    assert len(exporting.workload_for(asked, about).samples("heldout")) > 0
    with pytest.raises(UserError, match="another tokenizer than the model's"):
        exporting.settings_for(f"parquet:{tmp_path}/other", about, model)
    with pytest.raises(UserError, match="sequences of 24 tokens; the model takes 16"):
        exporting.settings_for(f"parquet:{tmp_path}/long", about, model)


def test_figures_are_told_where_their_file_cannot_be_written(tmp_path, capsys, monkeypatch):
    """The disk has filled while they were computed."""
    found = {"samples": 3, "workers": 1, "workers_lost": 0, "wall_s": 1.0, "metrics": {"accuracy": 0.5}}
    monkeypatch.setattr("orchestrator.score.score", lambda settings: found)
    given = [str(tmp_path), "--data", "digits", "--out"]
    assert main([*given, str(tmp_path / "figures.json")]) == 0
    assert json.loads((tmp_path / "figures.json").read_text())["metrics"] == {"accuracy": 0.5}
    capsys.readouterr()
    (tmp_path / "full").symlink_to("/dev/full")
    assert main([*given, str(tmp_path / "full")]) == 2
    told = capsys.readouterr()
    assert "held-out: accuracy 0.5000" in told.out
    assert "--out" in told.err
    assert "cannot be written (No space left on device); what was found is above" in told.err


def test_a_file_that_may_not_be_written_is_refused_before_anything_is_computed(tmp_path, capsys, monkeypatch):
    (tmp_path / "theirs").write_text("theirs")
    monkeypatch.setattr(os, "access", lambda file, mode: False)
    assert main([str(tmp_path), "--data", "digits", "--out", str(tmp_path / "theirs")]) == 2
    assert "theirs: no file can be written there" in capsys.readouterr().err
