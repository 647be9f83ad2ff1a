"""Workers on a TPU slice of a cluster, without a run: Ray Train's worker group alone; a JSON line for each slice.

`python slices_driver.py ADDRESS`: a slice of workers starts, one of them is killed, and a slice starts again.
"""

import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import ray
from commands import wait_until
from ray.train import FailureConfig, RunConfig, ScalingConfig

from orchestrator.ray_backend import OwnGroupConfig, Trainer
from orchestrator.seats import NAMESPACE, OVER

WORKERS = 8


class Watch:
    """What the coordinator is to the worker group; notes who has started."""

    def __init__(self) -> None:
        self._over, self._notes = False, list[dict[str, Any]]()

    def is_over(self) -> bool:
        return self._over

    def end(self) -> None:
        self._over = True

    def note(self, worker: dict[str, Any]) -> None:
        self._notes.append(worker)

    def notes(self) -> list[dict[str, Any]]:
        return self._notes


def stay(task: dict[str, Any]) -> str:
    """A worker that says where it is, and stays until the end."""
    from orchestrator.slices import shape_of
    from orchestrator.worker_device import _in_slice

    watch, context = ray.get_actor("watch", namespace=NAMESPACE), ray.get_runtime_context()
    chips = context.get_accelerator_ids()["TPU"]
    environment, name = _in_slice(shape_of("TPU-V4", "2x2x2"), chips)
    ray.get(watch.note.remote({"pid": os.getpid(), "node": context.get_node_id(), "slice": name, **environment}))
    over = threading.Event()
    while not over.wait(0.2) and not ray.get(watch.is_over.remote()):
        continue
    return OVER


def fit(scratch: str) -> None:
    per_worker = {"TPU": 1.0, "CPU": 1.0}
    kind = {"use_tpu": True, "topology": "2x2x2", "accelerator_type": "TPU-V4", "resources_per_worker": per_worker}
    Trainer(
        stay,
        asked_for=0,
        train_loop_config={},
        torch_config=OwnGroupConfig(coordinator="watch", maximum=WORKERS),
        scaling_config=ScalingConfig(num_workers=WORKERS, **kind),
        run_config=RunConfig(storage_path=scratch, name="t", failure_config=FailureConfig(max_failures=3)),
    ).fit()


def main(address: str) -> None:
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"
    ray.init(address=address, log_to_driver=False)
    watch = ray.remote(num_cpus=0)(Watch).options(name="watch", namespace=NAMESPACE).remote()
    started: Callable[[], list[dict[str, Any]]] = lambda: ray.get(watch.notes.remote())  # noqa: E731
    with tempfile.TemporaryDirectory() as scratch:
        trainer = threading.Thread(target=fit, args=(scratch,), daemon=True)
        trainer.start()
        wait_until(lambda: len(started()) == WORKERS, 120, "a slice of workers")
        print(json.dumps(started()), flush=True)
        os.kill(started()[0]["pid"], signal.SIGKILL)
        wait_until(lambda: len(started()) == 2 * WORKERS, 120, "a slice of workers again")
        print(json.dumps(started()[WORKERS:]), flush=True)
        ray.get(watch.end.remote())
        trainer.join(60)
        print(json.dumps(trainer.is_alive()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
