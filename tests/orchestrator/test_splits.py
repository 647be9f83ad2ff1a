"""Models in parts, on spawned processes: the losses and weights of one worker, and checkpoints that any split reads."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from distributed import give_other_ranks, run_distributed
from real import real_plan
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata
from toys import Recorder

from orchestrator import partfiles
from orchestrator.build import build_state, prepare_torch
from orchestrator.checkpoint import MANIFEST, PARTS, CheckpointStore, Entries
from orchestrator.evaluate import evaluate
from orchestrator.group import Group
from orchestrator.layout import layout_of, units_of
from orchestrator.loop import train
from orchestrator.plan import Plan
from orchestrator.shards import even_placement
from orchestrator.split_build import build_part
from orchestrator.splits import SplitState
from orchestrator.state import TrainingState, memory_bytes, sha256_of
from orchestrator.storage import Folder
from workloads.registry import WORKLOADS

SMALL = {
    "bert": {"batch_size": 16, "shards": 4, "vocab_size": 512, "optimizer": "adamw", "hidden_size": 64},
    "resnet": {"batch_size": 32, "shards": 4},
}


def build(group: Group, plan: Plan) -> tuple[Any, TrainingState]:
    prepare_torch(1, same_bits=True)
    # Memory as it lies is NaN: what comes from it shows.
    torch.utils.deterministic.fill_uninitialized_memory = True
    workload = WORKLOADS[plan.workload].build(plan.config)
    whole = group.world == 1
    return workload, build_state(plan, workload, group.device) if whole else build_part(plan, workload, group)


def trained(group: Group, plan: Plan, recorder: Recorder) -> tuple[Any, TrainingState]:
    workload, state = build(group, plan)
    layout = layout_of(plan.config.parallel, group.world if state.split else 1)
    placement = even_placement(units_of(plan.config.parallel, layout, plan.config.shards)[0], layout.groups)
    train(plan, workload, state, group, placement, recorder)
    return workload, state


def run_part(group: Group, plan: Plan) -> dict[str, Any]:
    recorder = Recorder()
    workload, state = trained(group, plan, recorder)
    using, among, in_step = state.evaluation(workload, group)
    metrics = evaluate(using, state.model, state.precision, among, 0, in_step)
    whole = dict(state.whole_weights() if isinstance(state, SplitState) else state.model.state_dict())
    return {
        "losses": recorder.losses,
        "metrics": metrics,
        "sha256": sha256_of(whole.items()),
        "snapshot": {name: t.detach().clone() for name, t in state.tensors().items()},
        "bytes": memory_bytes(state)["state"],
    }


ONE: dict[str, dict[str, Any]] = {}


def alone(name: str, given: dict[str, object]) -> dict[str, Any]:
    key = f"{name}{sorted(given.items())}"
    if key not in ONE:
        (ONE[key],) = run_distributed(run_part, 1, real_plan(name, **given))
    return ONE[key]


def distance(snapshot: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference; NaN if there is one."""
    assert snapshot.keys() == other.keys()
    apart = [(snapshot[name].double() - other[name].double()).abs().max() for name in other]
    return float(torch.stack(apart).max())


