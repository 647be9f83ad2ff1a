"""A worker that the run is better off without leaves, and nobody takes its place on that machine for a while."""

import dataclasses

from orchestrator.recovery import Member, Roster


def member(name: str) -> Member:
    return Member(name, "n0", 1, "cpu", -1, -1, ("h", 1))


def test_where_one_was_dismissed_its_successor_waits_and_the_others_train_on():
    """A throttled GPU of eight: whoever gets it would be dismissed as well."""
    r = Roster(1, 8, 2)
    for name in "ab":
        r.join(member(name), 0.0)
    assert r.form(100.0) is not None
    r.dismiss(r.seated["b"], 100.0)
    for m in r.by_rank:
        r.join(dataclasses.replace(m, step=5), 101.0)
    gone = [m for m in r.ready.values() if r.must_leave(m)]
    assert [m.id for m in gone] == ["b"]
    del r.ready["b"]
    assert [m.id for m in r.form(102.0)] == ["a"]
    r.join(member("c"), 103.0)
    assert not r.wants_pause(200.0)
    assert r.wants_pause(100.0 + 3600.0)
