"""Finished runs exported in every way, and what was exported asked: by onnxruntime, by torch, and without torch."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from finished_runs import finish
from PIL import Image

from orchestrator import exporter
from orchestrator.export import main
from orchestrator.exported import open_exported
from workloads.bert.config import BertConfig
from workloads.registry import WORKLOADS
from workloads.resnet.config import ResnetConfig

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("torchao")

REPOSITORY = Path(__file__).parents[2]
QUICK = ("--rounds", "3")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A ResNet-8 that knows most digits: (folder, model)."""
    folder = tmp_path_factory.mktemp("digits")
    return folder, finish(folder, "resnet", ResnetConfig(storage="runs", name="digits"), steps=60)


@pytest.fixture(scope="module")
def plain(digits):
    """It, exported as it is over an older export: (folder, its record)."""
    out = digits[0] / "export" / "none"
    out.mkdir(parents=True)
    (out / "export.json").write_text(json.dumps({"written": ["left-over.bin"]}))
    (out / "left-over.bin").write_bytes(b"x")
    return exported(digits[0], "none")


@pytest.fixture(scope="module")
def text_config(tmp_path_factory):
    words = ["dog", "cat", "bird", "fish", "horse", "snake"]
    lines = [f"Sentence {n}: the old {words[n % 6]} sees the {words[n // 6 % 6]} and goes home." for n in range(300)]
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(lines))
    return BertConfig(
        data=f"text:{file}", hidden_size=32, layers=2, heads=2, vocab_size=300, sequence_length=16, batch_size=16
    )


def exported(folder, mode, *flags) -> tuple[Path, dict]:
    assert main([str(folder), "--quantize", mode, *QUICK, *flags]) == 0
    out = folder / "export" / mode
    return out, json.loads((out / "export.json").read_text())


def logits(out: Path, inputs: dict) -> np.ndarray:
    return open_exported(str(out), 1).run({name: tensor.numpy() for name, tensor in inputs.items()})


def row(record, kind, engine) -> dict:
    (found,) = [r for r in record["table"] if (r["model"], r["engine"]) == (kind, engine)]
    return found


def test_resnet_as_it_is(digits, plain):
    """Program, ONNX and safetensors give the model's own output, for any batch; nothing else is left there."""
    (folder, model), (out, record) = digits, plain
    names = {"export.json", "model.onnx", "model.pt2", "model.safetensors", "config.json"}
    assert {file.name for file in out.iterdir()} == names
    samples = WORKLOADS["resnet"].build(ResnetConfig()).samples("heldout")
    program = torch.export.load(out / "model.pt2").module()
    for size in (1, 2, 5, 33):
        images = samples.microbatch(np.arange(size), 0)["images"]
        expected = model(images).detach()
        assert np.allclose(logits(out, {"images": images}), expected, atol=1e-4)
        assert torch.equal(program(images), expected)
    assert (out / "model.safetensors").read_bytes() == (folder / "model" / "model.safetensors").read_bytes()
    assert row(record, "fp32", "torch")["metrics"] == pytest.approx(
        row(record, "fp32", "onnxruntime")["metrics"], abs=1e-4
    )
    assert record["onnxruntime_difference"] < 1e-4
    assert row(record, "fp32", "torch")["metrics"]["accuracy"] > 0.9


