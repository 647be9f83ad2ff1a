"""The files of cluster/monitoring: alerts as promtool judges them, and a dashboard that Grafana can lay out."""

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.meter import METRICS, RUN_LABELS, Metric

MONITORING = Path(__file__).parents[2] / "cluster" / "monitoring"
RULES = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
UNITS = {"none", "short", "percentunit", "s", "bytes"}

promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed (apt: prometheus)")


def expressions() -> list[str]:
    """Of all panels, annotations and alerts."""
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    alerts = [rule["expr"] for group in RULES for rule in group["rules"]]
    return [*panels, *(note["expr"] for note in DASHBOARD["annotations"]["list"]), *alerts]


def check(*command: str, cwd: Path = MONITORING) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *command], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


@promtool
@pytest.mark.parametrize("command", ["check rules alerts.yaml", "check config prometheus.yaml"])
def test_promtool_accepts_it(command: str) -> None:
    done = check(*command.split())
    assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_each_alert_fires_and_does_not() -> None:
    done = check("test", "rules", "alerts_test.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    tests = yaml.safe_load((MONITORING / "alerts_test.yaml").read_text())["tests"]
    shown = [case for test in tests for case in test["alert_rule_test"]]
    for alert in (rule["alert"] for group in RULES for rule in group["rules"]):
        assert {bool(c.get("exp_alerts")) for c in shown if c["alertname"] == alert} == {True, False}, alert


@promtool
@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ("> 600", "> 6000"),
        ("> 600", "> 6"),
        (">= 3", ">= 4"),
        ("offset 1h", "offset 24h"),
        ("3 * max by (run, workload) (ray_orchestrator_checkpoint_interval_s", "50 * max by (run, workload) (ray_o_s"),
        ("> max by (run, workload) (ray_orchestrator_run_end_timestamp_seconds)", "> 0"),
        ("unless on (run, workload) max by (run, workload) (ray_orchestrator_run_start_timestamp_seconds)", ""),
    ],
)
def test_an_alert_that_is_wrong_is_found(given: str, wrong: str, tmp_path: Path) -> None:
    text = (MONITORING / "alerts.yaml").read_text()
    assert given in text
    (tmp_path / "alerts.yaml").write_text(text.replace(given, wrong))
    shutil.copy(MONITORING / "alerts_test.yaml", tmp_path)
    assert check("check", "rules", "alerts.yaml", cwd=tmp_path).returncode == 0, "wrong, but a rule"
    assert check("test", "rules", "alerts_test.yaml", cwd=tmp_path).returncode == 1


@promtool
def test_names_units_and_help_are_as_prometheus_wants_them() -> None:
    def said(metric: Metric) -> str:
        name, kind = f"ray_{metric.name}", "counter" if metric.counts else "gauge"
        labels = ", ".join(f'{label}="x"' for label in (*RUN_LABELS, *metric.labels))
        return f"# HELP {name} {metric.help}\n# TYPE {name} {kind}\n{name}{{{labels}}} 1\n"

    page = "".join(map(said, METRICS))
    for text, status in ((page, 0), (page.replace("_seconds", "_milliseconds"), 3)):
        done = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.returncode == status, done.stdout + done.stderr


def test_only_metrics_that_there_are() -> None:
    """And none that nobody looks at."""
    used = set(re.findall(r"ray_(orchestrator_\w+)", " ".join(expressions())))
    assert used == {metric.name for metric in METRICS}


def test_only_labels_that_there_are() -> None:
    known = {*RUN_LABELS, *(label for metric in METRICS for label in metric.labels)}
    for expression in expressions():
        grouped = [words.split(", ") for words in re.findall(r"(?:by|on) \((.*?)\)", expression)]
        assert {label for labels in grouped for label in labels} <= known, expression


def test_the_dashboard_can_be_imported() -> None:
    assert DASHBOARD["schemaVersion"] >= 36, "data sources are objects since"
    assert DASHBOARD["uid"]
    assert DASHBOARD["title"]
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["run"]["datasource"] == SOURCE
    assert variables["run"]["definition"] == variables["run"]["query"]["query"]
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) <= {*variables, "__rate_interval"}


def test_panels_have_what_they_need() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) == 21
    for panel in panels:
        assert panel["type"] in ("stat", "timeseries")
        assert panel["title"]
        assert panel["description"]
        assert panel["datasource"] == SOURCE
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        assert panel["targets"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert target["datasource"] == SOURCE
            assert 'run=~"$run"' in target["expr"]
            assert "{{run}}" in target["legendFormat"]


def test_panels_do_not_overlap() -> None:
    def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
        place = panel["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        assert columns.start >= 0
        assert columns.stop <= 24
        return set(itertools.product(columns, range(place["y"], place["y"] + place["h"])))

    taken = [cells(panel) for panel in DASHBOARD["panels"]]
    assert sum(map(len, taken)) == len(set().union(*taken))


def test_kubernetes_has_the_same_alerts() -> None:
    monitor, rules = yaml.safe_load_all((MONITORING.parent / "kuberay" / "monitor.yaml").read_text())
    assert (monitor["kind"], rules["kind"]) == ("PodMonitor", "PrometheusRule")
    assert rules["spec"]["groups"] == RULES
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    every_s = int(yaml.safe_load((MONITORING / "prometheus.yaml").read_text())["global"]["scrape_interval"][:-1])
    assert int(endpoint["interval"][:-1]) == every_s <= 15, "gauges of a process that has ended stay for 20 s"
