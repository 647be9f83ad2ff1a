"""What runs in a Ray Train worker: take a seat, build state and process group, train, hand over the result."""

import contextlib
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orchestrator.coordinator import NAMESPACE, Seat
from orchestrator.errors import OrchestratorError
from orchestrator.events import CheckpointSaved, Evaluated, Event
from orchestrator.plan import Plan
from orchestrator.reporter import Reporter


def train_worker(task: dict[str, Any]) -> None:
    """The train function given to TorchTrainer.

    Args:
        task: "plan", "uri" of the run folder, "coordinator" (actor name), "group_timeout_s", "loopback".

    Errors of ours end the run through the coordinator; others are raised, and Ray Train starts the workers anew.
    """
    import ray
    import ray.train

    coordinator = ray.get_actor(task["coordinator"], namespace=NAMESPACE)
    rank = ray.train.get_context().get_world_rank()
    worker = Worker(task, coordinator, rank)
    try:
        worker.run()
    except OrchestratorError as error:
        ray.get(coordinator.fail.remote(str(error), error.exit_status, traceback.format_exc()))
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        again = ray.get(coordinator.worker_failed.remote(rank, worker.step, text, traceback.format_exc()))
        if again:
            raise


class Worker:
    """One worker of one generation; the loop's observer."""

    def __init__(self, task: dict[str, Any], coordinator: Any, rank: int) -> None:
        self._plan: Plan = task["plan"]
        self._task = task
        self._coordinator = coordinator
        self._rank = rank
        self._stop = False
        self._reporter: Reporter | None = None
        self._state: Any = None

    @property
    def step(self) -> int:
        return self._state.step if self._state is not None else 0

    def run(self) -> None:
        """From the first line to the last."""
        import ray

        device_name = "cuda" if ray.get_gpu_ids() else "cpu"
        node = ray.get_runtime_context().get_node_id()
        seat_ref = self._coordinator.join.remote(self._rank, node, os.getpid(), device_name)
        _prepare_torch(self._plan.config.threads, same_bits=self._plan.config.reduce == "fixed")
        import torch

        from workloads.registry import WORKLOADS

        device = torch.device("cuda", 0) if device_name == "cuda" else torch.device("cpu")
        workload = WORKLOADS[self._plan.workload].build(self._plan.config)
        self._plan = _settle_loader(self._plan, workload)
        self._state = _build_state(self._plan, workload, device)
        seat: Seat | None = ray.get(seat_ref)
        if seat is None:
            return
        self._seat = seat
        with self._connected(device) as group, self._reporting(group.rank):
            self._restore(group)
            self._train(workload, group)

    @contextlib.contextmanager
    def _connected(self, device: Any) -> Iterator[Any]:
        """The generation's process group; rank 0 serves its store."""
        import ray
        from torch import distributed as dist

        from orchestrator.group import Group

        generation, timeout_s = self._seat.generation, self._task["group_timeout_s"]
        host = "127.0.0.1" if self._task["loopback"] else ray.util.get_node_ip_address()
        if self._task["loopback"] and Path("/sys/class/net/lo").exists():
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        world = self._seat.placement.workers
        store: Any = None
        if world > 1 and self._rank == 0:
            listener = socket.create_server((host, 0))
            port = listener.getsockname()[1]
            store = dist.TCPStore(
                host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
            )
            ray.get(self._coordinator.publish_store.remote(generation, host, port))
        elif world > 1:
            host, port = ray.get(self._coordinator.store_address.remote(generation))
            store = dist.TCPStore(host, port, is_master=False)
        group = Group.connect(store, generation, self._rank, world, device, timeout_s)
        try:
            yield group
        finally:
            group.close()

    @contextlib.contextmanager
    def _reporting(self, rank: int) -> Iterator[None]:
        from orchestrator.checkpoint import BackgroundWriter, CheckpointStore
        from orchestrator.storage import Folder

        folder = Folder(self._task["uri"]).child("checkpoints")
        self._checkpoints = CheckpointStore(folder, self._plan.identity(), self._plan.config.keep_checkpoints)
        self._reporter = Reporter(self._coordinator) if rank == 0 else None
        self._writer = BackgroundWriter(self._checkpoints, lambda saved: self._event(CheckpointSaved(**saved)))  # type: ignore[arg-type]
        try:
            yield
        finally:
            if self._reporter:
                self._reporter.close()

    def _event(self, event: Event) -> None:
        if self._reporter:
            self._reporter.event(event)

    def _restore(self, group: Any) -> None:
        """Rank 0 loads the newest whole checkpoint and hands the state to the others."""
        import ray
        import torch

        started = time.perf_counter()
        rejected: list[str] = []
        loaded = self._checkpoints.load_newest(rejected.append) if self._rank == 0 else None
        if loaded:
            self._state.load(loaded.tensors, loaded.step)
        step = torch.tensor(self._state.step, device=group.device)
        group.broadcast(step, 0)
        if self._rank == 0:
            load_s = time.perf_counter() - started
            ray.get(self._coordinator.begin.remote(self._seat.generation, self._state.step, load_s, rejected))
        if step.item():
            self._state.receive(group, int(step.item()))
        self._checkpointed_at = time.monotonic()
        self._stepped_at = time.time()

    def _train(self, workload: Any, group: Any) -> None:
        import ray

        from orchestrator.evaluate import evaluate
        from orchestrator.loop import train
        from orchestrator.state import weights_sha256

        plan, state = self._plan, self._state
        try:
            finished = train(plan, workload, state, group, self._seat.placement, self)
        except OrchestratorError:
            self._checkpoint_now()
            raise
        if self._rank == 0:
            self._coordinator.phase.remote("evaluating and saving")
            self._checkpoint_now()
        metrics: dict[str, float] = {}
        if finished:
            metrics = evaluate(workload, state.model, state.precision, group, plan.config.loader_processes)
            self.evaluated(state.step, metrics)
            if self._rank == 0:
                self._save_model(workload)
        if self._reporter:
            self._reporter.close()
        sha256 = weights_sha256(state.model)
        ray.get(self._coordinator.finish.remote(self._rank, finished, sha256, state.step, metrics))

    def _save_model(self, workload: Any) -> None:
        from orchestrator.runfolder import RunFolder
        from orchestrator.storage import Folder

        with tempfile.TemporaryDirectory() as folder:
            workload.save(self._state.model, Path(folder))
            RunFolder(Folder(self._task["uri"])).save_model(Path(folder))

    def _checkpoint_now(self) -> None:
        if self._rank == 0 and self._state.step > self._writer.newest_step:
            self._writer.submit(self._state.step, self._state.snapshot)
        self._writer.wait()

    def stop_wanted(self) -> bool:
        """See Observer."""
        return bool(self._reporter and self._reporter.stop)

    def committed(self, state: Any, totals: Any, lr: float) -> None:
        """See Observer: rank 0 notes the step and starts a checkpoint when one is due."""
        if self._reporter is None:
            return
        now = time.time()
        self._reporter.step(
            {
                "step": state.step,
                "epoch": self._plan.epoch_of(state.step - 1),
                "loss": totals.loss,
                "lr": lr,
                "samples": totals.samples,
                "samples_per_s": round(totals.samples / max(now - self._stepped_at, 1e-9), 3),
                "step_s": round(now - self._stepped_at, 6),
                "workers": self._seat.placement.workers,
                "generation": self._seat.generation,
                "time_s": round(now, 3),
            }
        )
        every = self._plan.config.checkpoint_every
        due = (every.steps and state.step % every.steps == 0) or (
            every.seconds and time.monotonic() - self._checkpointed_at >= every.seconds
        )
        if due:
            self._checkpointed_at = time.monotonic()
            self._writer.submit(state.step, state.snapshot)
        self._stepped_at = time.time()

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """See Observer."""
        self._event(Evaluated(step, metrics))


def _prepare_torch(threads: int, same_bits: bool) -> None:
    """Threads and, where bits are promised, deterministic kernels; before anything is computed."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch: "Reproducibility", cuBLAS
    import torch

    torch.set_num_threads(threads)
    # torch.use_deterministic_algorithms, without its import of the compiler, a second of every worker's start.
    torch._C._set_deterministic_algorithms(same_bits, warn_only=True)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 costs a pass over memory, changes no result
    torch.backends.cudnn.benchmark = False


def _settle_loader(plan: Plan, workload: Any) -> Plan:
    """The plan with the number of loader processes that suits the data, where it was left open."""
    if plan.config.loader_processes >= 0:
        return plan
    return plan.with_config(loader_processes=max(2, plan.config.threads) if workload.decodes else 0)


def _build_state(plan: Plan, workload: Any, device: Any) -> Any:
    import torch

    from orchestrator.optimizer import build_optimizer
    from orchestrator.precision import Precision
    from orchestrator.shards import derive_seed
    from orchestrator.state import TrainingState

    torch.manual_seed(derive_seed("weights", plan.config.seed))
    model = workload.build_model().to(device)
    return TrainingState(model, build_optimizer(plan.config, model), Precision(plan.config.precision, device.type))
