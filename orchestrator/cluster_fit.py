"""How many workers fit on a cluster: a pure decision from its nodes' resources and labels."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.config import RunConfig
from orchestrator.errors import UserError


@dataclass(frozen=True)
class Node:
    """A node as Ray describes it: total resources and labels."""

    resources: Mapping[str, float]
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Offer:
    """What an autoscaler may add: `nodes`, or it does not say (`known` is False)."""

    nodes: tuple[Node, ...] = ()
    known: bool = True


def matches(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether labels satisfy Ray's label selector: "v", "!v", "in(a,b)" or "!in(a,b)" by key."""
    for key, rule in wanted.items():
        negated, plain = rule.startswith("!"), rule.removeprefix("!")
        choice = re.fullmatch(r"in\((.*)\)", plain)
        values = [v.strip() for v in choice[1].split(",")] if choice else [plain]
        if (labels.get(key) in values) == negated:
            return False
    return True


def capacity(nodes: Sequence[Node], per_worker: Mapping[str, float], placement: str, labels: Mapping[str, str]) -> int:
    """How many workers could run at once if nothing else did."""
    each = [
        min(math.floor(node.resources.get(name, 0.0) / amount + 1e-9) for name, amount in per_worker.items() if amount)
        for node in nodes
        if matches(node.labels, labels)
    ]
    if placement == "strict-pack":
        return max(each, default=0)
    if placement == "strict-spread":
        return sum(count > 0 for count in each)
    return sum(each)


def choose_workers(
    config: RunConfig, per_worker: Mapping[str, float], nodes: Sequence[Node], offer: Offer | None = None
) -> int:
    """The number of workers to start: what fits, or the minimum if an autoscaler can make room for it.

    Args:
        offer: of the cluster's autoscaler; None: there is none.

    Raises:
        UserError: the minimum can never fit; says what would.
    """
    labels = dict(config.node_labels.items)
    fits = capacity(nodes, per_worker, config.placement, labels)
    wanted = config.workers
    if fits >= wanted.minimum:
        return min(wanted.maximum, fits)
    offered = offer.nodes if offer else ()
    could = capacity([*nodes, *offered], per_worker, config.placement, labels)
    if offer and (could >= wanted.minimum or not offer.known):
        return wanted.minimum
    need = ",".join(f"{name}={amount:g}" for name, amount in per_worker.items())
    total = {name: sum(node.resources.get(name, 0.0) for node in nodes) for name in per_worker}
    have = ", ".join(f"{name}={amount:g}" for name, amount in total.items())
    where = f" with labels {config.node_labels}" if labels else ""
    hint = f"--workers {could} would fit" if could else "no worker fits"
    smaller = _smaller_cpu(config, per_worker, [*nodes, *offered])
    more = f"; the autoscaler could add {_described(offered)}" if offer else ""
    raise UserError(
        f"--workers {wanted}: {wanted.minimum} x {need} ({config.placement}) do not fit on {len(nodes)} "
        f"node(s){where} with {have}{more}; {hint}{smaller}"
    )


def _described(nodes: Sequence[Node]) -> str:
    """Such as "3 x CPU=1, 2 x CPU=8,GPU=1"."""
    counts = Counter(",".join(f"{k}={v:g}" for k, v in sorted(n.resources.items()) if k != "memory") for n in nodes)
    return ", ".join(f"{count} x {kind}" for kind, count in counts.items()) or "nothing"


def _smaller_cpu(config: RunConfig, per_worker: Mapping[str, float], nodes: Sequence[Node]) -> str:
    """ ", or --resources-per-worker CPU=x" where a share of a CPU would make room."""
    cpus = sum(node.resources.get("CPU", 0.0) for node in nodes)
    if set(per_worker) != {"CPU"} or not cpus:
        return ""
    for share in (math.floor(100 * cpus / config.workers.minimum) / 100, 0.75, 0.5, 0.25, 0.2, 0.1):
        less = {**per_worker, "CPU": share}
        fits = capacity(nodes, less, config.placement, dict(config.node_labels.items)) if 0 < share < 1 else 0
        if fits >= config.workers.minimum:
            return f", or --resources-per-worker CPU={share:g}"
    return ""
