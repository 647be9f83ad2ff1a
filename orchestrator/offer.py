"""What an autoscaler could add to the cluster: asked of Ray before a run is refused for want of room."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.cluster_fit import Node, Offer

MOST = 10_000  # of one kind; an autoscaler without a limit has this one here


def offer() -> Offer | None:
    """The nodes that may come; None: the cluster has no autoscaler."""
    from ray._private import ray_constants
    from ray._private.state import state
    from ray.experimental.internal_kv import _internal_kv_get

    config = state.get_cluster_config()  # the second version of the autoscaler says what it has
    if config is not None and config.node_group_configs:
        there = Counter(_living_groups())
        groups = [
            (dict(g.resources), dict(g.labels), _left(g.max_count, there[g.name])) for g in config.node_group_configs
        ]
        return Offer(tuple(_nodes(groups)))
    if (file := _configuration_here()) is not None:
        types = _node_types(file, _living() - 1)
        return Offer(known=False) if types is None else Offer(tuple(_nodes(types)))
    status = _internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS)
    report = json.loads(status).get("autoscaler_report") if status else None
    # Without a configuration the monitor reports each node as a kind of its own, node_ID.
    kinds = [kind for kind in (report or {}).get("active_nodes", {}) if not kind.startswith(("node_", "local.cluster"))]
    return Offer(known=False) if kinds or _grouped() else None


def _left(most: int, there: int) -> int:
    """How many more may come; below 0: any number."""
    return most if most < 0 else max(0, most - there)


def _living() -> int:
    """Nodes, the head among them."""
    import ray

    return sum(bool(node["Alive"]) for node in ray.nodes())


def _living_groups() -> list[str]:
    """The kind of each node, as the autoscaler's second version has it, which Ray keeps as a label."""
    import ray
    from ray._raylet import RAY_NODE_GROUP_KEY  # type: ignore[attr-defined]

    found = [(node.get("Labels") or {}).get(RAY_NODE_GROUP_KEY) for node in ray.nodes() if node["Alive"]]
    return [str(group) for group in found if group]


def _grouped() -> bool:
    """Whether there is an autoscaler's second version: KubeRay's runs beside the head, and tells nobody what it has."""
    return bool(_living_groups())


def _nodes(groups: list[tuple[dict[str, float], dict[str, str], int]]) -> Iterator[Node]:
    for resources, labels, count in groups:
        yield from [Node(resources, labels)] * min(count if count >= 0 else MOST, MOST)


def _configuration_here() -> Path | None:
    """What the first version of the autoscaler was started with, if it runs on this machine, for our cluster."""
    import ray

    from orchestrator.nodewatch import psutil_of_ray

    psutil = psutil_of_ray()
    address = ray.get_runtime_context().gcs_address
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if f"--gcs-address={address}" in words and any(word.endswith("/monitor.py") for word in words):
            for word in words:
                if word.startswith("--autoscaling-config="):
                    return Path(word.removeprefix("--autoscaling-config="))
    return None


def _node_types(file: Path, there: int) -> list[tuple[dict[str, float], dict[str, str], int]] | None:
    """(resources, labels, how many may come beside `there`) of each kind; None: its machines have what it does not say.

    Several kinds share what is left of the cluster's limit; each is counted as if it got all of that.
    """
    import yaml

    try:
        content: dict[str, Any] = yaml.safe_load(file.read_text())
    except OSError:
        return None
    if content.get("provider", {}).get("type") == "local":  # machines that are there: known when Ray runs on them
        return None
    most = content.get("max_workers", 2)
    return [
        (kind.get("resources", {}), kind.get("labels", {}), min(kind.get("max_workers", most), _left(most, there)))
        for name, kind in content.get("available_node_types", {}).items()
        if name != content.get("head_node_type")
    ]
