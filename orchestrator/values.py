"""Values that are written as one word on the command line: 1:8, 60s, GPU=1,CPU=8."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Self


@dataclass(frozen=True)
class WorkerRange:
    """How many workers a run may have: from `minimum` to `maximum`, both included."""

    minimum: int
    maximum: int

    @classmethod
    def parse(cls, text: str) -> Self:
        match = re.fullmatch(r"(\d+)(?::(\d+))?", text.strip())
        if not match:
            raise ValueError("write N or MIN:MAX, whole numbers from 1")
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high:
            raise ValueError("the minimum exceeds the maximum; write MIN:MAX")
        if low < 1:
            raise ValueError("at least 1 worker is needed")
        return cls(low, high)

    @property
    def floor(self) -> int:
        """Workers without which a run waits: MIN of MIN:MAX. With N it starts with N and goes on with any number."""
        return 1 if self.minimum == self.maximum else self.minimum

    def __str__(self) -> str:
        return str(self.minimum) if self.minimum == self.maximum else f"{self.minimum}:{self.maximum}"


@dataclass(frozen=True)
class Staleness:
    """How many steps a microbatch may be ahead of the oldest unfinished one; `math.inf`: any number."""

    steps: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Self:
        word = text.strip()
        if word != "inf" and not re.fullmatch(r"\d{1,9}", word):
            raise ValueError("write a number of steps from 0, or inf")
        return cls(float(word))

    def __str__(self) -> str:
        return "inf" if math.isinf(self.steps) else str(int(self.steps))


@dataclass(frozen=True)
class Parallel:
    """How a model is held: whole by every worker (ddp), or in parts by replica groups of `size` workers.

    Attributes:
        kind: ddp, fsdp, hsdp, tensor or pipeline.
        size: workers of a replica group; 1 for ddp, 0 for fsdp: all there are.
    """

    kind: str = "ddp"
    size: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        match = re.fullmatch(r"(ddp|fsdp)|(hsdp|tensor|pipeline)=(\d{1,4})", text.strip())
        if not match or (match[3] and int(match[3]) < 2):
            raise ValueError("write ddp, fsdp, hsdp=N, tensor=N or pipeline=N, N from 2")
        return cls(match[1], 1 if match[1] == "ddp" else 0) if match[1] else cls(match[2], int(match[3]))

    @property
    def splits(self) -> bool:
        """Whether a worker holds only a part of the model."""
        return self.kind != "ddp"

    @property
    def exact(self) -> bool:
        """Whether the bits are those of one worker, whatever the model and the number of workers."""
        return self.kind in ("ddp", "pipeline")

    def __str__(self) -> str:
        return self.kind if self.size < 2 else f"{self.kind}={self.size}"


@dataclass(frozen=True)
class Cadence:
    """How often something happens: every `steps` steps, or every `seconds` seconds; the other is 0."""

    steps: int = 0
    seconds: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Self:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(s?)", text.strip())
        if not match or float(match[1]) <= 0 or (not match[2] and "." in match[1]):
            raise ValueError("write a number of steps (100) or of seconds (60s), above 0")
        return cls(seconds=float(match[1])) if match[2] else cls(steps=int(match[1]))

    def __str__(self) -> str:
        return f"{Decimal(repr(self.seconds)):f}s" if self.seconds else str(self.steps)


Figures = Mapping[str, float]  # by name
NO: Figures = {}


def keep_largest(known: dict[str, float], new: Figures) -> None:
    """Leave the larger of each figure in `known`."""
    known |= {name: max(known.get(name, 0), count) for name, count in new.items()}


@dataclass(frozen=True)
class Pairs:
    """KEY=VALUE pairs separated by commas, such as GPU=1,CPU=8; empty means none."""

    items: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        parts = re.split(r",(?![^()]*\))", text)  # a comma in parentheses belongs to the value: zone=in(a,b)
        pairs = [part.partition("=") for part in parts if part.strip()]
        if any(not (key.strip() and equals and value.strip()) for key, equals, value in pairs):
            raise ValueError("write KEY=VALUE pairs separated by commas, such as GPU=1,CPU=8")
        keys = [key.strip() for key, _, _ in pairs]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"{twice[0]} is there twice; of several labels one is meant by {twice[0]}=in(a,b)")
        # Ray takes in(a, b) and compares with " b".
        return cls(tuple((key.strip(), re.sub(r",\s+", ",", value.strip())) for key, _, value in pairs))

    def numbers(self) -> dict[str, float]:
        """The pairs as amounts; raises ValueError where a value is not a number above or equal to 0."""
        amounts = {key: float(value) for key, value in self.items}
        if any(not 0 <= amount < float("inf") for amount in amounts.values()):
            raise ValueError("amounts are numbers from 0")
        return amounts

    def not_whole(self) -> list[str]:
        """Names of amounts above 1 that are no whole numbers, which Ray does not take; raises as `numbers`."""
        return [name for name, amount in self.numbers().items() if amount > 1 and amount != int(amount)]

    def __str__(self) -> str:
        return ",".join(f"{key}={value}" for key, value in self.items)


LOGGERS = ("tensorboard", "mlflow", "wandb")


@dataclass(frozen=True)
class Loggers:
    """Where a run is logged besides its folder, separated by commas; empty means nowhere."""

    names: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        words = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
        if odd := [word for word in words if word not in LOGGERS]:
            raise ValueError(f"{odd[0]} is not known; write some of {', '.join(LOGGERS)}, separated by commas")
        return cls(words)

    def __str__(self) -> str:
        return ",".join(self.names)
