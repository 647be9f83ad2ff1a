"""A real run, scraped by a real Prometheus: the dashboard's queries and the alerts, against what it wrote."""

import json
import shutil
import socket
import time
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import REPOSITORY, begin, kept_in, records, run, wait_until

from orchestrator.meter import EVERY_SECONDS, METRICS, Meter, Metric
from orchestrator.values import Cadence

MONITORING = REPOSITORY / "cluster" / "monitoring"
STEPS, EVERY = 240, 20
Key = tuple[str, ...]

pytestmark = [
    pytest.mark.skipif(not shutil.which("prometheus"), reason="prometheus is not installed (apt: prometheus)"),
    pytest.mark.timeout(600),  # the first one waits for the run
]


@dataclass(frozen=True)
class Prometheus:
    """One that scrapes the shared cluster, as cluster/monitoring/prometheus.yaml says, but more often."""

    url: str
    since_s: float

    def get(self, path: str, **query: object) -> Any:
        """The data of an answer of its API."""
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
            found = json.load(answer)
        assert found["status"] == "success"
        return found["data"]

    def series(self, expression: str) -> list[dict[str, Any]]:
        """What a panel of the dashboard shows of the time since this began."""
        plain = expression.replace("$run", "scraped").replace("$__rate_interval", "10s")
        assert "$" not in plain
        found = self.get("query_range", query=plain, start=self.since_s, end=time.time(), step=1)
        return list(found["result"])

    def now(self, expression: str, labels: tuple[str, ...]) -> dict[Key, float]:
        """Label values -> value."""
        found = self.get("query", query=expression)["result"]
        return {tuple(one["metric"][label] for label in labels): float(one["value"][1]) for one in found}


