"""The workloads there are: one line each. Nothing heavy is imported before it is asked for."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.config import RunConfig
from workloads.summary import DataSummary


@dataclass(frozen=True)
class Entry:
    """Where a workload's parts are, as "module:attribute"; config and data import neither torch nor ray."""

    title: str
    config: str
    check: str
    absolute: str
    workload: str
    preparation: str
    exporting: str
    predicting: str

    def config_type(self) -> type[RunConfig]:
        loaded: type[RunConfig] = _load(self.config)
        return loaded

    def check_data(self, config: RunConfig) -> DataSummary:
        """Look at the data; raises UserError where training could not use it."""
        check: Callable[[RunConfig], DataSummary] = _load(self.check)
        return check(config)

    def absolute_paths(self, config: RunConfig) -> RunConfig:
        """The same configuration with file paths that hold from any working directory."""
        absolute: Callable[[RunConfig], RunConfig] = _load(self.absolute)
        return absolute(config)

    def build(self, config: RunConfig) -> Any:
        """The workload itself (see workloads.workload.Workload); imports torch."""
        return _load(self.workload)(config)

    def prepare(self, config: RunConfig) -> Any:
        """How the data that the configuration names is prepared (see workloads.preparation.Preparation)."""
        return _load(self.preparation)(config)

    def export(self, config: RunConfig) -> Any:
        """What it says of its trained model (see workloads.exporting.Exporting); imports torch."""
        return _load(self.exporting)(config)

    def predict(self, about: Mapping[str, Any], files: Mapping[str, bytes]) -> Any:
        """How an exported model is asked (see workloads.predicting.Predicting); without torch."""
        return _load(self.predicting)(about, files)


def _load(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


WORKLOADS = {
    "resnet": Entry(
        "image classification: CIFAR-style and ImageNet ResNets",
        "workloads.resnet.config:ResnetConfig",
        "workloads.resnet.data:check",
        "workloads.resnet.data:absolute_paths",
        "workloads.resnet.workload:ResnetWorkload",
        "workloads.resnet.preparing:preparation",
        "workloads.resnet.exporting:ResnetExporting",
        "workloads.resnet.predicting:ResnetPredicting",
    ),
    "bert": Entry(
        "masked-language-model pretraining of BERT",
        "workloads.bert.config:BertConfig",
        "workloads.bert.data:check",
        "workloads.bert.data:absolute_paths",
        "workloads.bert.workload:BertWorkload",
        "workloads.bert.preparing:preparation",
        "workloads.bert.exporting:BertExporting",
        "workloads.bert.predicting:BertPredicting",
    ),
}
