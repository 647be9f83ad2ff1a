"""The command line, with one of the first workers lost when it is given the train function.

`python late_loss_driver.py MARK ARGUMENTS`: the first process that is given it makes the file MARK, and ends.
"""

import os
import sys
from pathlib import Path
from typing import Any

from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker

from orchestrator import run
from orchestrator.command import leave
from orchestrator.worker_group import ElasticWorkerGroup

MARK = sys.argv.pop(1)


class Mortal(RayTrainWorker):  # type: ignore[misc]
    """A worker of Ray Train's."""

    def run_train_fn(self, *arguments: Any) -> None:
        try:
            Path(MARK).touch(exist_ok=False)
        except FileExistsError:
            super().run_train_fn(*arguments)
        else:
            os._exit(9)


if __name__ == "__main__":
    ElasticWorkerGroup._worker_cls = Mortal
    leave(run.main)
