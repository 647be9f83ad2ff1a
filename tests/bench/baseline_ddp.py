"""Baseline: the script that an ordinary user writes for torchrun, plain DistributedDataParallel, no tricks.

    PYTHONPATH=. OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 tests/bench/baseline_ddp.py resnet18 \
        --data FOLDER/cifar-10-batches-py --batch-size 128 --steps 15
    ... tests/bench/baseline_ddp.py bert-mini --vocab-size 2048 --head full

resnet18: torchvision's network with the 3x3 stem, its CIFAR10 dataset and transforms, SGD with momentum.
resnet50: torchvision's network, its ImageFolder and the usual transforms to 224x224 (--data is the image folder).
bert-mini, bert-base: transformers' BertForMaskedLM (4 layers, width 256; 12 layers, width 768) and its
DataCollatorForLanguageModeling, AdamW, gradient norm clipped to 1; `--head full` is model(input_ids, labels=labels),
logits at every place; `--head masked` computes the head at masked places only, as our workload does. The tokenised
text is ours, so that both sides read the same.
Prints one JSON line: the seconds of each step on rank 0, from the end of one optimizer step to the next.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import orchestrator.vision_ops  # noqa: F401  before torchvision and transformers: see there

# isort: split
import torchvision
from torchvision import transforms
from transformers import BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from workloads.bert import config as ours
from workloads.bert.data import prepare


class RandomCifar10(torchvision.datasets.CIFAR10):
    """torchvision's reader, which otherwise insists on the checksums of the published files."""

    def _check_integrity(self):
        return True

    def _load_meta(self):
        self.classes = [str(i) for i in range(10)]


class Sequences(Dataset):
    """Tokenised sequences with the mask of special tokens that the collator asks for."""

    def __init__(self, tokens, special_ids):
        self.tokens, self.special = tokens, np.isin(tokens, special_ids).astype(np.int64)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        tokens = torch.from_numpy(self.tokens[index].astype(np.int64))
        return {"input_ids": tokens, "special_tokens_mask": torch.from_numpy(self.special[index])}


class ResnetLoss(nn.Module):
    def __init__(self, name="resnet18"):
        super().__init__()
        self.model = getattr(torchvision.models, name)(num_classes=10)
        if name == "resnet18":
            self.model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            self.model.maxpool = nn.Identity()

    def forward(self, images, labels):
        return F.cross_entropy(self.model(images), labels, label_smoothing=0.1)


class BertLoss(nn.Module):
    def __init__(self, size, vocab_size, pad_id, length, head):
        super().__init__()
        self.head = head
        self.model = BertForMaskedLM(
            BertConfig(
                vocab_size=vocab_size, hidden_size=size[0], num_hidden_layers=size[1], num_attention_heads=size[2],
                intermediate_size=4 * size[0], max_position_embeddings=length, pad_token_id=pad_id,
            )
        )  # fmt: skip

    def forward(self, input_ids, labels):
        if self.head == "full":
            return self.model(input_ids=input_ids, labels=labels).loss
        hidden = self.model.bert(input_ids=input_ids).last_hidden_state
        masked = labels != -100
        return F.cross_entropy(self.model.cls(hidden[masked]), labels[masked])


def resnet18(settings):
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    augment = transforms.Compose([
        transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize(mean, std),
    ])  # fmt: skip
    dataset = RandomCifar10(settings.data.parent, train=True, transform=augment)
    model = ResnetLoss()
    return model, dataset, None, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4), 0.0


def resnet50(settings):
    augment = transforms.Compose([
        transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    dataset = torchvision.datasets.ImageFolder(settings.data / "train", augment)
    model = ResnetLoss("resnet50")
    return model, dataset, None, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4), 0.0


def bert_mini(settings):
    return bert(settings, "mini")


def bert_base(settings):
    return bert(settings, "base")


def bert(settings, size):
    prepared = prepare(
        ours.BertConfig(model="mini", vocab_size=settings.vocab_size, sequence_length=settings.sequence_length)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(write_tokenizer(prepared.tokenizer_json)), mask_token="[MASK]", pad_token="[PAD]",
        cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]",
    )  # fmt: skip
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=settings.mask_rate)
    shape = (ours.SIZES[size], len(prepared.vocabulary), tokenizer.pad_token_id, settings.sequence_length)
    model = BertLoss(*shape, settings.head)
    dataset = Sequences(prepared.train, list(prepared.vocabulary.special_ids))
    return model, dataset, collate, torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01), 1.0


def write_tokenizer(text):
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / f"tokenizer-{os.getpid()}.json"
    file.write_text(text, encoding="utf-8")
    return file


def inputs(batch):
    return (batch["input_ids"], batch["labels"]) if hasattr(batch, "keys") else batch


JOBS = {"resnet18": resnet18, "resnet50": resnet50, "bert-mini": bert_mini, "bert-base": bert_base}


def train(settings):
    model, dataset, collate, optimizer, clip_norm = JOBS[settings.workload](settings)
    sampler = DistributedSampler(dataset)
    loader = DataLoader(
        dataset, batch_size=settings.batch_size // dist.get_world_size(), sampler=sampler, collate_fn=collate,
        num_workers=settings.loader_processes, drop_last=True,
    )  # fmt: skip
    ddp = DistributedDataParallel(model)
    ddp.train()
    step_s, epoch = [], 0
    started = time.perf_counter()
    while True:
        sampler.set_epoch(epoch)
        for batch in loader:
            optimizer.zero_grad()
            ddp(*inputs(batch)).backward()
            if clip_norm:
                nn.utils.clip_grad_norm_(ddp.parameters(), clip_norm)
            optimizer.step()
            now = time.perf_counter()
            step_s.append(now - started)
            started = now
            if len(step_s) == settings.steps:
                return step_s
        epoch += 1


def parser():
    made = argparse.ArgumentParser()
    made.add_argument("workload", choices=tuple(JOBS))
    made.add_argument("--data", type=Path, help="cifar-10-batches-py; resnet50: an image folder")
    made.add_argument("--batch-size", type=int, default=128, help="global")
    made.add_argument("--steps", type=int, default=15)
    made.add_argument("--loader-processes", type=int, default=0)
    made.add_argument("--vocab-size", type=int, default=2048)
    made.add_argument("--sequence-length", type=int, default=128)
    made.add_argument("--mask-rate", type=float, default=0.15)
    made.add_argument("--head", choices=("full", "masked"), default="full")
    return made


def main():
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    step_s = train(parser().parse_args())
    if dist.get_rank() == 0:
        print(json.dumps({"step_s": step_s, "threads": torch.get_num_threads()}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
