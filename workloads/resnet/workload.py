"""Image classification as the training loop sees it: cross-entropy as sums, accuracy, saving."""

import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from workloads.resnet import data, models, prepared
from workloads.resnet.airbench import WHITENING_IMAGES, AirbenchNet
from workloads.resnet.augment import Augmentation, normalize
from workloads.resnet.config import RESIZE_RATIO, ResnetConfig
from workloads.resnet.folder import decode, without_ends
from workloads.resnet.readers import ImageSet, Split
from workloads.resnet.vision import v2
from workloads.workload import Batch, Piece, Sums

# m = microbatch, C = channels, H, W = height and width, K = classes
TOP5 = 5
WHITENING_PART = 100  # images at a time: 5,000 of 224x224 pixels would take 24 GB as patches


class ImageSamples:
    """One split: random access to augmented (training) or plain (held-out) normalized images."""

    def __init__(self, images: ImageSet, split: Split, config: ResnetConfig) -> None:
        self.images, self.labels = images.images, images.labels
        self.seed, self._train, self._patience_s = config.seed, split == "train", config.storage_patience
        kind = data.kind(config)
        self.mean, self.std, self._photos = kind.mean, kind.std, kind.photos
        self.size = data.image_size(config, images)
        self.modules = ("workloads.resnet.workload", "orchestrator.vision_ops", "torchvision.transforms.v2")
        self.augmentation = Augmentation(data.augment_name(config) if split == "train" else "none", self.size)

    def __len__(self) -> int:
        return len(self.images)

    def microbatch(self, indices: NDArray[np.int64], epoch: int, progress: float = 1.0) -> Batch:
        """{"images": float32 [m, C, H, W], "labels": int64 [m]}; raises DataError naming a file."""
        loaded, labels = self._loaded(indices, epoch)
        augmented = [
            self.augmentation(image, self.seed, epoch, int(index)) for image, index in zip(loaded, indices, strict=True)
        ]
        images_mCHW = normalize(torch.stack(augmented), self.mean, self.std)
        return {"images": images_mCHW, "labels": torch.from_numpy(labels)}

    def _loaded(self, indices: NDArray[np.int64], epoch: int) -> tuple[Iterable[Tensor], NDArray[np.int64]]:
        """m images, ready for the augmentation, and their labels."""
        if isinstance(self.images, np.ndarray):
            return self._in_memory(self.images, indices), self.labels[indices]
        if isinstance(self.images, list):
            return map(self._decoded, [self.images[index] for index in indices]), self.labels[indices]
        if self._train:
            self.images.fetch_ahead(self.seed, epoch, int(indices[0]))
        rows = prepared.rows(self.images, indices)
        images = (self._decoded(encoded, name) for encoded, _, name in rows)
        return images, np.asarray([label for _, label, _ in rows], np.int64)

    def _in_memory(self, images_NHWC: NDArray[np.uint8], indices: NDArray[np.int64]) -> Iterable[Tensor]:
        """uint8 [m, C, H, W], ready for the augmentation."""
        images_mCHW = torch.from_numpy(images_NHWC[indices]).permute(0, 3, 1, 2).contiguous()
        # resized-crop-flip brings its result to size itself, from the full resolution.
        if images_mCHW.shape[2:] != (self.size, self.size) and not self.augmentation.resizes:
            # One by one: an image's bits must not depend on its neighbours in a vectorized loop.
            resized = [v2().functional.resize(image, [self.size, self.size], antialias=True) for image in images_mCHW]
            images_mCHW = torch.stack(resized)
        return self.augmentation.pad(images_mCHW)

    def _decoded(self, source: str | bytes, name: str = "") -> Tensor:
        """An image uint8 [C, H, W], ready for the augmentation; of any size if that resizes."""
        image = decode(source, name, "RGB" if len(self.mean) == 3 else "L", self._patience_s)
        resizes = self.augmentation.resizes
        if self._photos and not resizes:
            image = v2().functional.resize(without_ends(image), [round(self.size * RESIZE_RATIO)], antialias=True)
            image = v2().functional.center_crop(image, [self.size])
        tensor: Tensor = v2().functional.pil_to_tensor(image)
        if tensor.shape[1:] != (self.size, self.size) and not resizes:
            tensor = v2().functional.resize(tensor, [self.size, self.size], antialias=True)
        return self.augmentation.pad(tensor)


