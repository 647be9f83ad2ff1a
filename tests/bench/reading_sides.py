"""One side of reading.py in a process of its own on one core: samples per second, printed as JSON.

python reading_sides.py {jpeg,pixels,tokens} SIDE FOLDER
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np

WARM_UP = 2  # batches that are not counted
BATCH = {"jpeg": 32, "pixels": 128, "tokens": 64}
LENGTH, MASKED = 128, 0.15
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CORE = min(os.sched_getaffinity(0))


def rate(batches, size):
    """Samples per second of `batches`, of `size` samples each."""
    taken, started = 0, 0.0
    for number, _ in enumerate(batches):
        if number == WARM_UP - 1:
            started = time.perf_counter()
        taken = number + 1
    return (taken - WARM_UP) * size / (time.perf_counter() - started)


def ours(kind, data):
    """As a worker asks for them, without processes that decode ahead."""
    from orchestrator.assembly import assemble
    from orchestrator.blocks import BlockOrder
    from orchestrator.shards import sample_order
    from workloads.registry import WORKLOADS

    name = "bert" if kind == "tokens" else "resnet"
    given = {"data": data, "sequence_length": LENGTH, "mask_rate": MASKED} if kind == "tokens" else {"data": data}
    entry = WORKLOADS[name]
    config = entry.absolute_paths(assemble(entry.config_type(), given))
    summary = entry.check_data(config)
    samples = entry.build(config).samples("train")
    count = len(samples)
    order = BlockOrder(summary.blocks, config.shuffle_window) if summary.blocks else sample_order
    size = BATCH[kind]
    starts = range(0, count - size + 1, size)
    return rate((samples.microbatch(order(0, 0, count, at, at + size), 0) for at in starts), size)


def torchvision_transforms(photos):
    from torchvision import transforms

    if photos:
        first = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
        return transforms.Compose([*first, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    first = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    return transforms.Compose([*first, transforms.ToTensor(), transforms.Normalize(*CIFAR)])


def with_torchvision(kind, folder):
    from torch.utils.data import DataLoader
    from torchvision.datasets import CIFAR10, ImageFolder

    class RandomCifar10(CIFAR10):
        """Its reader, which otherwise insists on the checksums of the published files."""

        def _check_integrity(self):
            return True

        def _load_meta(self):
            self.classes = [str(i) for i in range(10)]

    if kind == "jpeg":
        dataset = ImageFolder(folder / "photos" / "train", torchvision_transforms(True))
    else:
        dataset = RandomCifar10(folder, train=True, transform=torchvision_transforms(False))
    return rate(DataLoader(dataset, BATCH[kind], shuffle=True, drop_last=True), BATCH[kind])


def with_ray_data(folder):
    import ray

    ray.init(num_cpus=1, include_dashboard=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False

    def transform(row):
        import orchestrator.vision_ops  # noqa: F401  in Ray's worker too, before torchvision

        # isort: split
        from PIL import Image

        return {"image": torchvision_transforms(True)(Image.fromarray(row["image"])).numpy()}

    images = ray.data.read_images(str(folder / "photos" / "train"), mode="RGB", shuffle="files")
    batches = images.map(transform).iter_torch_batches(batch_size=BATCH["jpeg"], drop_last=True)
    return rate(batches, BATCH["jpeg"])


def with_datasets(folder):
    from datasets import load_dataset
    from torch.utils.data import DataLoader
    from transformers import DataCollatorForLanguageModeling

    from workloads.bert.config import BertConfig
    from workloads.bert.data import prepare
    from workloads.bert.export import _tokenizer

    prepared = prepare(BertConfig(data=f"parquet:{folder / 'parquet-tokens'}", sequence_length=LENGTH))
    files = [str(file) for file in sorted((folder / "parquet-tokens").glob("train-*.parquet"))]
    dataset = load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "hf"))
    dataset = dataset.rename_column("tokens", "input_ids").with_format("torch")
    collate = DataCollatorForLanguageModeling(_tokenizer(prepared, LENGTH), mlm_probability=MASKED)
    return rate(DataLoader(dataset, BATCH["tokens"], shuffle=True, collate_fn=collate, drop_last=True), BATCH["tokens"])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=list(BATCH))
    parser.add_argument("side")
    parser.add_argument("folder", type=Path)
    settings = parser.parse_args()
    os.sched_setaffinity(0, {CORE})  # and so its processes, if it starts some
    import orchestrator.vision_ops  # noqa: F401  before torchvision: see there

    # isort: split
    import torch

    torch.set_num_threads(1)
    np.random.seed(0)
    data = {
        "folder": f"imagefolder:{settings.folder / 'photos'}",
        "parquet": f"parquet:{settings.folder / f'parquet-{settings.kind}'}",
        "memory": f"cifar10:{settings.folder / 'cifar-10-batches-py'}",
    }
    sides = {
        "torchvision": lambda: with_torchvision(settings.kind, settings.folder),
        "ray data": lambda: with_ray_data(settings.folder),
        "datasets": lambda: with_datasets(settings.folder),
    }
    found = sides[settings.side]() if settings.side in sides else ours(settings.kind, data[settings.side])
    print(json.dumps({"samples_per_s": found, "seconds": time.process_time()}), flush=True)


if __name__ == "__main__":
    main()
