"""The protocol between `orchestrator.prepare` and a workload: a source in parts, each made into tables by itself."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from orchestrator.errors import UserError

Part = dict[str, Any]  # plain JSON: what a part is made from


def changed(source: str) -> UserError:
    """What to raise where a part's samples are not there, or are others than its maker has seen."""
    where = f"changed while it was prepared, or is different on node {platform.node()}"
    return UserError(f"--source {source}: {where}; run the same command again")


@dataclass(frozen=True)
class Made:
    """One part, prepared.

    Attributes:
        tables: split -> pyarrow.Table; splits that get nothing are left out.
        broken: names of what could not be read.
        notes: plain JSON that `Preparation.folded` gets.
    """

    tables: Mapping[str, Any]
    broken: Sequence[str] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)


class Preparation(Protocol):
    """How a workload's source becomes tables. Picklable; parts are made on any node, each a pure function.

    Attributes:
        compression: of its Parquet files, as pyarrow names it.
    """

    @property
    def compression(self) -> str: ...

    def parts(self, file_bytes: int) -> Sequence[Part]:
        """The source in parts that give files of about `file_bytes`; raises UserError where there is none."""
        ...

    def things(self) -> int:
        """How many things (images, documents) of the source may be broken; 0: none can be."""
        ...

    def more(self) -> str:
        """What to do where a split gets no samples, such as "give more images"."""
        ...

    def make(self, part: Part) -> Made:
        """One part; on whatever node. Raises `changed` where its source is not what `parts` has seen."""
        ...

    def folded(self, sofar: Any, notes: Mapping[str, Any]) -> Any:
        """What the notes of all parts come to, one after the other in any order; `sofar` is None at first."""
        ...

    def about(self, folded: Any) -> dict[str, Any]:
        """What goes into the manifest for the workload, from the notes of all parts."""
        ...

    def run_flags(self) -> Sequence[str]:
        """What a run on this data has to be given besides --data, each flag and value a word."""
        ...
