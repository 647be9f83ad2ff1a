"""What a run computes on: decided from its settings and what the cluster's nodes have."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.assembly import RESOURCES, check_accelerator
from orchestrator.cluster_fit import Node, Offer, described, matches
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.events import DevicesMixed
from orchestrator.slices import SliceShape, find_shape


@dataclass(frozen=True)
class Accelerator:
    """A decision.

    Attributes:
        kind: cpu, cuda or tpu.
        per_worker: what each worker reserves.
        why: for people.
        shape: of the TPU slices; None elsewhere.
    """

    kind: str
    per_worker: dict[str, float]
    why: str
    shape: SliceShape | None = None

    def __str__(self) -> str:
        return f"{self.kind} ({self.why})" + (f", slices of {self.shape}" if self.shape else "")


def decide(config: RunConfig, nodes: Sequence[Node], offer: Offer | None = None) -> Accelerator:
    """What the run computes on, of what the nodes have and an autoscaler may add.

    `--resources-per-worker` decides where --accelerator is auto; where it leaves the GPU or TPU chip out that was asked
    for, each worker reserves one.

    Raises:
        UserError: it is not there, or does not go with other settings.
    """
    labels = dict(config.node_labels.items)
    usable = [n for n in (*nodes, *(offer.nodes if offer else ())) if matches(n.labels, labels)]
    there = {kind for kind, name in RESOURCES.items() if any(node.resources.get(name) for node in usable)}
    given, kind, why = config.resources_per_worker.numbers(), config.accelerator, "as given"
    if kind == "auto":
        kind, why = _found(given, there)
        if (
            kind == "cpu"
            and not given
            and offer
            and not offer.known
            and not any(n.resources.get("CPU") for n in usable)
        ):
            why += ", and the autoscaler does not say what it can add: --accelerator cuda where that is GPUs"
        check_accelerator(config, kind)
    elif kind in RESOURCES and kind not in there and not (offer and not offer.known):
        more = f"; the autoscaler could add {described(offer.nodes)}" if offer else ""
        limit = f" with labels {config.node_labels}" if labels else ""
        raise UserError(
            f"--accelerator {kind}: none of the cluster's {len(nodes)} node(s){limit} has a {RESOURCES[kind]}{more}; "
            "use --accelerator cpu, or add nodes that have some"
        )
    per_worker = given or ({"CPU": 1.0} if kind not in RESOURCES else {})
    if kind in RESOURCES:
        per_worker = {RESOURCES[kind]: 1.0, **({} if given else {"CPU": 1.0}), **given}
    return Accelerator(kind, per_worker, why, find_shape(config, usable) if kind == "tpu" else None)


def _found(given: dict[str, float], there: set[str]) -> tuple[str, str]:
    for kind, resource in RESOURCES.items():
        if given.get(resource) or (not given and kind in there):
            return kind, "by --resources-per-worker" if given else f"nodes have {resource}s"
    return "cpu", "by --resources-per-worker" if given else "no node has a GPU or TPU"


@dataclass
class SeenDevices:
    """The kinds of device that a run's workers had, in all its life.

    Attributes:
        notice: one line for the terminal, "" while all were alike.
    """

    notice: str = ""
    _kinds: set[str] = field(default_factory=set)

    def see(self, generation: int, kinds: Sequence[str], earlier: bool = False) -> list[DevicesMixed]:
        """The devices of a generation, by rank; returns what there is to tell, once for each new kind.

        Args:
            earlier: whether it was another command's, which has told.
        """
        # Earlier versions wrote down less of a CPU.
        self._kinds -= {old for old in self._kinds for kind in kinds if kind.startswith(f"{old}, ")}
        new = set(kinds) - self._kinds
        self._kinds |= new
        if not new or len(self._kinds) < 2 or earlier:
            return []
        told = DevicesMixed(generation, list(kinds), sorted(self._kinds))
        self.notice = (
            f"devices are mixed ({'; '.join(told.kinds)}): equal bits are promised for one kind of device; "
            "--node-labels keeps a run to one"
        )
        return [told]
