"""The command line, with some of the first workers lost when they are given the train function.

`python late_loss_driver.py FILE TIMES ARGUMENTS`: a process that is given it adds a byte to FILE and ends, while that
has fewer than TIMES.
"""

import fcntl
import os
import sys
from pathlib import Path
from typing import Any

from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker

from orchestrator import run
from orchestrator.command import leave
from orchestrator.worker_group import ElasticWorkerGroup

FILE, TIMES = sys.argv.pop(1), int(sys.argv.pop(1))


class Mortal(RayTrainWorker):  # type: ignore[misc]
    """A worker of Ray Train's."""

    def run_train_fn(self, *arguments: Any) -> Any:
        with Path(FILE).open("ab") as lost:
            fcntl.flock(lost, fcntl.LOCK_EX)
            if os.fstat(lost.fileno()).st_size >= TIMES:
                return super().run_train_fn(*arguments)
            lost.write(b".")
        os._exit(9)


if __name__ == "__main__":
    ElasticWorkerGroup._worker_cls = Mortal
    leave(run.main)
