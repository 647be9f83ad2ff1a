"""Every command of README.md is run: here as it stands, or by the test or script named beside it."""

import re
from pathlib import Path

import pytest
from commands import REPOSITORY, call, result
from PIL import Image

REHEARSAL = "test_the_readme_s_schedule"
ELSEWHERE = {
    "pip install -e . && python -m orchestrator.run resnet": ".ci/run",
    "pip install -e '.[test]' && pytest": ".ci/run",
    "pip install -e '.[export]'": ".ci/run",  # as a part of [test]
    "python -m orchestrator.run bert": "test_bert_on_pythons_own_documentation",
    "ray start --head": "test_ray_job_submit",
    "python -m orchestrator.run resnet": "test_ray_job_submit",
    "python -m orchestrator.rehearse resnet --faults workloads/faults.toml --workers 1:3 --epochs 45": REHEARSAL,
    "RAY_AUTH_MODE=token ray job submit --working-dir . -- python -m orchestrator.run resnet": "test_ray_job_submit",
}
LOCAL = "test_from_no_node_to_the_minimum_to_the_maximum_and_back"
ELSEWHERE |= {
    "python -m cluster.local --nodes 3 --cpus 1": LOCAL,
    "python -m orchestrator.run resnet --workers 1:3": LOCAL,
    "python -m cluster.local --stop": LOCAL,
}
PREPARED = "test_a_run_outlives_ten_seconds_without_its_storage"
ELSEWHERE |= {
    "python -m orchestrator.prepare resnet --source digits --out runs/digits": PREPARED,
    "python -m orchestrator.run resnet --data parquet:runs/digits": PREPARED,
}
ELSEWHERE |= {"python -m orchestrator.doctor": "test_a_cluster_that_is_well"}
SCRAPE = (
    "prometheus --config.file=cluster/monitoring/prometheus.yaml --storage.tsdb.path=/tmp/prometheus "
    "--web.listen-address=127.0.0.1:9090"
)
ELSEWHERE |= {SCRAPE: "test_prometheus_has_what_the_run_wrote"}
BENCHMARKS = "tests/bench/README.md"  # measured by hand, for they take many minutes; test_benchmarks_start starts each


def commands(page: str = "README.md") -> list[str]:
    """The lines of its code blocks that are commands."""
    blocks = re.findall(r"^```\n(.*?)^```", (REPOSITORY / page).read_text(), re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if re.match(r"([A-Z_]+=\S+ )?(python|pip|ray|pytest|prometheus)\b", line)]


def test_every_command_is_known() -> None:
    found = commands()
    assert set(ELSEWHERE) <= set(found)
    assert (REPOSITORY / ".ci/run").read_text().count("pip install --quiet --editable") == 2
    places = ("first_day", "rehearsals", "autoscaling", "object_storage", "doctor", "prometheus")
    tests = "".join((REPOSITORY / f"tests/ray/test_{name}.py").read_text() for name in places)
    assert all(name == ".ci/run" or f"def {name}(" in tests for name in ELSEWHERE.values())


@pytest.mark.timeout(600)
def test_the_laptop_commands(tmp_path: Path) -> None:
    """In their order, from a folder that looks like the repository."""
    for name in ("workloads", "orchestrator"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    Image.new("L", (8, 8)).save(tmp_path / "digit.png")
    plain = [c for c in commands() if c not in ELSEWHERE]
    assert len(plain) == 10
    for command in plain:
        done = call(command, 240, cwd=tmp_path)
        assert done.status == 0, f"{command}\n{done.out}{done.err}"
    assert result(tmp_path / "runs" / "first")["status"] == "finished"
    assert "<title>first: finished</title>" in (tmp_path / "first.html").read_text()
    assert list((tmp_path / "runs/first/tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.parametrize("command", commands(BENCHMARKS))
def test_benchmarks_start(command: str) -> None:
    done = call([*command.split(), "--help"], 120)
    assert done.status == 0, done.err
    assert "usage:" in done.out
