"""torchvision, imported when it is first needed: it takes 1.5 s of processor time, and small runs do without."""

import importlib
from typing import Any


def v2() -> Any:
    """torchvision.transforms.v2."""
    return _torchvision("torchvision.transforms.v2")


def imagenet_family() -> Any:
    """torchvision.models.resnet."""
    return _torchvision("torchvision.models.resnet")


def _torchvision(module: str) -> Any:
    # First what defines the operators that torchvision's import needs.
    importlib.import_module("orchestrator.vision_ops")
    return importlib.import_module(module)
