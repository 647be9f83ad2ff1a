"""How many workers fit on a cluster, and where: pure decisions from its nodes' resources and labels."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.config import RunConfig
from orchestrator.errors import UserError

SPEED_LABEL = "orchestrator-speed"  # of a node, relative to others: `ray start --labels orchestrator-speed=2`
# Dense 16-bit tensor throughput by NVIDIA's datasheets; it only matters until speeds are measured.
TERAFLOPS = {
    "T4": 65.0, "V100": 125.0, "A10G": 70.0, "L4": 121.0, "A100": 312.0, "L40S": 362.0, "H100": 989.0, "H200": 989.0,
    "B200": 2250.0,
}  # fmt: skip


@dataclass(frozen=True)
class Node:
    """A node as Ray describes it.

    Attributes:
        resources: all that it has.
        name: its address, for people.
        free: of its resources, what nobody uses now; None: all.
    """

    resources: Mapping[str, float]
    labels: Mapping[str, str]
    name: str = ""
    free: Mapping[str, float] | None = None

    def now(self) -> "Node":
        """The node without what others use of it."""
        return self if self.free is None else Node(self.free, self.labels, self.name)


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


def declared_speed(labels: Mapping[str, str]) -> float:
    """How fast a node is said to be: by its label SPEED_LABEL, or by its accelerator; 0: nothing is said."""
    given = labels.get(SPEED_LABEL, "")
    if re.fullmatch(r"\d+(\.\d+)?", given) and float(given) > 0:
        return float(given)
    return TERAFLOPS.get(labels.get("ray.io/accelerator-type", ""), 0.0)


def rooms(nodes: Sequence[Node], per_worker: Mapping[str, float], labels: Mapping[str, str]) -> list[int]:
    """How many workers each node has room for."""
    amounts = [(name, amount) for name, amount in per_worker.items() if amount]
    return [
        min(math.floor(node.resources.get(name, 0.0) / amount + 1e-9) for name, amount in amounts)
        if matches(node.labels, labels)
        else 0
        for node in nodes
    ]


def capacity(nodes: Sequence[Node], per_worker: Mapping[str, float], placement: str, labels: Mapping[str, str]) -> int:
    """How many workers could run at once if nothing else did."""
    each = rooms(nodes, per_worker, labels)
    if placement == "strict-pack":
        return max(each, default=0)
    if placement == "strict-spread":
        return sum(count > 0 for count in each)
    return sum(each)


def where(
    nodes: Sequence[Node], per_worker: Mapping[str, float], placement: str, labels: Mapping[str, str], workers: int
) -> list[int]:
    """The node's number for each worker, as Ray is expected to place them; fewer if they do not all fit.

    Ray's strategies (docs.ray.io, placement groups): PACK fills node after node, SPREAD takes them in turn, the strict
    ones take one node, or one node each. Which of several equal nodes Ray takes is its own affair.
    """
    left = dict(enumerate(rooms(nodes, per_worker, labels)))
    if placement == "strict-pack":
        best = max(left, key=lambda n: left[n], default=0)
        return [best] * min(workers, left.get(best, 0))
    if placement == "pack":
        filled = sorted(left, key=lambda n: -left[n])
        return sorted([n for n in filled for _ in range(left[n])][:workers])
    turns = 1 if placement == "strict-spread" else max(left.values(), default=0)
    return sorted([n for turn in range(turns) for n in left if left[n] > turn][:workers])


def choose_workers(
    config: RunConfig, per_worker: Mapping[str, float], nodes: Sequence[Node], offer: Offer | None = None
) -> int:
    """The number of workers to start: what fits beside others' work, at least the minimum, which may have to wait.

    Args:
        offer: of the cluster's autoscaler; None: there is none.

    Raises:
        UserError: the minimum can never fit; says what would.
    """
    labels = dict(config.node_labels.items)
    fits = capacity(nodes, per_worker, config.placement, labels)
    wanted, size = config.workers, max(1, config.parallel.size)
    if fits >= wanted.minimum:
        now = capacity([node.now() for node in nodes], per_worker, config.placement, labels)
        most = min(wanted.maximum, now)
        return max(wanted.minimum, most - most % size)
    offered = offer.nodes if offer else ()
    could = capacity([*nodes, *offered], per_worker, config.placement, labels)
    could -= could % size
    if offer and (could >= wanted.minimum or not offer.known):
        return wanted.minimum
    need = ",".join(f"{name}={amount:g}" for name, amount in per_worker.items())
    total = {name: sum(node.resources.get(name, 0.0) for node in nodes) for name in per_worker}
    have = ", ".join(f"{name}={amount:g}" for name, amount in total.items())
    where = f" with labels {config.node_labels}" if labels else ""
    hint = f"--workers {could} would fit" if could else "no worker fits"
    smaller = _smaller_cpu(config, per_worker, [*nodes, *offered])
    more = f"; the autoscaler could add {described(offered)}" if offer else ""
    raise UserError(
        f"--workers {wanted}: {wanted.minimum} x {need} ({config.placement}) do not fit on {len(nodes)} "
        f"node(s){where} with {have}{more}; {hint}{smaller}"
    )


def described(nodes: Sequence[Node]) -> str:
    """In words, such as "3 x CPU=1, 2 x CPU=8,GPU=1"."""
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
