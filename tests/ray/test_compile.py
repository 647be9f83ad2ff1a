"""--compile through the real command line: replacements of killed workers, and what a second run finds compiled."""

from pathlib import Path

import pytest
from commands import events, kept_in, result, run

NETWORK = ["--model", "airbench-small", "--image-size", "16", "--batch-size", "256", "--augment", "shift"]
FAULTS = """
[[fault]]
kind = "kill"
rank = 1
step = 10

[[fault]]
kind = "kill"
rank = 0
step = 20
workers = 2
"""


@pytest.mark.long  # minutes of g++; tests/orchestrator/test_compiled.py has the bits
@pytest.mark.timeout(1500)
def test_killed_workers_change_nothing_and_a_second_run_compiles_nothing(tmp_path: Path) -> None:
    """1 worker with a cold cache; then 2 that are killed one after the other: theirs is warm, and so is that of all."""
    settings = ["resnet", *NETWORK, "--compile", "true", "--steps", "300", "--resources-per-worker", "CPU=0.5"]
    kept = {"ORCHESTRATOR_CACHE": str(tmp_path / "cache")}
    cold = run(*settings, "--workers", "1", *kept_in(tmp_path, "cold"), timeout_s=900, **kept)
    assert cold.status == 0, cold.err
    faults = tmp_path / "faults.toml"
    faults.write_text(FAULTS)
    given = ["--workers", "2", "--faults", str(faults), *kept_in(tmp_path, "warm")]
    warm = run(*settings, *given, timeout_s=500, **kept)
    assert warm.status == 0, warm.err
    assert result(tmp_path / "warm")["weights_sha256"] == result(tmp_path / "cold")["weights_sha256"]
    assert [incident["kind"] for incident in result(tmp_path / "warm")["incidents"]].count("worker_killed") == 2
    (first,), others = (events(tmp_path / name, "model_compiled") for name in ("cold", "warm"))
    assert not first["cached"]
    assert len(others) >= 3, "two workers and the replacement that the second fault waited for"
    assert all(other["cached"] for other in others)
    assert max(other["compile_s"] for other in others) < first["compile_s"] / 2
    for name in ("cold", "warm"):
        assert all(e["device"] == f"cpu, {first['machine']}" for e in events(tmp_path / name, "generation_started"))