@pytest.fixture(scope="module")
def prometheus(cluster: str, metrics_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    assert job["file_sd_configs"] == [{"files": ["/tmp/ray/prom_metrics_service_discovery.json"]}]
    job["file_sd_configs"] = [{"files": [str(folder / "nodes.json")]}]
    (folder / "nodes.json").write_text(json.dumps([{"targets": [f"127.0.0.1:{metrics_port}"]}]))
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = [f"--web.listen-address={address}", f"--storage.tsdb.path={folder / 'data'}"]
    process = begin(["prometheus", f"--config.file={folder / 'prometheus.yaml'}", *flags])
    found = Prometheus(f"http://{address}", time.time())
    try:
        wait_until(lambda: scrapes(found), 30, "Prometheus to scrape the cluster")
        yield found
    finally:
        process.kill()
        process.communicate(timeout=10)


def scrapes(prometheus: Prometheus) -> bool:
    """Whether it has heard from the cluster."""
    try:
        return prometheus.now("up", ("job",)) == {("ray",): 1.0}
    except OSError:
        return False


@pytest.fixture(scope="module")
def folder(prometheus: Prometheus, cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a fault; returned when Prometheus has heard of its last step."""
    storage = tmp_path_factory.mktemp("runs")
    faults = storage / "faults.toml"
    faults.write_text('[[fault]]\nkind = "kill"\nrank = 1\nstep = 60\n')
    # Samples enough for the run to take some scrapes on a fast machine too.
    settings = ["--steps", str(STEPS), "--batch-size", "512", "--checkpoint-every", str(EVERY), "--workers", "2"]
    settings += ["--faults", str(faults)]
    done = run("resnet", *settings, *kept_in(storage, "scraped", cluster))
    assert done.status == 0, done.err
    steps = 'sum by (run) (ray_orchestrator_steps_total{run="scraped"})'
    wait_until(lambda: prometheus.now(steps, ("run",)) == {("scraped",): float(STEPS)}, 20, "all steps to be scraped")
    return storage / "scraped"


def expected(folder: Path) -> dict[Metric, dict[Key, float]]:
    """What the run folder's records say of each metric."""
    meter = Meter(Cadence(steps=EVERY))
    written = sorted(records(folder) + records(folder, "events.jsonl"), key=lambda record: record["time_s"])
    readings = [r for record in written for r in (meter.event(record) if "event" in record else meter.steps([record]))]
    found: dict[Metric, dict[Key, float]] = defaultdict(dict)
    for metric in METRICS:
        found[metric] = dict.fromkeys(metric.known, 0.0) if metric.counts else {}
    for reading in readings:
        before = found[reading.metric].get(reading.labels, 0.0) if reading.metric.counts else 0.0
        found[reading.metric][reading.labels] = before + reading.value
    found[EVERY_SECONDS] = {}
    return found


@pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)
def test_prometheus_has_what_the_run_wrote(metric: Metric, prometheus: Prometheus, folder: Path) -> None:
    whole = expected(folder)[metric]
    by = ", ".join(("run", "workload", *metric.labels))
    selected = f'ray_{metric.name}{{run="scraped", workload="resnet"}}'
    # Of a time, not of now: a busy machine's page that came too late is nothing at all to Prometheus.
    scraped = f"{'sum' if metric.counts else 'max'} by ({by}) (last_over_time({selected}[10m]))"
    # The journal and its listener look at the clock one after the other.
    slack = 0.5 if "timestamp" in metric.name else 1e-6
    assert prometheus.now(scraped, metric.labels) == pytest.approx(whole, abs=slack)


def test_the_run_was_worth_it(folder: Path) -> None:
    kinds = [e["kind"] for e in records(folder, "events.jsonl") if e["event"] == "incident"]
    assert kinds[0] == "worker_killed"
    assert len([e for e in records(folder, "events.jsonl") if e["event"] == "checkpoint_saved"]) > 3


DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
QUERIES = [
    pytest.param(target["expr"], id=f"{panel['type']}: {panel['title']}: {target['legendFormat']}")
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
] + [pytest.param(note["expr"], id=note["name"]) for note in DASHBOARD["annotations"]["list"]]


@pytest.mark.parametrize("expression", QUERIES)
def test_a_query_of_the_dashboard_shows_the_run(expression: str, prometheus: Prometheus, folder: Path) -> None:
    found = prometheus.series(expression)
    assert found
    assert all(series["metric"]["run"] == "scraped" for series in found)
    shown = [float(value) for series in found for _, value in series["values"]]
    assert any(value == value for value in shown), "nothing but NaN"


def shown(prometheus: Prometheus, title: str) -> list[dict[str, Any]]:
    """The first query of a panel that draws lines."""
    (panel,) = (p for p in DASHBOARD["panels"] if p["title"] == title and p["type"] == "timeseries")
    return prometheus.series(panel["targets"][0]["expr"])


def test_panels_say_what_happened(prometheus: Prometheus, folder: Path) -> None:
    """Values, not only that there are some."""

    def numbers(title: str) -> list[float]:
        return [float(v) for series in shown(prometheus, title) for _, v in series["values"] if v != "NaN"]

    assert max(numbers("Steps")) == STEPS
    assert {series["metric"]["kind"] for series in shown(prometheus, "Incidents by kind")} >= {"worker_killed"}
    phases = {series["metric"]["phase"] for series in shown(prometheus, "Step time by phase")}
    assert phases == {"data", "forward_backward", "reduction", "rest", "checkpoint"}
    written = sorted(r["step_s"] for r in records(folder))
    assert 0 < max(numbers("Step time by phase")) <= written[-1]
    assert 0 < max(numbers("Goodput")) < 1.3, "reports come every second or so"
    assert all(0 <= age < 60 for age in numbers("Checkpoint age"))
    variable = DASHBOARD["templating"]["list"][1]["definition"]
    assert variable == "label_values(ray_orchestrator_committed_step, run)"
    window = {"start": prometheus.since_s, "end": time.time()}
    found = prometheus.get("label/run/values", **{"match[]": "ray_orchestrator_committed_step", **window})
    assert "scraped" in found


def test_alerts_are_evaluated_and_quiet(prometheus: Prometheus, folder: Path) -> None:
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == {
        "TrainingStalled", "TrainingVanished", "CheckpointTooOld", "NodeFlapping",
    }  # fmt: skip
    assert {rule["health"] for rule in rules} == {"ok"}, [rule.get("lastError") for rule in rules]
    assert [alert for rule in rules for alert in rule["alerts"] if alert["labels"].get("run") == "scraped"] == []


def test_the_page_says_what_counters_count(prometheus: Prometheus, folder: Path, metrics_port: int) -> None:
    """Ray keeps them after the run; a gauge goes with its process."""
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=10) as answer:
        page = answer.read().decode()
    for metric in METRICS:
        if metric.counts:
            assert f"# HELP ray_{metric.name} {metric.help}\n# TYPE ray_{metric.name} counter\n" in page