def test_nothing_of_training_is_needed_to_ask(digits, plain, tmp_path):
    (_, model), (out, _) = digits, plain
    moved = shutil.copytree(out, tmp_path / "elsewhere")
    samples = WORKLOADS["resnet"].build(ResnetConfig()).samples("heldout")
    Image.fromarray(samples.images[3, :, :, 0]).save(tmp_path / "digit.png")
    code = (
        "import sys\nfrom orchestrator.predict import main\n"
        f"status = main([{str(moved)!r}, '--input', {str(tmp_path / 'digit.png')!r}, '--json'])\n"
        "training = {'torch', 'torchvision', 'ray', 'transformers', 'torchao', 'onnx', 'workloads.resnet.workload'}\n"
        "assert not training & set(sys.modules), training & set(sys.modules)\nsys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout)
    expected = model(samples.microbatch(np.asarray([3]), 0)["images"])[0].softmax(0).topk(5)
    assert answer["names"] == [str(int(label)) for label in expected.indices]
    assert answer["shares"] == pytest.approx(expected.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("attention", ["sequence", "document"])
def test_bert_as_it_is_and_with_dynamic_int8(text_config, attention, tmp_path, capsys):
    """int8 moves the logits little, holds each matrix once, and fills [MASK] in texts shorter than a sequence."""
    text_config = dataclasses.replace(text_config, attention=attention)
    model = finish(tmp_path, "bert", text_config, steps=30)
    out, _ = exported(tmp_path, "none")
    batch = WORKLOADS["bert"].build(text_config).samples("heldout").microbatch(np.arange(3), 0)
    inputs = {name: batch[name] for name in ("input_ids", "masked", "documents") if name in batch}
    expected = model(*inputs.values()).detach().numpy()
    assert np.allclose(logits(out, inputs), expected, atol=1e-4)

    out8, record = exported(tmp_path, "dynamic")
    found = logits(out8, inputs)
    assert 0 < np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    assert np.allclose(torch.export.load(out8 / "model.pt2").module()(*inputs.values()).detach(), expected, atol=0.3)
    graph = onnx.load(out8 / "model.onnx").graph
    matrices = {t.name: tuple(t.dims) for t in graph.initializer if len(t.dims) == 2}
    kinds = {t.name: t.data_type for t in graph.initializer}
    vocabulary = model.bert.embeddings.word_embeddings.num_embeddings
    assert [shape for shape in matrices.values() if vocabulary in shape] == [(vocabulary, 32)]
    large = [kinds[name] for name, shape in matrices.items() if np.prod(shape) >= 1024]
    assert set(large) == {onnx.TensorProto.INT8}
    assert len(large) == 2 * 6 + 1 + 1  # layers, the head's own, the embeddings
    assert Counter(node.op_type for node in graph.node)["MatMulInteger"] == 14
    assert abs(row(record, "int8", "onnxruntime")["points_lost"]) < 5

    capsys.readouterr()
    from orchestrator.predict import main as predict

    assert predict([str(out8), "--input", "The old [MASK] sees the dog."]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "[MASK] 1:"
    assert len(shown) == 7
    assert predict([str(out8), "--input", "nothing to fill"]) == 2


@pytest.mark.long  # the next test, and the README's commands, go the same way
def test_resnet_static(digits):
    """Every convolution computes in int8: it reads int8 and what it gives is made int8 at once."""
    folder, model = digits
    out, record = exported(folder, "static", "--calibration-samples", "64")
    assert_convolutions_are_int8(out / "model.onnx", 7)
    assert row(record, "int8", "onnxruntime")["points_lost"] <= 1.5
    assert row(record, "int8", "onnxruntime")["size_ratio"] < 0.3
    assert row(record, "int8", "torch")["file_bytes"] < row(record, "fp32", "torch")["file_bytes"]
    samples = WORKLOADS["resnet"].build(ResnetConfig()).samples("heldout")
    program = torch.export.load(out / "model.pt2").module()
    for size in (1, 5):
        images = samples.microbatch(np.arange(size), 0)["images"]
        expected = model(images).detach().numpy()
        assert 0 < np.abs(logits(out, {"images": images}) - expected).max() < 0.2 * np.abs(expected).max()
        assert 0 < np.abs(program(images).detach().numpy() - expected).max() < 0.2 * np.abs(expected).max()


def assert_convolutions_are_int8(path: Path, count: int) -> None:
    graph = onnx.load(path).graph
    made_by = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == count
    for node in convolutions:
        assert [made_by[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2
        after = readers[node.output[0]]
        if [n.op_type for n in after] == ["Relu"]:
            after = readers[after[0].output[0]]
        assert {n.op_type for n in after} == {"QuantizeLinear"}


def test_fine_tuning_wins_back_what_int8_lost(digits, monkeypatch):
    """With five levels for a weight calibration loses many points; the fine-tuned model takes its place."""
    from orchestrator import int8_static

    folder, _ = digits
    monkeypatch.setattr(int8_static, "WEIGHT_RANGE", 2)
    out, record = exported(folder, "static", "--calibration-samples", "64", "--fine-tune-steps", "40")
    before, after = (row(record, kind, "onnxruntime")["points_lost"] for kind in ("int8", "int8 fine-tuned"))
    assert before > 10
    assert after < before / 2
    assert_convolutions_are_int8(out / "model.onnx", 7)
    assert row(record, "int8 fine-tuned", "onnxruntime")["size_ratio"] < 0.3
    labels, images = heldout()
    accuracy = (logits(out, {"images": images}).argmax(1) == labels).mean()
    assert accuracy == pytest.approx(row(record, "int8 fine-tuned", "onnxruntime")["metrics"]["accuracy"])


@pytest.mark.parametrize(("lr", "steps", "kept"), [(1e-9, 3, True), (1e38, 3, False), (3e38, 1, False)])
def test_fine_tuning_that_diverges_is_given_up(lr, steps, kept, monkeypatch):
    """Where torchao meets what a step has left, and where the step itself leaves what is not finite."""
    from torchao.quantization.pt2e.fake_quantize import FusedMovingAvgObsFakeQuantize

    from orchestrator import int8_static

    torch.manual_seed(0)
    graph = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), FusedMovingAvgObsFakeQuantize())
    torch.nn.init.ones_(graph[0].weight)
    monkeypatch.setattr(int8_static, "_prepared", lambda *given, **more: graph)
    monkeypatch.setattr(int8_static, "_converted", lambda *given: "int8")
    batches = [torch.full((2, 1), 4.0)] * steps
    found = int8_static.fine_tune(graph, (batches[0],), ({},), iter(batches), steps, lambda s, b: s(b).mean() / 2, lr)
    assert found == ("int8" if kept else None)


def heldout() -> tuple[np.ndarray, torch.Tensor]:
    samples = WORKLOADS["resnet"].build(ResnetConfig()).samples("heldout")
    batch = samples.microbatch(np.arange(len(samples)), 0)
    return batch["labels"].numpy(), batch["images"]


@pytest.mark.long
def test_weights_beside_the_model(digits, monkeypatch, tmp_path):
    """As for models that one file cannot hold."""
    monkeypatch.setattr("orchestrator.programs.ONNX_LIMIT_BYTES", 0)
    folder, model = digits
    out = tmp_path / "out"
    assert main([str(folder), "--out", str(out), *QUICK]) == 0
    record = json.loads((out / "export.json").read_text())
    assert record["external_data"] is True
    assert (out / "model.onnx.data").stat().st_size > (out / "model.onnx").stat().st_size
    _, images = heldout()
    assert np.allclose(logits(out, {"images": images}), model(images).detach(), atol=1e-4)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("model", "size", "convolutions"), [("resnet18", 32, 20), ("resnet50", 64, 53)])
def test_larger_networks_and_both_stems(tmp_path, model, size, convolutions):
    """resnet18 with the 3x3 stem, resnet50 with the 7x7 one; weights as they were drawn."""
    network = finish(tmp_path, "resnet", ResnetConfig(model=model, image_size=size), steps=1, lr=1e-5)
    out, record = exported(tmp_path, "static", "--calibration-samples", "64", "--fine-tune-steps", "0")
    assert_convolutions_are_int8(out / "model.onnx", convolutions)
    assert row(record, "int8", "onnxruntime")["size_ratio"] < 0.3
    images = torch.randn(3, 1, size, size)
    expected = network(images).detach().numpy()
    assert np.abs(logits(out, {"images": images}) - expected).max() < 0.5 * np.abs(expected).max()


def test_the_differences_that_stop_an_export(digits, monkeypatch, capsys, tmp_path):
    folder, _ = digits
    out = tmp_path / "out"
    monkeypatch.setattr(exporter, "TOLERANCE", -1.0)
    assert main([str(folder), "--out", str(out), *QUICK]) == 1
    assert "nothing is exported" in capsys.readouterr().err
    assert not list(out.iterdir())
