"""Folders of finished runs, made in this process: what a run leaves for orchestrator.export, without a cluster."""

import json
from pathlib import Path

import numpy as np
import torch

from orchestrator.config import RunConfig, to_toml
from orchestrator.state import weights_sha256
from workloads.registry import WORKLOADS


def finish(folder: Path, workload: str, config: RunConfig, steps: int, lr: float = 3e-3) -> torch.nn.Module:
    """Train for a few steps of Adam and write the run's folder; returns the model, in evaluation mode."""
    torch.manual_seed(0)
    work = WORKLOADS[workload].build(config)
    model, samples = work.build_model(), work.samples("train")
    optimizer = torch.optim.Adam(model.parameters(), lr)
    random = np.random.default_rng(0)
    for _ in range(steps):
        sums = work.sums(model, samples.microbatch(random.integers(0, len(samples), config.batch_size), 0))
        optimizer.zero_grad()
        (sums.loss / sums.count).backward()
        optimizer.step()
    work.save(model.eval(), folder / "model")
    (folder / "config.toml").write_text(to_toml(config, workload))
    result = {"status": "finished", "weights_sha256": weights_sha256(model)}
    (folder / "result.json").write_text(json.dumps(result))
    return model
