"""Makes `import torchvision` work beside a torch it was not built for; import this before torchvision.

The registry's torchvision is a CUDA build: under a CPU-only torch its compiled operators do not load, and its
Python part stops at "operator torchvision::nms does not exist". Only the schemas of two operators are missed.
"""

import importlib.util
from pathlib import Path

import torch

MISSED_OPERATORS = ("nms", "qnms")  # what torchvision/_meta_registrations.py looks up while it is imported
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def _operators_exist() -> bool:
    return all(hasattr(torch.ops.torchvision, name) for name in MISSED_OPERATORS)


def _load_compiled_operators() -> bool:
    spec = importlib.util.find_spec("torchvision")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for library in sorted(Path(folder).glob("_C*.so")):
            try:
                torch.ops.load_library(str(library))
            except (OSError, ImportError):
                continue  # built for another torch: the schemas below stand in
            return True
    return False


# Kept for the life of the process: a Library takes its definitions back when it is collected.
_library: torch.library.Library | None = None
if not _operators_exist() and not _load_compiled_operators():
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for _name in MISSED_OPERATORS:
        _library.define(_name + SCHEMA)
