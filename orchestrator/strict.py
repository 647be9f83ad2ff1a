"""Where a strict placement lets one more worker go, by the nodes that have some."""

from collections.abc import Set


def node_wanted(strategy: str, nodes: Set[str]) -> str:
    """What Ray is to ask of the node's id, as in its label selectors; "": nothing.

    Args:
        strategy: PACK, SPREAD, STRICT_PACK or STRICT_SPREAD.
        nodes: where workers are.
    """
    if not nodes or not strategy.startswith("STRICT"):
        return ""
    return f"!in({','.join(sorted(nodes))})" if strategy == "STRICT_SPREAD" else min(nodes)


def allows(strategy: str, nodes: Set[str], node: str) -> bool:
    """Whether a worker may stay on `node`: of several that were asked for at once, each knew nothing of the others."""
    if strategy == "STRICT_SPREAD":
        return node not in nodes
    return strategy != "STRICT_PACK" or not nodes or nodes == {node}


def waits_in_vain(strategy: str, nodes: Set[str], wanted: str) -> bool:
    """Whether who was asked for on the node `wanted` has to be asked for elsewhere: there is nobody any more."""
    return strategy == "STRICT_PACK" and bool(wanted) and wanted not in nodes
