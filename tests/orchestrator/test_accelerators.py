"""What a run computes on, which GPU is a worker's, and what is said of mixed devices."""

import dataclasses
import importlib.util
import json
import sys

import pytest
import torch
from toys import toy_plan
from tpu_nodes import hosts_of

from orchestrator import devices
from orchestrator.accelerators import SeenDevices, decide
from orchestrator.assembly import build
from orchestrator.cluster_fit import Node, Offer
from orchestrator.config import RunConfig
from orchestrator.devices import cuda_index
from orchestrator.errors import UserError
from orchestrator.events import GenerationStarted
from orchestrator.journal import Journal
from orchestrator.progress import Progress
from orchestrator.resume import settle_accelerator
from orchestrator.seats import Seat, Status
from orchestrator.shards import Placement
from orchestrator.slices import shape_of
from orchestrator.worker_device import Door, torch_xla_problem

CPUS, GPUS = Node({"CPU": 4.0}, {"zone": "a"}), Node({"CPU": 8.0, "GPU": 2.0}, {"zone": "b"})


def config(**given: object) -> RunConfig:
    return build(RunConfig, {"steps": 9, **given})


TPUS = hosts_of(shape_of("TPU-V4", "2x2x2"))


@pytest.mark.parametrize(
    ("given_settings", "nodes", "kind", "per_worker"),
    [
        ({}, [CPUS], "cpu", {"CPU": 1.0}),
        ({}, [CPUS, GPUS], "cuda", {"GPU": 1.0, "CPU": 1.0}),
        ({}, [CPUS, *TPUS], "tpu", {"TPU": 1.0, "CPU": 1.0}),
        ({}, [GPUS, *TPUS], "cuda", {"GPU": 1.0, "CPU": 1.0}),
        ({"node_labels": "zone=a"}, [CPUS, GPUS], "cpu", {"CPU": 1.0}),
        ({"resources_per_worker": "CPU=2"}, [GPUS], "cpu", {"CPU": 2.0}),
        ({"resources_per_worker": "GPU=1,CPU=4"}, [CPUS, GPUS], "cuda", {"GPU": 1.0, "CPU": 4.0}),
        ({"accelerator": "cpu"}, [GPUS], "cpu", {"CPU": 1.0}),
        ({"accelerator": "cuda"}, [GPUS], "cuda", {"GPU": 1.0, "CPU": 1.0}),
        ({"accelerator": "cuda", "resources_per_worker": "CPU=4"}, [GPUS], "cuda", {"GPU": 1.0, "CPU": 4.0}),
        ({"accelerator": "cpu", "resources_per_worker": "GPU=0,CPU=1"}, [GPUS], "cpu", {"GPU": 0.0, "CPU": 1.0}),
        ({"accelerator": "tpu", "resources_per_worker": "CPU=2"}, TPUS, "tpu", {"TPU": 1.0, "CPU": 2.0}),
    ],
)
def test_what_a_run_computes_on(given_settings, nodes, kind, per_worker):
    settled, found = settle_accelerator(config(**given_settings), nodes, None)
    assert (found.kind, dict(found.per_worker)) == (kind, per_worker)
    assert settled.accelerator == kind
    assert settle_accelerator(settled, nodes, None)[1].kind == kind, "what is settled stays"


@pytest.mark.parametrize(
    ("given_settings", "nodes", "offer", "words"),
    [
        ({"accelerator": "cuda"}, [CPUS], None, "none of the cluster's 1 node(s) has a GPU; use --accelerator cpu"),
        ({"accelerator": "cuda"}, [CPUS], Offer((CPUS, CPUS)), "the autoscaler could add 2 x CPU=4; use"),
        ({"accelerator": "cuda", "node_labels": "zone=a"}, [CPUS, GPUS], None, "with labels zone=a has a GPU"),
        ({"accelerator": "tpu"}, [CPUS, GPUS], None, "2 node(s) has a TPU"),
        ({"sync": "diloco"}, TPUS, None, "--sync diloco: is not there for TPUs; use --sync allreduce"),
        ({"accelerator": "tpu"}, [Node({"TPU": 4.0}, {})], None, "say which with --accelerator-type"),
        ({}, [*TPUS, *hosts_of(shape_of("TPU-V4", "2x2x4"), "t")], None, "the nodes have 2x2x2, 2x2x4; say which"),
        ({"accelerator": "tpu", "workers": "3"}, TPUS, None, "--workers 3: slices of TPU-V4 2x2x2"),
        ({"topology": "2x2x2"}, [GPUS], None, "--topology 2x2x2: goes with --accelerator tpu"),
    ],
)
def test_what_cannot_be_had_is_one_line(given_settings, nodes, offer, words):
    with pytest.raises(UserError) as refusal:
        settle_accelerator(config(**given_settings), nodes, offer)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_what_an_autoscaler_may_add_counts():
    assert decide(config(accelerator="cuda"), [CPUS], Offer((GPUS,))).kind == "cuda"
    assert decide(config(accelerator="cuda"), [CPUS], Offer(known=False)).kind == "cuda"
    assert "--accelerator cuda where" in str(decide(config(), [Node({"memory": 1e9}, {})], Offer(known=False)))
    assert str(decide(config(), [CPUS], Offer(known=False))) == "cpu (no node has a GPU or TPU)"
    assert decide(config(), [CPUS], Offer((GPUS,))).kind == "cuda"