class ResnetWorkload:
    """The protocol of workloads/workload.py for images; the data is opened when it is first asked for."""

    def __init__(self, config: ResnetConfig) -> None:
        self.config = config
        self._opened: dict[Split, ImageSet] = {}
        self._samples: dict[Split, ImageSamples] = {}

    def _open(self, split: Split) -> ImageSet:
        if split not in self._opened:
            self._opened[split] = data.open_split(self.config, split)
        return self._opened[split]

    @property
    def decodes(self) -> bool:
        """Image files are decoded sample by sample; the other kinds lie in memory."""
        return data.kind(self.config).decodes

    @property
    def fingerprint(self) -> str:
        """Of pixels and labels; of image files their names and sizes."""
        return data.fingerprint(self.config, [self._open("train"), self._open("heldout")])

    @functools.cached_property
    def _description(self) -> dict[str, Any]:
        """What config.json holds: everything needed to build the model and feed it."""
        heldout = self._open("heldout")
        kind = data.kind(self.config)
        return {
            "model": self.config.model,
            "classes": len(heldout.class_names),
            "class_names": list(heldout.class_names),
            "channels": len(kind.mean),
            "image_size": data.image_size(self.config, heldout),
            "mean": list(kind.mean),
            "std": list(kind.std),
        }

    def build_model(self) -> nn.Module:
        """A new model; initial weights from torch's global generator, a whitening layer's from training images."""
        model = _build(self._description)
        if isinstance(model, AirbenchNet):
            plain = ImageSamples(self._open("train"), "heldout", self.config)
            first = np.arange(min(WHITENING_IMAGES, len(plain)))
            parts = (first[start : start + WHITENING_PART] for start in range(0, len(first), WHITENING_PART))
            model.whiten_by(plain.microbatch(part, 0)["images"] for part in parts)
        return model

    def samples(self, split: Split) -> ImageSamples:
        """The training split, augmented, or the held-out split as it is."""
        if split not in self._samples:
            self._samples[split] = ImageSamples(self._open(split), split, self.config)
        return self._samples[split]

    @property
    def varying_inputs(self) -> tuple[int, ...]:
        """None: images alone."""
        return ()

    @property
    def turning_points(self) -> tuple[float, ...]:
        """None: images keep their size."""
        return ()

    def nominal_count(self, samples: int) -> float:
        """Every image counts once."""
        return samples

    def sums(self, model: nn.Module, batch: Batch) -> Sums:
        """Cross-entropy and correct answers summed over the microbatch; label smoothing in training only."""
        return self.finish(model(batch["images"]), batch, model.training)

    def finish(self, logits_mK: Tensor, batch: Batch, training: bool) -> Sums:
        """See sums."""
        labels_m, logits_mK = batch["labels"], logits_mK.float()
        smoothing = self.config.label_smoothing if training else 0.0
        loss = F.cross_entropy(logits_mK, labels_m, reduction="sum", label_smoothing=smoothing)
        logits_mK = logits_mK.detach()
        others = {"correct": (logits_mK.argmax(dim=1) == labels_m).sum()}
        if _reports_top5(logits_mK.shape[1]):
            hits_m5 = logits_mK.topk(TOP5, dim=1).indices == labels_m[:, None]
            others["correct_top5"] = hits_m5.sum()
        # torch.tensor would wait for a GPU.
        return Sums(loss, torch.full((), len(labels_m), device=labels_m.device), others)

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The residual blocks."""
        return models.blocks(model)

    @property
    def pieces_read(self) -> bool:
        """Images go in at the front."""
        return False

    def pieces(self, model: nn.Module) -> list[Piece]:
        """Stem, residual blocks, classifier."""
        return models.pieces(model)

    def tensor_plan(self, model: nn.Module, part: int, parts: int) -> dict[str, Any]:
        """Refused where the run's settings are checked."""
        raise NotImplementedError("convolutions are not split within a layer")

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """accuracy and top5_accuracy (beyond 10 classes) as shares of 1; cross_entropy as a mean."""
        count = totals["count"]
        values = {"accuracy": totals["correct"] / count, "cross_entropy": totals["loss"] / count}
        if "correct_top5" in totals:
            values["top5_accuracy"] = totals["correct_top5"] / count
        return values

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write model.safetensors and config.json into `folder`; `load` reads them back."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self._description, indent=2) + "\n")


def load(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model that `ResnetWorkload.save` wrote, in evaluation mode, and its config.json."""
    description: dict[str, Any] = json.loads((folder / "config.json").read_text())
    model = _build(description)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval(), description


def _build(description: Mapping[str, Any]) -> nn.Module:
    return models.build(
        description["model"], description["classes"], description["channels"], description["image_size"]
    )


def _reports_top5(classes: int) -> bool:
    return classes > 10  # of ten classes, five guesses say little
