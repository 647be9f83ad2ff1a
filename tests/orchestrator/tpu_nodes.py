"""Nodes of TPU slices."""

from orchestrator.cluster_fit import Node
from orchestrator.slices import SliceShape


def hosts_of(shape: SliceShape, name: str = "s", free: float | None = None) -> list[Node]:
    """The nodes of a slice as Ray labels them."""
    nodes = []
    for number in range(shape.hosts):
        labels = {"ray.io/tpu-pod-type": shape.pod_type, "ray.io/tpu-topology": shape.topology}
        labels |= {"ray.io/tpu-slice-name": name, "ray.io/tpu-worker-id": str(number)}
        chips = float(shape.chips_per_host)
        nodes.append(Node({"CPU": 8.0, "TPU": chips}, labels, free={"TPU": chips if free is None else free}))
    return nodes
