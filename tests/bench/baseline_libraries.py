"""Baselines: baseline_ddp.py's job as users write it with accelerate (resnet18) or transformers' Trainer (BERT-mini).

    PYTHONPATH=. OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 tests/bench/baseline_libraries.py resnet18 \
        --data FOLDER/cifar-10-batches-py --batch-size 128 --steps 15

Needs `pip install accelerate`. Model, data, transforms and optimizer are baseline_ddp.py's. torchrun starts them, as
`accelerate launch` does for several GPUs: for several CPU processes it asks for MPI, which no package brings.
Prints one JSON line: the seconds of each step on rank 0, from the end of one optimizer step to the next.
"""  # fmt: skip

import itertools
import json
import tempfile
import time

import torch
from baseline_ddp import JOBS, parser
from torch.utils.data import DataLoader

# isort: split
from accelerate import Accelerator
from transformers import Trainer, TrainerCallback, TrainingArguments


class Clock(TrainerCallback):
    """Notes the time at the end of every step."""

    def __init__(self):
        self.at_s = [time.perf_counter()]

    def on_step_end(self, args, state, control, **kwargs):
        self.at_s.append(time.perf_counter())


def with_accelerate(settings):
    accelerator = Accelerator(cpu=True)
    model, dataset, collate, optimizer, _ = JOBS[settings.workload](settings)
    loader = DataLoader(
        dataset, batch_size=settings.batch_size // accelerator.num_processes, shuffle=True, collate_fn=collate,
        num_workers=settings.loader_processes, drop_last=True,
    )  # fmt: skip
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    at_s = [time.perf_counter()]
    while True:
        for images, labels in loader:
            optimizer.zero_grad()
            accelerator.backward(model(images, labels))
            optimizer.step()
            at_s.append(time.perf_counter())
            if len(at_s) > settings.steps:
                return at_s, accelerator.is_main_process


def with_trainer(settings):
    model, dataset, collate, _, clip_norm = JOBS[settings.workload](settings)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, use_cpu=True, max_steps=settings.steps, max_grad_norm=clip_norm, learning_rate=1e-4,
            weight_decay=0.01, lr_scheduler_type="constant", save_strategy="no", logging_strategy="no",
            report_to="none", disable_tqdm=True, dataloader_num_workers=settings.loader_processes, ddp_backend="gloo",
        )  # fmt: skip
        arguments.per_device_train_batch_size = settings.batch_size // arguments.world_size
        trainer = Trainer(model.model, arguments, collate, dataset, callbacks=[clock])
        trainer.train()
    return clock.at_s, trainer.is_world_process_zero()


def main():
    settings = parser().parse_args()
    torch.manual_seed(0)
    at_s, speaks = (with_trainer if settings.workload.startswith("bert") else with_accelerate)(settings)
    if speaks:
        step_s = [b - a for a, b in itertools.pairwise(at_s)]
        print(json.dumps({"step_s": step_s, "threads": torch.get_num_threads()}), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
