"""Short sequences first, from prepared data: the same weights for any number of workers and of loader processes."""

import numpy as np
import pytest
from distributed import run_distributed
from preparing import do, job
from real import real_plan, run_real


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Settings of a run that turns to whole sequences in the middle of an epoch."""
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    words = [f"The cat number {n} sees the dog number {n + 1} run to house {n * 7 % 13}." for n in range(600)]
    (tmp_path / "text.txt").write_text("\n\n".join(words))
    source, sizes = f"text:{tmp_path}/text.txt", {"vocab_size": 300, "sequence_length": 16}
    do(job("bert", source, tmp_path / "prepared", "--file-mb", "0.01", **sizes))
    return {
        "data": f"parquet:{tmp_path / 'prepared'}", "sequence_length": 16, "hidden_size": 32, "layers": 2, "heads": 2,
        "shards": 4, "batch_size": 16, "steps": 8, "dropout": 0.1, "mask_rate": 0.3, "vocab_multiple": 64,
        "short_length": 9, "short_share": 0.5, "shuffle_window": 2,
    }  # fmt: skip


def test_the_weights_do_not_depend_on_the_workers(given):
    plan = real_plan("bert", **given)
    assert plan.schedule.steps_per_epoch > plan.total_steps
    two = run_distributed(run_real, 2, plan)
    (alone,) = run_distributed(run_real, 1, plan.with_config(loader_processes=2))
    assert two == [alone] * 2
    (without,) = run_distributed(run_real, 1, real_plan("bert", **{**given, "short_length": 0, "short_share": 0.9}))
    assert without[0] != alone[0]


@pytest.mark.long  # each of these has tests of its own; here are two lengths
@pytest.mark.timeout(900)
@pytest.mark.parametrize("other", [{"sync": "local-sgd", "local_steps": 3}, {"reduce": "ddp"}, {"compile": True}])
def test_with_other_settings(given, other, tmp_path):
    plan, cache = real_plan("bert", **given, **other), str(tmp_path / "compiled")
    (alone,) = run_distributed(run_real, 1, plan, cache, timeout_s=800)
    three = run_distributed(run_real, 3, plan, cache, timeout_s=800)
    if "reduce" in other:
        assert np.allclose(three[0][1], alone[1], rtol=0.05)
    else:
        assert three == [alone] * 3
