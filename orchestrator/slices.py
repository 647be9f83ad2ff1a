"""TPU slices, the unit that comes and goes: what one is made of, which a cluster has whole, how many a run takes.

A slice is so many hosts, wired to each other; without one of them the others are of no use. A worker drives one chip.
What Ray 2.60 knows of them is in ray/_private/accelerators/tpu.py, whose rules these are (a test compares).
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.cluster_fit import Node, Offer
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.values import WorkerRange

# Labels that Ray gives to TPU nodes.
SLICE_NAME, HOST_NUMBER = "ray.io/tpu-slice-name", "ray.io/tpu-worker-id"
TOPOLOGY, POD_TYPE = "ray.io/tpu-topology", "ray.io/tpu-pod-type"
CHIPS_OF_A_HOST = 4  # but small slices of the flat versions, which are one host of up to 8 (TPU_SINGLE_HOST_TOPOLOGIES)
SMALL = ("1x1", "2x2", "2x4")
FLAT = {"1x1", "2x2", "2x4", "2x8", "4x4", "4x8", "8x8", "8x16", "16x16"}
DEEP = {"2x2x1", "2x2x2", "2x2x4", "2x4x4"}
TORUS = {"v4": (12, 12, 16), "v5p": (16, 16, 24)}  # larger ones: multiples of 4 up to these
CORES = {"v4": 2, "v5p": 2, "v5litepod": 1, "v6e": 1}  # of a chip, by which pod types count
TWO_DEVICES = ("v2", "v3", "v7x")  # a chip of these is two devices, and a worker drives one
BASE_PORT = 8476  # libtpu's, as torch_xla's configure_topology gives them out


def topologies(version: str) -> set[str]:
    """What slices of a version there are."""
    if version not in TORUS:
        return FLAT
    x, y, z = (range(4, most + 1, 4) for most in TORUS[version])
    return DEEP | {f"{i}x{j}x{k}" for i in x for j in y for k in z}


@dataclass(frozen=True)
class SliceShape:
    """What every slice of a run is.

    Attributes:
        version: v4, v5p, v5litepod or v6e.
        topology: chips in each direction.
    """

    version: str
    topology: str

    @property
    def bounds(self) -> tuple[int, ...]:
        return tuple(int(side) for side in self.topology.split("x"))

    @property
    def chips(self) -> int:
        """Chips, and so workers."""
        return math.prod(self.bounds)

    @property
    def chips_per_host(self) -> int:
        return self.chips if self.version not in TORUS and self.topology in SMALL else CHIPS_OF_A_HOST

    @property
    def hosts(self) -> int:
        return max(1, self.chips // self.chips_per_host)

    @property
    def pod_type(self) -> str:
        """As nodes are labelled: v4-16."""
        return f"{self.version}-{self.chips * CORES[self.version]}"

    @property
    def accelerator_type(self) -> str:
        """As Ray names the version: TPU-V4."""
        return f"TPU-{self.version.upper()}"

    def __str__(self) -> str:
        return f"{self.accelerator_type} {self.topology} ({self.hosts} host(s), {self.chips} workers)"


def shape_of(accelerator_type: str, topology: str) -> SliceShape:
    """The slices that were asked for; raises UserError."""
    version, topology = accelerator_type.lower().removeprefix("tpu-"), topology.lower()
    if version in TWO_DEVICES:
        raise UserError(
            f"--accelerator-type {accelerator_type}: its chips are two devices each, and a worker drives one; use one "
            f"of {_known()}"
        )
    if version not in CORES:
        raise UserError(f"--accelerator-type {accelerator_type}: not known; use one of {_known()}")
    if topology not in (sizes := topologies(version)):
        shown = ", ".join(sorted(sizes, key=lambda t: (math.prod(map(int, t.split("x"))), t))[:8])
        raise UserError(f"--topology {topology}: no slice of {accelerator_type}; there are {shown} and so on")
    return SliceShape(version, topology)


def _known() -> str:
    return ", ".join(f"TPU-{version.upper()}" for version in CORES)


def find_shape(config: RunConfig, nodes: Sequence[Node]) -> SliceShape:
    """The run's slices: as given, and what was left out as all TPU nodes are labelled; raises UserError."""
    chips = [node for node in nodes if node.resources.get("TPU")]
    types = {node.labels.get(POD_TYPE, "").rpartition("-")[0] for node in chips} - {""}
    sizes = {node.labels.get(TOPOLOGY, "") for node in chips} - {""}
    kind = config.accelerator_type or (f"TPU-{types.pop().upper()}" if len(types) == 1 else "")
    size = config.topology or (sizes.pop() if len(sizes) == 1 else "")
    for name, value, found in (("accelerator-type", kind, types), ("topology", size, sizes)):
        if not value:
            there = f"the nodes have {', '.join(sorted(found))}" if found else "no TPU node is labelled with one"
            example = "TPU-V6E" if name == "accelerator-type" else "4x4"
            raise UserError(f"--accelerator tpu: {there}; say which with --{name}, such as {example}")
    return shape_of(kind, size)


