"""An exported model's folder: its files, and how they are opened; neither torch nor ray is imported.

export.json    what it is, what its predictor needs, how it was measured; written last
model.onnx     what `orchestrator.predict` runs
model.pt2      the same as a torch.export program
"""

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.errors import UserError, one_line
from orchestrator.storage import Folder

ABOUT, ONNX, PROGRAM = "export.json", "model.onnx", "model.pt2"
FORMAT = 1
ONNX_LIMIT_BYTES = 1_900_000_000  # protobuf ends at 2 GiB; beyond, the weights lie beside model.onnx
PACKAGES = ("onnx", "onnxruntime", "onnxscript", "torchao")


def need(*packages: str) -> None:
    """Raises UserError, with what to install, where one of the optional packages is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: not installed; type: pip install 'elastic-orchestrator[export]' "
            "(in a checkout: pip install -e '.[export]')"
        )


def open_session(model: str | bytes, threads: int) -> Any:
    """An onnxruntime session on the CPU, of a file or of its contents.

    Args:
        threads: that compute one operator; operators are computed one after the other.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class Exported:
    """An exported model, opened.

    Attributes:
        uri: of its folder.
        record: export.json.
    """

    uri: str
    record: dict[str, Any]
    _folder: Folder
    _session: Any

    def file(self, name: str) -> bytes:
        """The contents of a file beside the model; raises UserError where it is missing."""
        return read_file(self._folder, name)

    def run(self, inputs: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        """The model's output for its inputs by name."""
        output: NDArray[np.float32] = self._session.run([self.record["output"]], inputs)[0]
        return output


def open_exported(uri: str, threads: int) -> Exported:
    """An exported model's folder, local or a URI; raises UserError where it cannot be used."""
    need("onnxruntime")
    folder, record = read_record(uri)
    return Exported(uri, record, folder, _open(folder, record, threads))


def record_in(folder: Folder) -> str | None:
    """An exported model's export.json; None: it is not there, "": it is no text. UserError: it cannot be read."""
    try:
        return folder.read_text(ABOUT)
    except ValueError:
        return ""
    except OSError as error:
        raise UserError(f"{folder.uri}/{ABOUT}: cannot be read ({one_line(error)}); give one that can") from None


def read_record(uri: str) -> tuple[Folder, dict[str, Any]]:
    """An exported model's folder, and its export.json; raises UserError where it cannot be used."""
    folder = Folder(uri, "MODEL")
    text = record_in(folder)
    if text is None:
        given = "give the folder that python -m orchestrator.export runs/NAME has made, runs/NAME/export/none"
        raise UserError(f"{uri}: no exported model is there (no {ABOUT}); {given}")
    try:
        record = json.loads(text)
        whole = {"workload", "output", "about", "files", "external_data"} <= set(record) and record["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{uri}/{ABOUT}: cannot be used by this version; export the run again")
    return folder, record


@contextlib.contextmanager
def loading(named: str) -> Iterator[None]:
    """Something that reads the model of a run; raises UserError where its files are damaged."""
    try:
        yield
    except Exception as error:  # of JSON, safetensors or torch: the files are not what a run has written
        reason = one_line(error, 200)
        raise UserError(f"{named} cannot be loaded ({reason}); train again under another --name") from None


def _open(folder: Folder, record: dict[str, Any], threads: int) -> Any:
    if record["external_data"] and not folder.is_local:
        raise UserError(f"{folder.uri}: a model over 2 GB is opened from a local disk; copy the folder to one")
    # Bytes where that is possible: storage need not be a file system.
    model: str | bytes = folder.path(ONNX) if record["external_data"] else read_file(folder, ONNX)
    try:
        return open_session(model, threads)
    except Exception as error:  # onnxruntime's have no common base
        reason = one_line(error, 200)
        raise UserError(f"{folder.uri}/{ONNX}: cannot be opened ({reason}); export the run again") from None


def read_file(folder: Folder, name: str) -> bytes:
    """A file of an exported model; raises UserError where it cannot be read."""
    try:
        return folder.read(name)
    except OSError as error:
        raise UserError(f"{folder.uri}/{name}: cannot be read ({error}); export the run again") from None