# The largest difference of any number of the state after a few steps; where a ReLU flips for a last bit, a gradient
# moves by much more than that; and with bf16.
EXACT, NEAR, FLIPS, ROUGH = 0.0, 1e-5, 1e-2, 2e-2
OF_LOSS = {EXACT: 0.0, NEAR: 1e-5, FLIPS: 2e-4, ROUGH: 2e-2}  # of each step, as a share
EPOCHS = {"batch_size": 256, "shards": 8, "steps": 8}  # of 1,437 images: the sixth has 157, for five shards
GPIPE = {"pipeline_schedule": "gpipe"}
MORE = [
    ("bert", "tensor=2", 4, NEAR, {}),
    ("bert", "tensor=2", 2, ROUGH, {"attention": "document", "precision": "bf16"}),
    ("bert", "fsdp", 2, EXACT, {"attention": "document"}),
    ("bert", "fsdp", 4, EXACT, {"optimizer": "sgd", "clip_norm": 0.1, "precision": "bf16"}),
    ("bert", "pipeline=2", 4, EXACT, {}),
    ("bert", "pipeline=4", 4, EXACT, {"precision": "bf16", "attention": "document", **GPIPE}),
    ("resnet", "pipeline=2", 2, EXACT, {**EPOCHS, **GPIPE}),
    ("resnet", "pipeline=3", 3, EXACT, {"model": "resnet20", "precision": "bf16", "optimizer": "adam", "lr": 0.001}),
    ("resnet", "pipeline=2", 4, EXACT, EPOCHS),
    ("resnet", "pipeline=2", 2, EXACT, {"clip_norm": 0.5}),
    ("resnet", "fsdp", 3, FLIPS, EPOCHS),
    ("resnet", "fsdp", 4, EXACT, EPOCHS),
    ("resnet", "hsdp=2", 4, EXACT, {"clip_norm": 0.5}),
    ("resnet", "hsdp=2", 4, EXACT, EPOCHS),
]


@pytest.mark.parametrize(
    ("name", "parallel", "world", "apart", "given"),
    [
        ("bert", "tensor=2", 2, NEAR, {}),
        ("bert", "fsdp", 3, NEAR, {}),
        ("bert", "hsdp=2", 4, EXACT, {}),
        ("resnet", "fsdp", 2, EXACT, {"clip_norm": 0.1}),
        ("resnet", "pipeline=4", 4, EXACT, {"clip_norm": 0.1}),
        ("bert", "pipeline=2", 2, EXACT, {}),
        *(pytest.param(*case, marks=pytest.mark.long) for case in MORE),
    ],
)
def test_parts_train_as_one_worker_does(name, parallel, world, apart, given):
    given = {**SMALL[name], "steps": 5, **given}
    one = alone(name, {key: value for key, value in given.items() if key != "pipeline_schedule"})
    workers = run_distributed(run_part, world, real_plan(name, **given, parallel=parallel, workers=world))
    first = workers[0]
    assert len({worker["sha256"] for worker in workers}) == 1
    assert len({str(worker["metrics"]) for worker in workers}) == 1
    assert distance(first["snapshot"], one["snapshot"]) <= apart
    if apart == EXACT:
        assert (first["sha256"], first["losses"]) == (one["sha256"], one["losses"])
        assert first["metrics"] == one["metrics"]
    assert first["losses"] == pytest.approx(one["losses"], rel=OF_LOSS[apart])
    assert first["metrics"] == pytest.approx(one["metrics"], rel=10 * OF_LOSS[apart])
    assert max(worker["bytes"] for worker in workers) < 0.75 * one["bytes"]


def write(group: Group, plan: Plan, folder: Path, read: bool) -> dict[str, torch.Tensor]:
    """Write checkpoint 5 of what was trained, or of what checkpoint 5 in `folder` has; returns the whole state."""
    store = CheckpointStore(Folder(str(folder)), "me", 3)
    _, state = build(group, plan) if read else trained(group, plan, Recorder())
    if read:
        state.take_checkpoint(store.load(5, state.room))
        assert state.step == 5
    group.gather_objects(None)  # all have read
    if not state.split:
        store.save(5, state.snapshot())
        return state.snapshot()
    assert isinstance(state, SplitState)
    entries: Entries = {}
    if group.rank < state.seating.layout.size:
        files = partfiles.stage(state.parts(), state.seating.inside)
        entries = store.write(5, {f"{PARTS}{plan.config.parallel}/{name}": content for name, content in files.items()})
    everyone = [found.items() for found in group.gather_objects(entries)]
    if group.rank == 0:
        store.finish(5, {name: entry for items in everyone for name, entry in items})
    return {name: t.clone() for name, t in state.tensors().items()}


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("bert", [("ddp", 1), ("tensor=2", 2), ("pipeline=3", 3), ("hsdp=2", 4), ("fsdp", 3), ("ddp", 1)]),
        ("resnet", [("pipeline=2", 2), ("fsdp", 3), ("fsdp", 4), ("ddp", 1), ("pipeline=4", 4), ("ddp", 1)]),
    ],
)
def test_a_checkpoint_is_read_under_any_other_split(tmp_path, name, ways):
    """From hand to hand: each reads what the one before wrote, and writes it in its own parts."""
    first: dict[str, torch.Tensor] = {}
    for parallel, world in ways:
        plan = real_plan(name, **SMALL[name], steps=5, parallel=parallel, workers=world)
        found, *_ = run_distributed(write, world, plan, tmp_path, bool(first))
        first = first or found
        assert distance(found, first) == 0.0, f"--parallel {parallel}"
        left = sorted(p.name for p in (tmp_path / "step-5").iterdir() if p.name.startswith(PARTS))
        assert left == ([f"{PARTS}{parallel}"] if parallel != "ddp" else left)
    assert store(tmp_path).load(5).tensors.keys() == first.keys()


