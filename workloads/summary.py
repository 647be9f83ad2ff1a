"""What the driver learns about the data before any worker starts; found without importing torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataSummary:
    """What a look at the data gives.

    Attributes:
        train_samples: samples of the training split.
        heldout_samples: samples of the held-out split.
        description: for people, one line ("digits: 1,437 + 360 grey images 8x8, 10 classes").
        fingerprint: changes when the data changes; a resumed run compares it.
        blocks: training samples of each file, where they are read file by file (orchestrator.blocks).
    """

    train_samples: int
    heldout_samples: int
    description: str
    fingerprint: str
    blocks: tuple[int, ...] = ()
