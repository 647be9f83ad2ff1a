"""Before the first step: torch's settings, the data loader's size, the initial state."""

import os

import torch

from orchestrator.devices import move
from orchestrator.errors import UserError
from orchestrator.feed import get_ready
from orchestrator.optimizer import build_optimizer
from orchestrator.plan import Plan
from orchestrator.precision import Precision
from orchestrator.shards import derive_seed
from orchestrator.state import TrainingState
from workloads.workload import Workload


def prepare_torch(threads: int, same_bits: bool) -> None:
    """Threads and, where bits are promised, deterministic kernels; before anything is computed."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch: "Reproducibility", cuBLAS
    torch.set_num_threads(threads)
    # torch.use_deterministic_algorithms, without its import of the compiler, a second of every worker's start.
    torch._C._set_deterministic_algorithms(same_bits, warn_only=True)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 costs a pass over memory, changes no result
    torch.backends.cudnn.benchmark = False


def check_same_data(plan: Plan, workload: Workload, host: str) -> None:
    """Raises UserError where the data that `host` has is not what the run was begun with."""
    if workload.fingerprint != plan.fingerprint:
        raise UserError(
            f"--data {plan.config.data}: what {host} has is not what the run was begun with; give every node the same, "
            "and leave it as it is during a run"
        )


def settle_loader(plan: Plan, workload: Workload) -> Plan:
    """The plan with the number of loader processes that suits the data, where it was left open; starts their server."""
    if plan.config.loader_processes < 0:
        plan = plan.with_config(loader_processes=max(2, plan.config.threads) if workload.decodes else 0)
    if plan.config.loader_processes:
        get_ready(workload.samples("train"))
    return plan


def build_state(plan: Plan, workload: Workload, device: torch.device) -> TrainingState:
    """Model and optimizer as a new run has them; the same bits in every process."""
    torch.manual_seed(derive_seed("weights", plan.config.seed))
    model = move(workload.build_model(), device)
    return TrainingState(model, build_optimizer(plan.config, model), Precision(plan.config.precision, device.type))
