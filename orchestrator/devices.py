"""The device that a worker computes on: a CPU, its GPU, or its TPU chip through torch_xla (imported where needed)."""

import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from orchestrator.digest import digest

CPUINFO = Path("/proc/cpuinfo")
# By these oneDNN, MKL and ATen choose kernels: of CPUs with AVX512, those with AMX have other products in bf16.
CHOOSING = {"vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU part", "Features"}
# Variables of oneDNN, MKL, cuBLAS and OpenMP; ATen's own is in what it says of the CPU.
CHOSEN_BY = (
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_DYNAMIC",
    "OMP_THREAD_LIMIT",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
)
VECTOR = re.compile(r"sse|avx|amx|fma|f16c|asimd|sve|sme|bf16|i8mm|fphp")


def cuda_index(ids: Sequence[str], visible: str | None) -> int:
    """The number that CUDA gives to the first GPU that Ray gave to this process.

    Args:
        ids: Ray's, of this process's GPUs.
        visible: CUDA_VISIBLE_DEVICES, by which CUDA numbers them: one GPU, or all that a node's workers share.

    Raises:
        RuntimeError: the GPU is not among them.
    """
    if not ids:
        raise RuntimeError("Ray gave this worker no GPU")
    if visible is None:  # RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES: Ray's numbers are CUDA's
        return int(ids[0])
    shown = visible.split(",")
    if ids[0] not in shown:
        raise RuntimeError(f"CUDA_VISIBLE_DEVICES={visible} hides GPU {ids[0]}, which Ray gave to this worker")
    return shown.index(ids[0])


# ProcessGroupNCCL of torch 2.13. Its watchdog would end this process for another one's death (ASYNC_ERROR_HANDLING),
# after a pause for a dump that the next group would wait for (WAIT_TIMEOUT_DUMP_MILSEC), or because of a mark that an
# earlier generation left in the store (DUMP_ON_TIMEOUT). Here the coordinator decides, and Group.abort acts.
NCCL = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "1",
}


def take_cuda(ids: Sequence[str], environment: Mapping[str, str]) -> torch.device:
    """This process's GPU, made the current one; raises RuntimeError where torch cannot use it."""
    index = cuda_index(ids, environment.get("CUDA_VISIBLE_DEVICES"))
    if not torch.cuda.is_available():
        raise RuntimeError("a GPU that torch cannot use: install a CUDA build of torch and the driver on every node")
    os.environ.update(NCCL)
    device = torch.device("cuda", index)
    # NCCL's collectives of objects and the thread that pins memory take the current one.
    torch.cuda.set_device(device)
    return device


def take_xla(environment: Mapping[str, str], chips: int) -> tuple[torch.device, int]:
    """This process's TPU chip, and its number in the slice.

    Args:
        environment: slices.chip_environment's; it replaces what the host was told, but for the user's PJRT_DEVICE.
        chips: of its slice.

    Raises:
        RuntimeError: torch_xla is missing, or does not go with this torch.
    """
    # Ray's, for a worker that is alone on its chip: libtpu would see no others.
    for stale in ("TPU_CHIPS_PER_HOST_BOUNDS", "TPU_HOST_BOUNDS"):
        os.environ.pop(stale, None)
    os.environ.update({**environment, "PJRT_DEVICE": os.environ.get("PJRT_DEVICE", "TPU")})
    try:
        import torch_xla
        import torch_xla.core.xla_model as xm
        import torch_xla.runtime as xr
    except (ImportError, OSError) as error:
        raise RuntimeError(f"torch_xla cannot be used: {error}") from error
    device: torch.device = torch_xla.device()
    if chips > 1:
        xm.set_replication(device, xm.get_xla_supported_devices())  # as torch_xla's pjrt.initialize_multiprocess
    return device, xr.global_ordinal()


def move(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on the device; parameters that are one stay one, which torch does not see to with XLA's."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    model = model.to(device)
    if device.type == "xla":
        for (first, known_as), *others in places.values():
            for module, name in others:
                setattr(module, name, getattr(first, known_as))
    return model


def machine(device: torch.device) -> str:
    """What bits depend on beside the kind of device: the model of a GPU or TPU, the vector units of a CPU."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    if device.type == "xla":
        import torch_xla.runtime as xr

        return f"{xr.device_type()} {os.environ.get('TPU_ACCELERATOR_TYPE', '')}".strip()
    return ", ".join(filter(None, (torch.backends.cpu.get_cpu_capability(), cpu())))


@functools.cache
def cpu(flags: re.Pattern[str] = VECTOR) -> str:
    """A CPU's name and a digest of what kernels are chosen by; "" where the kernel does not tell.

    Args:
        flags: those that count.
    """
    if not CPUINFO.exists():
        return ""
    lines = [line.partition(":") for line in CPUINFO.read_text().split("\n\n")[0].splitlines()]
    told = {name.strip(): value.strip() for name, _, value in lines}
    chosen = {name: told[name] for name in sorted(CHOOSING & told.keys())}
    for name in {"flags", "Features"} & chosen.keys():
        chosen[name] = " ".join(sorted(flag for flag in chosen[name].split() if flags.search(flag)))
    return " ".join(filter(None, (told.get("model name", ""), digest(chosen)[:6])))


def chosen() -> list[str]:
    """What this process's variables say of kernels."""
    return [f"{name}={os.environ[name]}" for name in CHOSEN_BY if os.environ.get(name)]


def kind_of(device: torch.device) -> str:
    """What a run's record calls a device: with what chooses its kernels, as torch's version does."""
    kind = "tpu" if device.type == "xla" else device.type
    return ", ".join([kind, machine(device), *chosen(), f"torch {torch.__version__}"])


def seed(device: torch.device, number: int) -> None:
    """Seed what draws random numbers in a forward pass."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(number)  # torch.manual_seed formats the stack for devices not in use: 1 ms
    else:
        torch.manual_seed(number)
    if device.type == "xla":
        import torch_xla

        torch_xla.manual_seed(number % 2**63, str(device))


def compute_now(device: torch.device) -> None:
    """XLA collects operations: have those so far compiled and computed, as one graph."""
    if device.type == "xla":
        import torch_xla

        torch_xla.sync()


def finish(device: torch.device) -> None:
    """Wait until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    elif device.type == "xla":
        import torch_xla

        torch_xla.sync(wait=True)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on the device; a GPU copies what is pinned while the host goes on."""
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")


def host_of(device: torch.device) -> torch.device:
    """Where small sums of a worker lie: with its device, or on the host where the device has no fp64 and no gloo."""
    return torch.device("cpu") if device.type == "xla" else device
