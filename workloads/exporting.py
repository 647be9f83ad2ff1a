"""The protocol between `orchestrator.export` and a workload: its trained model, as something to export and measure."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from orchestrator.config import RunConfig
from workloads.workload import Batch, Workload


class Exporting(Protocol):
    """What a workload says of its trained model; built from the settings of its run.

    Attributes:
        inputs: the keys of a batch that the model's forward takes, in its order; the names of the exported inputs.
        axes: for each input its free dimensions by number, each with a name: {0: "batch"}.
        output: name of the exported output.
        accuracy: the metric (a share of 1) whose loss by int8 is limited.
        shown: the metrics in the table.
        refused: quantization -> why this workload has none, and what to use.
        files: of model/, what the predictor reads.
        asked: what a user gives the predictor, as on the command line.
    """

    inputs: tuple[str, ...]
    axes: tuple[Mapping[int, str], ...]
    output: str
    accuracy: str
    shown: tuple[str, ...]
    refused: Mapping[str, str]
    files: tuple[str, ...]
    asked: str

    def load(self, folder: Path) -> nn.Module:
        """The model that `Workload.save` wrote, fp32, in evaluation mode.

        Raises:
            OSError, ValueError, KeyError, RuntimeError, SafetensorError: files are missing or damaged.
        """
        ...

    def example(self, batch: Batch) -> tuple[Tensor, ...]:
        """The model's inputs for a batch of several samples, such that no free dimension has a special size."""
        ...

    def about(self, config: Any, folder: Path) -> dict[str, Any]:
        """Plain JSON that the predictor gets: sizes, labels, how an input is prepared."""
        ...

    def settings_for(self, data: str, about: Mapping[str, Any], folder: Path) -> RunConfig:
        """The run's settings with `data` in the place of its own, made ready as the model knows it.

        Args:
            about: what `about` gave.
            folder: of the model, or with `files`.

        Raises:
            UserError: the model cannot be evaluated on this data; names what does not fit.
        """
        ...

    def workload_for(self, config: RunConfig, about: Mapping[str, Any]) -> Workload:
        """The workload of `settings_for`; its held-out samples have the model's labels and normalization."""
        ...