@pytest.mark.parametrize("parallel", ["fsdp", "tensor=2"])
def test_a_worker_may_have_another_rank_in_the_next_generation(tmp_path, parallel):
    """Torch remembers much from one process group to the next, such as which piece is whose."""
    plan = real_plan("bert", **SMALL["bert"], steps=5, parallel=parallel, workers=2)
    first, _ = run_distributed(write, 2, plan, tmp_path, False)
    give_other_ranks()
    second, _ = run_distributed(write, 2, plan, tmp_path, True)
    assert distance(second, first) == distance(store(tmp_path).load(5).tensors, first) == 0.0


def store(folder: Path) -> CheckpointStore:
    return CheckpointStore(Folder(str(folder)), "me", 3)


def test_torch_reads_a_checkpoint_in_parts_and_no_damage_goes_unnoticed(tmp_path):
    """Its own reader; ours refuses whatever is not as it was written."""
    plan = real_plan("bert", **SMALL["bert"], steps=1, parallel="fsdp", workers=2)
    kept, _ = run_distributed(write, 2, plan, tmp_path, False)
    (folder,) = (tmp_path / "step-5").glob(f"{PARTS}*")
    theirs = {name: torch.zeros_like(tensor) for name, tensor in kept.items()}
    torch.distributed.checkpoint.load(theirs, checkpoint_id=str(folder), no_dist=True)
    assert distance(theirs, kept) == 0.0
    assert distance(store(tmp_path).load(5).tensors, kept) == 0.0
    files = [file for file in (tmp_path / "step-5").rglob("*") if file.is_file()]
    assert len(files) == 4
    for file in files:
        raw = file.read_bytes()
        places = range(0, len(raw), 1 if file.name == MANIFEST else len(raw) // 40)
        for harmed in [raw[:-1], b"", *(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :] for at in places)]:
            file.write_bytes(harmed)
            found = store(tmp_path).load_newest(lambda reason: None)
            assert found is None or (file.name == MANIFEST and distance(found.tensors, kept) == 0.0)
        file.unlink()
        reasons: list[str] = []
        assert store(tmp_path).load_newest(reasons.append) is None
        assert "step-5: " in reasons[0]
        assert len(reasons[0].splitlines()) == 1
        file.write_bytes(raw)
    assert distance(store(tmp_path).load(5).tensors, kept) == 0.0


class Asked:
    """Pickled as getattr(kind, name), as CPython 3.11.0 to 3.11.3 do members of enumerations."""

    def __init__(self, kind: object, name: str) -> None:
        self.asked = kind, name

    def __reduce__(self) -> Any:
        return getattr, self.asked


def test_metadata_calls_nothing_but_torch():
    assert partfiles.parse(pickle.dumps(Asked(_MEM_FORMAT_ENCODING, "TORCH_CHANNELS_LAST"))).value == 1
    for kind, name in ((_MEM_FORMAT_ENCODING, "mro"), (Metadata, "__init__"), (torch.Size, "numel")):
        with pytest.raises(pickle.UnpicklingError, match="does not belong there"):
            partfiles.parse(pickle.dumps(Asked(kind, name)))
    for harmful in (os.system, torch.load):
        with pytest.raises(pickle.UnpicklingError, match="does not belong there"):
            partfiles.parse(pickle.dumps(harmful))
