"""The protocol between `orchestrator.predict` and a workload; no torch, and nothing of training."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

TOP = 5  # guesses that are shown

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Guesses:
    """What a model says to one question, most probable first.

    Attributes:
        question: what was asked ("image.png"; "[MASK] 1").
        names, shares: the guesses and their probabilities.
    """

    question: str
    names: tuple[str, ...]
    shares: tuple[float, ...]


class Predicting(Protocol):
    """One input made ready, and the output read; built from (about, files), see workloads.exporting.

    `about` is what `Exporting.about` gave, `files` the contents of `Exporting.files` by name.
    """

    def inputs(self, given: str) -> Arrays:
        """The model's inputs for what the user gave; raises UserError where that cannot be used."""
        ...

    def answers(self, output: NDArray[np.float32]) -> list[Guesses]:
        """What the output for the last inputs says."""
        ...

    def closing(self, answers: list[Guesses]) -> str:
        """A last line for people, or ""."""
        ...


def top(question: str, logits: NDArray[np.float32], names: list[str]) -> Guesses:
    """The TOP most probable of `names` by `logits` [len(names)]."""
    weights = np.exp(logits - logits.max(), dtype=np.float64)
    order = np.argsort(-weights, kind="stable")[:TOP]
    shares = weights / weights.sum()
    return Guesses(question, tuple(names[i] for i in order), tuple(float(shares[i]) for i in order))
