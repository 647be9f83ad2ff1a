"""What is left out of a Ray of the command's own, by names inside Ray that may change."""

import os

import pytest
from ray._private import node, parameter, utils

from cluster import local
from orchestrator.own_ray import few_processes


def named():
    return parameter.RayParams, node.Node.start_api_server, utils.get_dashboard_dependency_error


def test_while_ray_starts_and_no_longer(monkeypatch):
    whole = named()
    monkeypatch.setenv("KEPT", "before")
    monkeypatch.delenv("NEW", raising=False)
    with few_processes({"KEPT": "now", "NEW": "now"}):
        assert (os.environ["KEPT"], os.environ["NEW"]) == ("now", "now")
        given = parameter.RayParams()
        assert (given.no_monitor, given.include_log_monitor) == (True, False)
        given.update_if_absent(include_log_monitor=True)  # as a Node does
        assert given.include_log_monitor is False
        assert utils.get_dashboard_dependency_error() is not None
        assert node.Node.start_api_server is not whole[1]
    assert named() == whole
    assert os.environ["KEPT"] == "before"
    assert "NEW" not in os.environ


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--cpus", "1.5"], "--cpus 1.5: Ray's nodes have whole ones; give 1 or more"),
        (["--cpus", "0"], "--nodes, --cpus and --idle have to be above 0"),
        (["--nodse", "2"], "--nodse: not known here; did you mean --nodes?"),
        (["--cpus", "two"], "invalid float value: 'two'"),
    ],
)
def test_a_local_cluster_that_cannot_be_is_one_line(given, said, capsys, monkeypatch):
    """The autoscaler would try to start nodes with half a CPU for ever."""
    monkeypatch.setattr(local, "start", lambda *_: pytest.fail("was started"))
    assert local.main(given) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