def test_mixed_devices_are_told_once_for_each_new_kind():
    seen = SeenDevices()
    assert not seen.see(1, ["cuda, A100", "cuda, A100"])
    (told,) = seen.see(2, ["cuda, A100", "cuda, H100"])
    assert told.devices == ["cuda, A100", "cuda, H100"]
    assert told.kinds == ["cuda, A100", "cuda, H100"]
    assert "devices are mixed (cuda, A100; cuda, H100)" in seen.notice
    assert not seen.see(3, ["cuda, H100"]), "it has been said"
    resumed = SeenDevices()
    assert not resumed.see(0, ["cpu, AVX2"], earlier=True)
    assert resumed.see(1, ["cpu, AVX512"]), "a run that is resumed elsewhere"


@pytest.mark.parametrize(
    ("ids", "visible", "index"),
    [(["2"], "2", 0), (["2"], "0,1,2,3", 2), (["1", "3"], "1,3", 0), (["GPU-b"], "GPU-a,GPU-b", 1), (["3"], None, 3)],
)
def test_a_worker_takes_the_gpu_that_ray_gave_it(ids, visible, index):
    assert cuda_index(ids, visible) == index


@pytest.mark.parametrize(("ids", "visible"), [([], "0"), (["2"], "0,1"), (["0"], "")])
def test_a_gpu_that_is_not_there(ids, visible):
    with pytest.raises(RuntimeError, match=r"Ray gave"):
        cuda_index(ids, visible)


def journal_of(folder) -> Journal:
    return Journal(toy_plan(), str(folder), "token", "toy data", 0.0, False)


@pytest.mark.parametrize("name", devices.CHOSEN_BY)
def test_what_chooses_kernels_is_part_of_a_kind(monkeypatch, name):
    monkeypatch.delenv(name, raising=False)
    before = devices.kind_of(torch.device("cpu"))
    monkeypatch.setenv(name, "BF16")
    kind = devices.kind_of(torch.device("cpu"))
    assert f", {name}=BF16, torch " in kind
    assert SeenDevices().see(1, [before, kind]), "a node of its own has it"
    resumed = SeenDevices()
    resumed.see(0, [before], earlier=True)
    assert resumed.see(1, [kind])


def test_a_run_says_that_its_devices_are_mixed(tmp_path, capsys):
    """In events.jsonl and on the terminal; also when it is resumed on another kind than it was started on."""
    journal = journal_of(tmp_path)
    kinds = ["cpu, AVX2", "cpu, AVX512"]
    journal.generation_begins(GenerationStarted(1, 0, 1, [], [], [], kinds[0], kinds[:1]), 0.0, 0.0, [])
    assert not journal.devices.notice
    resumed = journal_of(tmp_path)
    resumed.generation_begins(GenerationStarted(1, 0, 1, [], [], [], kinds[1], kinds[1:]), 0.0, 0.0, [])
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (told,) = [event for event in events if event["event"] == "devices_mixed"]
    assert (told["devices"], told["kinds"]) == (kinds[1:], kinds)
    status = Status(1, 1, 0, 1, 0, 1.0, 0.0, 0.0, "training", "", "", 0, None, resumed.devices.notice)
    with Progress(10, lambda: 1) as progress:
        progress.show(status, False)
        progress.show(status, False)
    assert capsys.readouterr().err.count("note: devices are mixed (cpu, AVX2; cpu, AVX512)") == 1


def test_torch_xla_is_missed(tmp_path, monkeypatch):
    """Not installed, or built for another torch."""
    if importlib.util.find_spec("torch_xla") is None:
        assert torch_xla_problem() == "torch_xla is not installed there"
    (tmp_path / "torch_xla.py").write_text("raise ImportError('undefined symbol: _ZN5torch')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch_xla", raising=False)
    assert torch_xla_problem() == "torch_xla does not load there (undefined symbol: _ZN5torch)"


CPUINFO = "processor\t: {}\nvendor_id\t: V\nmodel\t\t: 7\nmodel name\t: V Seven\ncpu MHz\t\t: 2.{}\nflags\t\t: {}\n"


def test_cpus_that_kernels_tell_apart_are_two_kinds(tmp_path, monkeypatch):
    """Vector units count, however they are listed; clocks and what protects from spying do not."""
    monkeypatch.setattr(devices, "CPUINFO", tmp_path / "cpuinfo")
    told = {}
    for name, mhz, flags in (
        ("plain", 1, "fpu avx2 avx512f"),
        ("again", 2, "ibrs avx512f avx2 fpu"),
        ("amx", 1, "fpu avx2 avx512f amx_bf16"),
    ):
        blocks = [CPUINFO.format(number, mhz + number, flags) for number in range(2)]
        (tmp_path / "cpuinfo").write_text("\n".join(blocks))
        told[name] = devices.cpu.__wrapped__()
    assert told["plain"] == told["again"] != told["amx"]
    assert all(name.startswith("V Seven ") for name in told.values())
    (tmp_path / "cpuinfo").unlink()
    assert devices.cpu.__wrapped__() == ""


def test_the_others_meet_at_the_door_of_rank_0():
    door, other = Door("127.0.0.1"), Door("127.0.0.1")
    seat = Seat(1, 0, Placement((0, 4, 8)), door.serve().address, 0, False, 0)
    store = door.of(seat)
    other.of(dataclasses.replace(seat, rank=1)).set("key", "value")
    assert store.get("key") == b"value"
    assert store.port == seat.store[1]
    assert door.of(dataclasses.replace(seat, placement=Placement((0, 8)))) is None
    before = door.serve()
    assert door.serve() is before
    door.close()
    assert door.serve() is not before
