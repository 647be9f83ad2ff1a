"""Strict placements of workers that come one by one."""

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.strict import allows, node_wanted, waits_in_vain

NAMES = st.sampled_from("abcde")
STRATEGIES = st.sampled_from(["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"])


@given(STRATEGIES, st.lists(NAMES, min_size=1, max_size=20))
def test_workers_that_come_anywhere_end_where_the_placement_wants_them(strategy, offers):
    """Each comes to the node that Ray found when nothing was known of the others; who may not stay is asked anew."""
    seated: list[str] = []
    for node in offers:
        if allows(strategy, set(seated), node):
            seated.append(node)
    if strategy == "STRICT_SPREAD":
        assert sorted(seated) == sorted(set(offers))
    elif strategy == "STRICT_PACK":
        assert seated == [offers[0]] * offers.count(offers[0])
    else:
        assert seated == offers


@given(STRATEGIES, st.sets(NAMES), NAMES)
def test_what_is_asked_for_is_allowed(strategy, nodes, node):
    wanted = node_wanted(strategy, nodes)
    others = wanted.removeprefix("!in(").removesuffix(")").split(",")
    matches = not wanted or ((node in others) != wanted.startswith("!in("))
    if strategy == "STRICT_PACK" and len(nodes) > 1:
        return  # cannot be
    assert matches == allows(strategy, nodes, node)


def test_who_waits_for_a_node_without_workers_is_asked_for_elsewhere():
    assert waits_in_vain("STRICT_PACK", set(), "a")
    assert waits_in_vain("STRICT_PACK", {"b"}, "a")
    assert not waits_in_vain("STRICT_PACK", {"a"}, "a")
    assert not waits_in_vain("STRICT_PACK", set(), "")
    assert not waits_in_vain("STRICT_SPREAD", {"b"}, "!in(a)")
