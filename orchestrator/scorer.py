"""A worker of orchestrator.score: a Ray actor with a trained model, which sums over chunks of the held-out split."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname
from typing import Any

import torch
from numpy.typing import NDArray

from orchestrator.build import prepare_torch
from orchestrator.config import RunConfig
from orchestrator.errors import OrchestratorError, UserError
from orchestrator.evaluate import sums_of, totals
from orchestrator.exported import ONNX
from orchestrator.measured import load_trained, onnx_model
from orchestrator.precision import Precision
from workloads.registry import WORKLOADS


@dataclass(frozen=True)
class Task:
    """What is evaluated, on what.

    Attributes:
        workload: its name.
        config: of the run that trained the model.
        data: as --data.
        about: what the workload says of its model (workloads.exporting.Exporting.about).
        weights_sha256: of the trained weights; "": the model is an exported one, run by onnxruntime.
        threads: CPU threads.
        fingerprint: of the data, as the command has found it.
    """

    workload: str
    config: RunConfig
    data: str
    about: dict[str, Any]
    weights_sha256: str
    threads: int
    fingerprint: str


def put(files: dict[str, bytes], folder: Path) -> Path:
    """Write files into a folder, which is returned."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


class Scorer:
    """See the module. One call at a time."""

    def __init__(self, task: Task) -> None:
        prepare_torch(task.threads, same_bits=True)
        self._task = task

    def begin(self, files: dict[str, bytes]) -> tuple[str, int]:
        """Open model and data; returns (node, process id).

        Args:
            files: of the model, by name.

        Raises:
            UserError: the model is damaged, or the data cannot be read here, or is other data; `node` tells where.
        """
        import ray

        node = ray.get_runtime_context().get_node_id()

        self._device = torch.device("cuda", 0) if ray.get_gpu_ids() else torch.device("cpu")
        # Not until the end: the actor is killed, and nothing would delete them.
        with tempfile.TemporaryDirectory(prefix="orchestrator-score-") as folder:
            try:
                self._open(put(files, Path(folder)))
            except OrchestratorError as error:
                error.node = node  # type: ignore[attr-defined]
                raise
        return node, os.getpid()

    def _open(self, folder: Path) -> None:
        """Read all of the folder that is needed."""
        task = self._task
        exporting = WORKLOADS[task.workload].export(task.config)
        config = exporting.settings_for(task.data, task.about, folder)
        self._workload = exporting.workload_for(config, task.about)
        if self._workload.fingerprint != task.fingerprint:
            has = f"what {gethostname()} has is not what the command has"
            raise UserError(f"--data {task.data}: {has}; give every node the same")
        self._samples = self._workload.samples("heldout")
        if task.weights_sha256:
            model, kind = load_trained(exporting, folder, task.weights_sha256), task.config.precision
        else:
            model, kind = onnx_model(folder / ONNX, exporting.inputs, task.threads), "fp32"
        self._model = model.to(self._device)
        self._precision = Precision(kind, self._device.type)

    def sums(self, chunks: range) -> tuple[tuple[str, ...], NDArray[Any]]:
        """(names, rows [chunks, names]); see sums_of. Raises DataError: a sample cannot be read."""
        names, rows = sums_of(self._workload, self._model, self._precision, self._samples, chunks, 0, self._device)
        return tuple(names), rows.cpu().numpy()

    def metrics(self, names: tuple[str, ...], rows: NDArray[Any]) -> dict[str, float]:
        """The workload's metrics from the rows of all chunks, as at the end of training."""
        found: dict[str, float] = self._workload.metrics(totals(names, torch.tensor(rows)))
        return found
