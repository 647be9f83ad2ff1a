"""The workload as the loop uses it, and the recipes beside it."""

import copy
import json
import pickle
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import workloads.resnet
from orchestrator.assembly import build as build_config
from orchestrator.settings import help_texts, settings
from workloads.resnet import data
from workloads.resnet.config import ResnetConfig
from workloads.resnet.workload import ResnetWorkload, load
from workloads.workload import Samples, Workload

RECIPES = sorted(Path(workloads.resnet.__file__).parent.glob("*.toml"))


class Constant(torch.nn.Module):
    """A model with chosen logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, images):
        return self.logits


def batch_of(labels):
    return {"images": torch.zeros(len(labels), 1, 8, 8), "labels": torch.tensor(labels)}


def test_it_is_a_workload():
    workload: Workload = ResnetWorkload(ResnetConfig())
    samples: Samples = workload.samples("train")
    assert len(samples) == 1437
    assert len(workload.samples("heldout")) == 360
    assert workload.nominal_count(32) == 32
    assert not workload.decodes
    assert ResnetWorkload(ResnetConfig(data="imagefolder:x")).decodes


def test_sums_and_metrics_of_ten_classes():
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    logits[0, 3] = logits[2, 1] = 9.0
    workload = ResnetWorkload(ResnetConfig(label_smoothing=0.3))
    model = Constant(logits)
    labels = [3, int(logits[1].argmin()), 1, int(logits[3].argmin())]
    sums = workload.sums(model.eval(), batch_of(labels))
    expected = F.cross_entropy(logits, torch.tensor(labels), reduction="sum")
    assert torch.allclose(sums.loss, expected)
    assert sums.loss.requires_grad
    assert sums.count.item() == 4
    assert {name: value.item() for name, value in sums.others.items()} == {"correct": 2}
    totals = {"loss": sums.loss.item(), "count": 4.0, "correct": 2.0}
    assert workload.metrics(totals) == {"accuracy": 0.5, "cross_entropy": pytest.approx(expected.item() / 4)}
    smoothed = F.cross_entropy(logits, torch.tensor(labels), reduction="sum", label_smoothing=0.3)
    assert torch.allclose(workload.sums(model.train(), batch_of(labels)).loss, smoothed)


def test_top5_beyond_ten_classes():
    logits = torch.arange(22.0).flip(0).reshape(2, 11)  # class 0 first, then 1, ...
    workload = ResnetWorkload(ResnetConfig())
    sums = workload.sums(Constant(logits).eval(), batch_of([4, 5]))
    assert sums.others["correct"].item() == 0
    assert sums.others["correct_top5"].item() == 1
    totals = {"loss": 1.0, "count": 2.0, "correct": 0.0, "correct_top5": 1.0}
    assert workload.metrics(totals)["top5_accuracy"] == 0.5


def test_the_loss_is_float32_under_autocast():
    workload = ResnetWorkload(ResnetConfig())
    model = workload.build_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums = workload.sums(model, workload.samples("train").microbatch(np.arange(4), 0))
    assert sums.loss.dtype == torch.float32


def test_it_can_be_pickled_and_opens_the_data_late():
    workload = ResnetWorkload(ResnetConfig(data="cifar10:/not/there"))
    assert pickle.loads(pickle.dumps(workload)).config == workload.config


def test_it_learns_the_digits():
    torch.manual_seed(0)
    workload = ResnetWorkload(ResnetConfig())
    model, train = workload.build_model(), workload.samples("train")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(30):
        sums = workload.sums(model, train.microbatch(np.arange(64) + 64 * (step % 20), 0))
        optimizer.zero_grad()
        (sums.loss / sums.count).backward()
        optimizer.step()
    with torch.no_grad():
        sums = workload.sums(model.eval(), workload.samples("heldout").microbatch(np.arange(360), 0))
    totals = {"loss": sums.loss.item(), "count": 360.0, "correct": sums.others["correct"].item()}
    assert workload.metrics(totals)["accuracy"] > 0.8


@pytest.mark.parametrize(("model", "size"), [("resnet8", 8), ("resnet18", 8), ("airbench-small", 9)])
def test_save_and_load(tmp_path, model, size):
    workload = ResnetWorkload(ResnetConfig(model=model, image_size=size))
    trained = workload.build_model()
    trained(torch.randn(8, 1, 9, 9))  # moves the running statistics
    before = copy.deepcopy(trained.state_dict())
    workload.save(trained, tmp_path / "model")
    loaded, description = load(tmp_path / "model")
    after = loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not loaded.training
    assert description == json.loads((tmp_path / "model" / "config.json").read_text())
    kind = data.KINDS["digits"]
    assert description == {
        "model": model, "classes": 10, "class_names": list("0123456789"), "channels": 1, "image_size": size,
        "mean": list(kind.mean), "std": list(kind.std),
    }  # fmt: skip


def test_the_whitening_is_of_the_training_images_as_they_are():
    """Neither of augmented ones nor of the seed's order; what comes out of them is white."""
    sides = ({"augment": "none"}, {"augment": "shift", "seed": 1})
    workloads = [ResnetWorkload(ResnetConfig(model="airbench-small", image_size=9, **side)) for side in sides]
    one, other = (workload.build_model().whiten for workload in workloads)
    assert torch.equal(one.weight, other.weight)
    images = workloads[0].samples("train").microbatch(np.arange(1437), 0)["images"]
    white = one(images).detach().transpose(0, 1).flatten(1).double()[:4]
    assert torch.allclose(white @ white.T / white.shape[1], torch.eye(4).double(), atol=0.03)  # EPSILON


def test_every_setting_has_a_help_text_and_defaults_are_allowed():
    texts = help_texts(ResnetConfig)
    assert all(texts.get(name) for name in settings(ResnetConfig))
    assert build_config(ResnetConfig, {}) == ResnetConfig()


def test_there_are_five_recipes():
    fast = ["fast-airbench-cifar10.toml", "fast-airbench-fashion-mnist.toml"]
    names = ["digits.toml", *fast, "imagenet-resnet50.toml", "textbook-resnet18-cifar10.toml"]
    assert [path.name for path in RECIPES] == names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_hold_only_settings(path):
    recipe = tomllib.loads(path.read_text())
    assert recipe.pop("workload") == "resnet"
    config = build_config(ResnetConfig, recipe)
    assert data.split_spec(config.data)
    if path.stem == "digits":
        assert config == ResnetConfig()


def test_torchvision_imports_after_vision_ops():
    code = "import orchestrator.vision_ops, torch, torchvision; print(torch.ops.torchvision.nms)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "nms" in done.stdout
