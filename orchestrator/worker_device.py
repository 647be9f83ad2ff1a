"""Which device Ray has given to a worker, and where in its TPU slice that is."""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.cluster_fit import Node
from orchestrator.config import RunConfig
from orchestrator.errors import UserError, one_line
from orchestrator.nodewatch import interface_of
from orchestrator.seats import Seat
from orchestrator.slices import HOST_NUMBER, POD_TYPE, SLICE_NAME, SliceShape, chip_environment, shape_of

ADVICE = (
    "its last release goes with torch 2.9 alone: after this package, pip install 'torch_xla[tpu]==2.9.*' "
    "'torchvision==0.24.*' on every node, or use --accelerator cpu"
)


class Door:
    """Where the others of a generation meet, if this worker is its rank 0: an OwnStore at `host`."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._served: Any = None

    def close(self) -> None:
        """The store has lost its connection to itself: the next who asks gets a new one."""
        self._served = None

    def serve(self) -> Any:
        """The OwnStore; by that interface gloo connects, too."""
        from orchestrator.stores import OwnStore

        if self._served is None:
            if name := interface_of(self._host):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            self._served = OwnStore(self._host)
        return self._served

    def of(self, seat: Seat) -> Any:
        """The store at which the workers of a generation meet; None: there is only one."""
        from orchestrator.stores import reach_store

        if seat.workers == 1:
            return None
        return self.serve().store if seat.rank == 0 else reach_store(seat.store)


@dataclass(frozen=True)
class Spot:
    """Where a worker is in a TPU slice; elsewhere as it stands.

    Attributes:
        slice: its name, "" where there are no slices.
        place: number of the chip in the slice, by which its workers are ranked.
    """

    slice: str = ""
    place: int = 0


def take_device(config: RunConfig) -> tuple[Any, Spot]:
    """The torch device that Ray gave to this worker, and its place in a slice.

    Raises:
        RuntimeError: it is not there, or torch cannot use it: this worker ends, and another takes its place.
    """
    import ray

    from orchestrator import devices

    given: dict[str, list[str]] = ray.get_runtime_context().get_accelerator_ids()
    if config.accelerator == "cuda":
        return devices.take_cuda(given.get("GPU", []), os.environ), Spot()
    if config.accelerator == "tpu":
        shape = shape_of(config.accelerator_type, config.topology)
        environment, name = _in_slice(shape, given.get("TPU", []))
        device, place = devices.take_xla(environment, shape.chips)
        return device, Spot(name, place)
    import torch

    return torch.device("cpu"), Spot()


def _in_slice(shape: SliceShape, chips: Sequence[str]) -> tuple[dict[str, str], str]:
    """(what libtpu is told, the slice's name), from this node's labels and those of its slice's other hosts."""
    import ray

    if not chips:
        raise RuntimeError("Ray gave this worker no TPU chip")
    context = ray.get_runtime_context()
    labels = context.get_node_labels() or {}
    if shape.hosts == 1:
        return chip_environment(shape, 0, int(chips[0]), ["localhost"]), str(context.get_node_id())
    name = labels.get(SLICE_NAME, "")
    hosts = {
        int(node["Labels"][HOST_NUMBER]): node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and node.get("Labels", {}).get(SLICE_NAME) == name and HOST_NUMBER in node["Labels"]
    }
    if sorted(hosts) != list(range(shape.hosts)):
        raise RuntimeError(f"slice {name} has hosts {sorted(hosts)} of {shape.hosts}")
    addresses = [hosts[number] for number in range(shape.hosts)]
    return chip_environment(shape, int(labels[HOST_NUMBER]), int(chips[0]), addresses), name


def torch_xla_problem() -> str:
    """Why this process could not train on a TPU, "" where it could; the chips are not touched."""
    if importlib.util.find_spec("torch_xla") is None:
        return "torch_xla is not installed there"
    try:
        import torch_xla  # noqa: F401 it must have been built for this torch
    except (ImportError, OSError) as error:
        return f"torch_xla does not load there ({one_line(error, 150)})"
    return ""


def check_torch_xla(nodes: Sequence[Node], shape: SliceShape) -> None:
    """Ask a TPU node, if there is one yet, whether it has torch_xla; raises UserError."""
    import ray

    host = next((n for n in nodes if n.labels.get(POD_TYPE) == shape.pod_type and n.resources.get("TPU")), None)
    if host is None:
        return
    asked: Any = ray.remote(num_cpus=0)(torch_xla_problem)
    problem = ray.get(asked.options(label_selector={POD_TYPE: shape.pod_type}).remote())
    if problem:
        raise UserError(f"--accelerator tpu: {problem} (node {host.name}); {ADVICE}")
