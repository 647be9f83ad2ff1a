"""Tests run in two processes of pytest (pytest-xdist); those of Ray are all in one, one after the other."""

import os

import pytest
from xdist.scheduler import LoadScopeScheduling

GIVES_WAY = 5  # nice(2): a third of the time of who does not; with 10, a tenth, importing torch took minutes


class RayTogether(LoadScopeScheduling):
    """Ray's tests are one scope: clusters of two tests at once would see each other. Any other is its own."""

    def _split_scope(self, nodeid: str) -> str:
        return "ray" if nodeid.startswith("tests/ray/") else nodeid


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ray's tests begin at once: they take longest, and wait more than they compute."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/ray/"))


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> RayTogether:
    """xdist's hook."""
    return RayTogether(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """The rest gives way to Ray's tests, which take longer: cores go to them first where both want one."""
    beside_another = hasattr(item.config, "workerinput")
    if beside_another and not item.nodeid.startswith("tests/ray/") and os.nice(0) < GIVES_WAY:
        os.nice(GIVES_WAY)
