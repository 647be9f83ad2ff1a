"""A state in parts as files, in the format of torch's distributed checkpoint: torch plans, we keep the bytes.

Each worker of a replica group makes one file of what it holds (`__PART_0.distcp`), and the first one `.metadata`, which
says where each piece of each tensor is. A reader takes what it needs, however it is cut: `fill` reads into whole
tensors, and into pieces of another split, alike. torch's own FileSystemReader reads a local folder of these files too.
"""

import enum
import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from orchestrator.group import Group

METADATA = ".metadata"
Described = dict[str, tuple[torch.Size, torch.dtype]]  # tensors by name
# What torch puts into METADATA. It is a pickle: nothing else is called, whoever wrote it.
ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {
        "Size",
        *(str(dtype).removeprefix("torch.") for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)),
    },
}


class _Kept(io.BytesIO):
    """What was written stays when it is closed."""

    content = b""

    def close(self) -> None:
        if not self.closed:
            self.content = self.getvalue()
        super().close()


class _Files(FileSystemBase):
    """What torch takes for a file system: names and bytes.

    Attributes:
        made: what was written, by name.
    """

    def __init__(self, read: Callable[[str], bytes] | None = None) -> None:
        self.made: dict[str, bytes] = {}
        self._read = read

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        if mode == "rb":
            assert self._read is not None
            yield io.BytesIO(self._read(str(path)))
            return
        with _Kept() as stream:
            yield stream
        self.made[str(path)] = stream.content

    def concat_path(self, path: Any, suffix: str) -> str:
        return suffix  # names stand alone

    def init_path(self, path: Any) -> str:
        return str(path)

    def rename(self, path: Any, new_path: Any) -> None:
        self.made[str(new_path)] = self.made.pop(str(path))

    def mkdir(self, path: Any) -> None: ...

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def exists(self, path: Any) -> bool:
        return str(path) in self.made

    def rm_file(self, path: Any) -> None:
        del self.made[str(path)]


def stage(named: Mapping[str, Tensor], group: Group) -> dict[str, bytes]:
    """This worker's files by name, made in memory; every worker of the replica group calls it, with what it holds.

    What several workers hold alike is in the file of one of them.

    Args:
        named: own tensors; DTensors where a tensor is spread over workers.

    Raises:
        RuntimeError: a worker is lost, or cannot make its file.
    """
    files = _Files()
    writer: Any = dcp.FileSystemWriter("", sync_files=False)
    writer.fs, writer.path = files, ""
    try:
        with group.others_wait():
            dcp.save(dict(named), storage_writer=writer, process_group=group.process_group)
    except CheckpointException as error:  # torch makes it a BaseException
        raise RuntimeError(f"a part of the checkpoint cannot be made: {error}") from error
    return files.made


def _member(kind: Any, name: str) -> enum.Enum:
    """A member of an enumeration, which CPython 3.11.0 to 3.11.3 pickle as getattr(kind, name)."""
    if isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"{name} of {kind} does not belong there")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong there")
        return super().find_class(module, name)


def parse(metadata: bytes) -> Metadata:
    """The content of METADATA; raises pickle.UnpicklingError where there is something else in it."""
    return cast(Metadata, _Unpickler(io.BytesIO(metadata)).load())


def described(metadata: Metadata) -> Described:
    """The tensors of a whole state."""
    kept = metadata.state_dict_metadata.items()
    return {name: (t.size, t.properties.dtype) for name, t in kept if isinstance(t, TensorStorageMetadata)}


def fill(named: dict[str, Tensor], metadata: Metadata, read: Callable[[str], bytes]) -> None:
    """Overwrite tensors, whole or pieces, with what the files have of them; alone, nothing is sent.

    Args:
        named: some of `described`; DTensors where only a piece is wanted.
        read: gives a file's bytes by name; each file that is needed is asked for once.

    Raises:
        RuntimeError, ValueError: torch's own, where names or shapes differ; and what `read` raises.
    """
    reader: Any = dcp.FileSystemReader("")
    reader.fs, planner = _Files(read), dcp.DefaultLoadPlanner()
    planner.set_up_planner(named, metadata, True)
    reader.set_up_storage_reader(metadata, True)
    reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()
