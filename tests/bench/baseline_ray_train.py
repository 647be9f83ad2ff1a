"""Baseline: Ray Train as its documentation writes it ("Get Started with Distributed Training using PyTorch").

    PYTHONPATH=. python tests/bench/baseline_ray_train.py resnet --steps 2
    PYTHONPATH=. python tests/bench/baseline_ray_train.py bert --steps 2

Imports at the top, TorchTrainer with two workers, prepare_model, prepare_data_loader. Model, data and batch are those
of our command line's defaults (the prepared arrays and the model builders are ours), so that start-up alone differs.
Prints one JSON line: when the first step was committed, in seconds since 1970.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import ray.train
import ray.train.torch
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from orchestrator import vision_ops  # before torchvision and transformers: see there

# isort: split
import torchvision  # noqa: F401  an ordinary vision script imports it at the top
import transformers  # its classes by attribute: only the workers import what they use of it

from workloads.bert.config import BertConfig
from workloads.bert.data import prepare
from workloads.resnet import data as images
from workloads.resnet import models
from workloads.resnet.config import ResnetConfig

WORKERS = 2


class Sequences(Dataset):
    """Tokenised sequences with the mask of special tokens that the collator asks for."""

    def __init__(self, tokens, special_ids):
        self.tokens, self.special = tokens, np.isin(tokens, special_ids).astype(np.int64)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        tokens = torch.from_numpy(self.tokens[index].astype(np.int64))
        return {"input_ids": tokens, "special_tokens_mask": torch.from_numpy(self.special[index])}


def resnet():
    """Model, data loader, optimizer and loss of digits."""
    config = ResnetConfig()
    kind, digits = images.kind(config), images.open_split(config, "train")
    pixels = torch.from_numpy(digits.images).permute(0, 3, 1, 2).float() / 255
    dataset = TensorDataset((pixels - kind.mean[0]) / kind.std[0], torch.from_numpy(digits.labels))
    model = models.build(config.model, len(digits.class_names), 1, images.image_size(config, digits))
    loader = DataLoader(dataset, batch_size=config.batch_size // WORKERS, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)
    return model, loader, optimizer, lambda net, batch: F.cross_entropy(net(batch[0]), batch[1])


def bert_model():
    """Model, data loader, optimizer and loss of BERT on the documentation."""
    config = BertConfig()
    prepared = prepare(config)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(prepared.tokenizer_json)
        file.flush()
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=file.name, mask_token="[MASK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
            unk_token="[UNK]",
        )  # fmt: skip
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=config.mask_rate)
    size = config.architecture()
    model = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=len(prepared.vocabulary), hidden_size=size.hidden_size, num_hidden_layers=size.layers,
            num_attention_heads=size.heads, intermediate_size=size.intermediate_size,
            max_position_embeddings=config.sequence_length, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    dataset = Sequences(prepared.train, list(prepared.vocabulary.special_ids))
    loader = DataLoader(dataset, batch_size=config.batch_size // WORKERS, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    return model, loader, optimizer, lambda net, batch: net(input_ids=batch["input_ids"], labels=batch["labels"]).loss


def train_func(config):
    assert vision_ops  # the first name of this function, so the first that a worker imports: see above
    model, loader, optimizer, loss_of = {"resnet": resnet, "bert": bert_model}[config["workload"]]()
    model = ray.train.torch.prepare_model(model)
    loader = ray.train.torch.prepare_data_loader(loader)
    if ray.train.get_context().get_world_size() > 1:
        loader.sampler.set_epoch(0)
    for step, batch in enumerate(loader, start=1):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        if step == 1 and ray.train.get_context().get_world_rank() == 0:
            Path(config["first_step_file"]).write_text(repr(time.time()))
        if step == config["steps"]:
            break
    ray.train.report({"loss": loss.item()})


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("workload", choices=("resnet", "bert"))
    parser.add_argument("--steps", type=int, default=2)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("RAY_TMPDIR")) as folder:
        first_step_file = Path(folder) / "first_step"
        trainer = TorchTrainer(
            train_func,
            train_loop_config={**vars(settings), "first_step_file": str(first_step_file)},
            scaling_config=ScalingConfig(num_workers=WORKERS, use_gpu=False),
            run_config=RunConfig(storage_path=folder),
        )
        trainer.fit()
        print(json.dumps({"first_step_s": float(first_step_file.read_text())}), flush=True)


if __name__ == "__main__":
    main()