def whole_slices(nodes: Sequence[Node], shape: SliceShape) -> list[list[Node]]:
    """The slices of this shape that have all their chips, each with its nodes by host number."""
    found: dict[str, list[Node]] = defaultdict(list)
    for number, node in enumerate(nodes):
        if node.labels.get(POD_TYPE) == shape.pod_type and node.resources.get("TPU"):
            name = f"{number}" if shape.hosts == 1 else node.labels.get(SLICE_NAME, "")
            found[name].append(node)
    found.pop("", None)
    slices = [sorted(hosts, key=host_number) for hosts in found.values()]
    whole = [hosts for hosts in slices if sum(node.resources["TPU"] for node in hosts) == shape.chips]
    return [hosts for hosts in whole if shape.hosts == 1 or host_number(hosts[0]) == 0]


def host_number(node: Node) -> int:
    """Its place in its slice; -1: it has none."""
    number = node.labels.get(HOST_NUMBER, "")
    return int(number) if number.isdigit() else -1


def idle(hosts: Sequence[Node]) -> bool:
    """Whether nobody uses a chip of a slice."""
    return all(node.now().resources.get("TPU", 0.0) >= node.resources["TPU"] for node in hosts)


def whole_range(config: RunConfig, shape: SliceShape) -> WorkerRange:
    """--workers in whole slices: of MIN:MAX the minimum is rounded up, the maximum down; raises UserError."""
    wanted, size = config.workers, shape.chips
    low, high = -(-wanted.minimum // size) * size, wanted.maximum // size * size
    if wanted.minimum == wanted.maximum and wanted.minimum % size:
        advice = f"{high} or {low}" if high else str(low)
        raise UserError(f"--workers {wanted}: slices of {shape} come as a whole; use {advice}")
    if low > high:
        more = 1 << (low - 1).bit_length()
        enough = f"--workers {low}" + (f" --shards {more}" if low > config.shards else "")
        raise UserError(f"--workers {wanted}: a slice of {shape} is more; use {enough}, or a smaller --topology")
    return WorkerRange(low, high)


def choose_slices(config: RunConfig, shape: SliceShape, nodes: Sequence[Node], offer: Offer | None = None) -> int:
    """The number of workers to start, in whole slices: idle ones, at least the minimum, which may have to wait.

    Args:
        config: its workers are `whole_range`'s.
        offer: of the cluster's autoscaler; None: there is none.

    Raises:
        UserError: the minimum can never fit; says what would.
    """
    wanted, size = config.workers, shape.chips
    whole = whole_slices(nodes, shape)
    if len(whole) * size >= wanted.minimum:
        return max(wanted.minimum, min(wanted.maximum, sum(map(idle, whole)) * size))
    chips = sum(node.resources.get("TPU", 0.0) for node in offer.nodes) if offer else 0.0
    could = len(whole) + int(chips // size)
    if offer and (could * size >= wanted.minimum or not offer.known):
        return wanted.minimum
    more = f"; the autoscaler could add {chips:g} TPU chips" if offer else ""
    hint = f"--workers {could * size} would fit" if could else "no worker fits"
    there = sum(bool(node.resources.get("TPU")) for node in nodes)
    raise UserError(
        f"--workers {wanted}: {wanted.minimum // size} slice(s) of {shape} do not fit on {len(nodes)} node(s), {there} "
        f"with TPUs, {len(whole)} whole slice(s) of that kind{more}; {hint}"
    )


def chip_environment(shape: SliceShape, host: int, chip: int, addresses: Sequence[str]) -> dict[str, str]:
    """What libtpu is told in the process that drives one chip of a slice.

    The variables are those of torch_xla 2.9's tpu.configure_topology, which asks a Google metadata server for the rest.

    Args:
        host, chip: its host's number in the slice, and the chip's there.
        addresses: of the slice's hosts, by number.
    """
    ports = range(BASE_PORT, BASE_PORT + shape.chips_per_host)
    x, y, z = (*shape.bounds, 1)[:3]
    return {
        "PJRT_DEVICE": "TPU",
        "PJRT_LOCAL_PROCESS_RANK": str(chip),
        "PJRT_LOCAL_PROCESS_COUNT": str(shape.chips_per_host),
        "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
        "TPU_PROCESS_BOUNDS": f"{x},{y},{z}",
        "CLOUD_TPU_TASK_ID": str(host * shape.chips_per_host + chip),
        "TPU_PROCESS_ADDRESSES": ",".join(f"{address}:{port}" for address in addresses for port in ports),
        "TPU_PROCESS_PORT": str(ports[chip]),
        "TPU_VISIBLE_CHIPS": str(chip),
    }
