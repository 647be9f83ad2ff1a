"""TPU slices as Ray knows them: what one is, which a cluster has, how many a run takes, who sits on them."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ray._private.accelerators import tpu as ray_tpu
from ray.util.tpu import get_tpu_worker_resources
from tpu_nodes import hosts_of

from orchestrator.assembly import build
from orchestrator.cluster_fit import Node
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.recovery import START_GRACE_S, Member
from orchestrator.resume import choose, settle_accelerator
from orchestrator.sliced import SliceRoster
from orchestrator.slices import CORES, chip_environment, find_shape, shape_of, topologies, whole_range, whole_slices
from orchestrator.values import WorkerRange

CPUS = Node({"CPU": 4.0}, {})
TPUS = hosts_of(shape_of("TPU-V4", "2x2x2"))
SHAPES = [shape_of(f"TPU-{kind.upper()}", size) for kind in CORES for size in sorted(topologies(kind))]


def config(**given: object) -> RunConfig:
    return build(RunConfig, {"steps": 9, **given})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slices_are_what_ray_says_they_are(shape):
    kind, size = shape.accelerator_type, shape.topology
    assert ray_tpu.TPUAcceleratorManager.is_valid_tpu_accelerator_topology(shape.version, size)
    assert shape.pod_type == ray_tpu.infer_tpu_pod_type_from_topology(size, kind)
    assert shape.chips_per_host == ray_tpu.get_chips_per_host(size, shape.version)
    workers, each = get_tpu_worker_resources(size, kind)
    assert (workers, each["TPU"]) == (shape.hosts, shape.chips_per_host)
    workers, _ = get_tpu_worker_resources(size, kind, resources_per_worker={"TPU": 1})
    assert workers == shape.chips == shape.hosts * shape.chips_per_host


def test_no_slice_that_ray_knows_is_left_out():
    for kind in CORES:
        assert topologies(kind) == ray_tpu.VALID_TPU_TOPOLOGY[kind]


@pytest.mark.parametrize(
    ("kind", "size", "words"),
    [
        ("TPU-V3", "4x4", "two devices each"),
        ("A100", "4x4", "not known; use one of TPU-V4"),
        ("TPU-V6E", "3x3", "there are 1x1, 2x2, 2x4"),
        ("TPU-V4", "4x4", "no slice of TPU-V4"),
    ],
)
def test_slices_that_there_are_not(kind, size, words):
    with pytest.raises(UserError, match=words):
        shape_of(kind, size)


@given(st.sampled_from([shape for shape in SHAPES if shape.chips <= 64]), st.integers(1, 300), st.integers(0, 300))
def test_workers_come_in_whole_slices(shape, low, more):
    settled = config(workers=f"{low}:{low + more}", shards=1024, batch_size=1024)
    try:
        whole = whole_range(settled, shape)
    except UserError as refusal:
        advice = str(refusal).split("use --workers ")[-1].split("use ")[-1]
        fits = int(advice.split()[0].rstrip(","))
        assert whole_range(config(workers=str(fits), shards=1024, batch_size=1024), shape) == WorkerRange(fits, fits)
        return
    assert low <= whole.minimum <= whole.maximum <= low + more
    assert whole.minimum % shape.chips == whole.maximum % shape.chips == 0
    assert low + more - whole.maximum < shape.chips > whole.minimum - low, "no slice is given away"


@given(st.data(), st.sampled_from([shape for shape in SHAPES if shape.hosts <= 4]), st.integers(1, 4))
def test_whole_slices_are_found_and_chosen(data, shape, count):
    """Slices with a host that is missing, or that others use, beside whole ones."""
    states = data.draw(st.lists(st.sampled_from(["whole", "used", "short"]), min_size=count, max_size=count))
    nodes = [CPUS]
    for number, state in enumerate(states):
        hosts = hosts_of(shape, f"s{number}", 0.0 if state == "used" else None)
        nodes += hosts[:-1] if state == "short" else hosts
    nodes = data.draw(st.permutations(nodes))
    found = whole_slices(nodes, shape)
    assert len(found) == sum(state != "short" for state in states)
    for hosts in found:
        assert [host.labels["ray.io/tpu-worker-id"] for host in hosts] == [str(n) for n in range(shape.hosts)]
        assert len({host.labels["ray.io/tpu-slice-name"] for host in hosts}) == 1
    settled = config(workers=f"1:{4 * shape.chips}", shards=256, batch_size=256, accelerator="tpu")
    kind, size = shape.accelerator_type, shape.topology
    settled = dataclasses.replace(settled, accelerator_type=kind, topology=size)
    if not found:
        with pytest.raises(UserError, match="no worker fits" if nodes != [CPUS] else "has a TPU"):
            choose(*settle_accelerator(settled, nodes, None), nodes, None)
        return
    workers = choose(*settle_accelerator(settled, nodes, None), nodes, None)
    assert workers == max(1, states.count("whole")) * shape.chips, "what others use is waited for up to the minimum"


def test_topology_and_type_are_read_from_the_nodes():
    assert str(find_shape(config(), TPUS)) == "TPU-V4 2x2x2 (2 host(s), 8 workers)"
    both = [*TPUS, *hosts_of(shape_of("TPU-V4", "2x2x4"), "t")]
    assert find_shape(config(topology="2x2x4"), both).hosts == 4


@given(st.sampled_from([shape for shape in SHAPES if shape.hosts <= 8]))
def test_the_processes_of_a_slice_agree_on_it(shape):
    addresses = [f"10.0.0.{n}" for n in range(shape.hosts)]
    told = [
        chip_environment(shape, host, chip, addresses)
        for host in range(shape.hosts)
        for chip in range(shape.chips_per_host)
    ]
    assert [int(one["CLOUD_TPU_TASK_ID"]) for one in told] == list(range(shape.chips))
    assert len({one["TPU_PROCESS_ADDRESSES"] for one in told}) == len({one["TPU_PROCESS_BOUNDS"] for one in told}) == 1
    assert math.prod(map(int, told[0]["TPU_PROCESS_BOUNDS"].split(","))) == shape.chips
    for number, one in enumerate(told):
        mine = f"{addresses[number // shape.chips_per_host]}:{one['TPU_PROCESS_PORT']}"
        assert one["TPU_PROCESS_ADDRESSES"].split(",")[number] == mine


class SliceHistories(RuleBasedStateMachine):
    """Slices of two that come, come in halves, and lose members, in any order."""

    @initialize(low=st.integers(1, 2), more=st.integers(0, 2))
    def start(self, low, more):
        self.roster = SliceRoster(2 * low, 2 * (low + more), 2 * low, chips=2)
        self.now, self.names = 0.0, 0

    @rule(places=st.sampled_from([(0,), (1,), (0, 1), (1, 0)]), slice_=st.sampled_from(["a", "b", "c"]))
    def join(self, places, slice_):
        there = {(m.slice, m.place) for m in (*self.roster.ready.values(), *self.roster.seated.values())}
        for place in places:
            if (slice_, place) not in there:
                self.names += 1
                new = Member(
                    f"m{self.names}", f"n-{slice_}{place}", 1, "tpu", -1, -1, ("", 1), slice=slice_, place=place
                )
                self.roster.join(new, self.now)

    @precondition(lambda self: self.roster.seated)
    @rule(data=st.data())
    def lose(self, data):
        lost = self.roster.seated[data.draw(st.sampled_from(sorted(self.roster.seated)))]
        mates = {m.id for m in self.roster.seated.values() if m.slice == lost.slice}
        self.roster.lose(lost.id)
        assert not mates & set(self.roster.seated), "a lost host takes its slice"

    @precondition(lambda self: self.roster.seated)
    @rule()
    def all_come_back(self):
        for rank, m in enumerate(self.roster.by_rank):
            self.roster.join(dataclasses.replace(m, step=max(0, m.step) + 1, rank=rank), self.now)

    @rule(seconds=st.sampled_from([1.0, START_GRACE_S + 1]))
    def form(self, seconds):
        self.now += seconds
        order = self.roster.form(self.now)
        if order is None:
            return
        assert [m.place for m in order] == [0, 1] * (len(order) // 2), "in the order of the slice's chips"
        assert all(a.slice == b.slice for a, b in zip(order[::2], order[1::2], strict=True))
        assert order[0].step == max(m.step for m in order), "who hands the state over has it"
        assert self.roster.minimum <= len(order) <= self.roster.maximum

    @rule(nodes=st.sets(st.sampled_from(["n-a0", "n-b1", "n-c0"])))
    def drain(self, nodes):
        self.roster.draining = frozenset(nodes)
        there = (*self.roster.ready.values(), *self.roster.seated.values())
        gone = {m.slice for m in there if m.node in nodes}
        for m in there:
            assert self.roster._going(m) == (m.slice in gone), "a host that will go takes its slice"

    @invariant()
    def whole(self):
        if hasattr(self, "roster") and self.roster.training:
            by_slice = [m.slice for m in self.roster.seated.values()]
            assert all(by_slice.count(name) == 2 for name in by_slice)


TestSliceHistories = SliceHistories.TestCase
