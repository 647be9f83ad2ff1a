"""Baseline: plain Ray Train's recommended recovery ("Handling Failures and Node Preemption" in its documentation).

    PYTHONPATH=. RAY_AUTH_MODE=token python tests/bench/baseline_recovery.py resnet18 --address HOST:PORT \
        --workers 2 --log steps.jsonl --storage FOLDER --data FOLDER/cifar-10-batches-py

TorchTrainer with FailureConfig(max_failures=-1); ray.train.report with a Checkpoint every 10 steps, restored from
ray.train.get_checkpoint(). Models, losses and optimizers are those of baseline_ddp.py. Rank 0 writes a line to --log
for each start of the group (time, processes and nodes by rank) and for each step after its optimizer step.
Trains until it is killed.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from baseline_ddp import bert_mini, inputs, resnet18
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import nn
from torch.utils.data import DataLoader


def append(log, record):
    with log.open("a") as file:
        file.write(json.dumps({"time_s": round(time.time(), 3), **record}) + "\n")


def announce(log, step):
    """Write down who trains now; returns the number of this start."""
    before = log.read_text().count("generation_started") if log.exists() else 0
    mine = (os.getpid(), ray.get_runtime_context().get_node_id())
    seats = [mine] * dist.get_world_size()
    dist.all_gather_object(seats, mine)
    pids, nodes = zip(*seats, strict=True)
    if dist.get_rank() == 0:
        started = {"event": "generation_started", "generation": before + 1, "step": step, "workers": len(seats)}
        append(log, {**started, "pids": pids, "nodes": nodes})
    return before + 1


def restore(model, optimizer):
    """The steps that the newest checkpoint has."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        saved = torch.load(Path(folder) / "state.pt")
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"]


def report(model, optimizer, step, loss):
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if ray.train.get_context().get_world_rank() == 0:
            state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, Path(folder) / "state.pt")
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report({"loss": loss.item(), "step": step}, checkpoint=checkpoint)


def train_func(config):
    settings = argparse.Namespace(**config)
    model, dataset, collate, optimizer, clip_norm = {"resnet18": resnet18, "bert-mini": bert_mini}[settings.workload](
        settings
    )
    step = restore(model, optimizer)
    model = ray.train.torch.prepare_model(model)
    batch_size = settings.batch_size // ray.train.get_context().get_world_size()
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    loader = ray.train.torch.prepare_data_loader(loader)
    generation, writes = announce(settings.log, step), ray.train.get_context().get_world_rank() == 0
    stepped_s = time.time()
    while True:
        if ray.train.get_context().get_world_size() > 1:
            loader.sampler.set_epoch(step // len(loader))
        for batch in loader:
            optimizer.zero_grad()
            loss = model(*inputs(batch))
            loss.backward()
            if clip_norm:
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
            step, now = step + 1, time.time()
            if writes:
                append(settings.log, {"step": step, "step_s": now - stepped_s, "generation": generation})
            stepped_s = now
            if step % settings.checkpoint_every == 0:
                report(model, optimizer, step, loss)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("workload", choices=("resnet18", "bert-mini"))
    parser.add_argument("--address", required=True, help="of the Ray cluster")
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--log", type=Path, required=True, help="file that lines of JSON are added to")
    parser.add_argument("--storage", type=Path, required=True, help="folder of Ray Train's checkpoints")
    parser.add_argument("--data", type=Path, help="cifar-10-batches-py")
    parser.add_argument("--batch-size", type=int, default=32, help="global")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--mask-rate", type=float, default=0.15)
    parser.add_argument("--checkpoint-every", type=int, default=10, help="steps")
    parser.add_argument("--head", choices=("full", "masked"), default="masked")
    settings = parser.parse_args()
    ray.init(address=settings.address)
    TorchTrainer(
        train_func,
        train_loop_config=vars(settings),
        scaling_config=ScalingConfig(num_workers=settings.workers, use_gpu=False),
        run_config=RunConfig(
            storage_path=str(settings.storage),
            name="baseline",
            failure_config=FailureConfig(max_failures=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    ).fit()


if __name__ == "__main__":
    main()
