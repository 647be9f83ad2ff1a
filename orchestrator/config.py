"""What a run is made of: typed settings, each a command line flag and a TOML key of the same name.

A setting's help text is the docstring under its field. `result=False` marks the settings that cannot change
the result (workers, placement, cadence): a resumed run takes them as they are given now.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from orchestrator.errors import UserError
from orchestrator.settings import flag, parse_value, setting, settings
from orchestrator.values import Cadence, Pairs, Parallel, Staleness, WorkerRange

C = TypeVar("C", bound="RunConfig")
OPTIMIZERS = ("sgd", "nesterov", "adam", "adamw")
TOGETHER = {"shards", "workers", "batch_size", "steps", "epochs"}  # what check_together looks at side by side


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The settings every workload has; a workload's own configuration extends and re-defaults them."""

    name: str = setting("", result=False)
    """Name of the run and of its folder; the same name on the same storage resumes it. Empty: made from the time."""

    storage: str = setting("", result=False)
    """Where run folders are: a folder or a URI such as s3://bucket/runs. Empty: ./runs; ~/runs in a submitted job."""

    workers: WorkerRange = setting(WorkerRange(1, 8), result=False)
    """Number of workers, N or MIN:MAX; with a range the run takes what the cluster has, grows when there is more and
    waits when fewer than MIN are left. With N it starts with N and goes on with fewer until lost ones are replaced."""

    shards: int = setting(8, low=1, high=65536)
    """Logical shards of each batch, a power of two; at most this many workers can share the work."""

    batch_size: int = setting(64, low=1)
    """Global batch: samples per step over all workers; a multiple of the shards."""

    steps: int | None = setting(None, low=1)
    """Training length in optimizer steps; give this or --epochs."""

    epochs: int | None = setting(None, low=1)
    """Training length in passes over the training split; give this or --steps."""

    seed: int = setting(0, low=0, high=2**63 - 1)
    """Seed of everything random: initial weights, sample order, augmentation, dropout, masking."""

    precision: str = setting("auto", choices=("auto", "fp32", "bf16", "fp16"))
    """Arithmetic of forward and backward; fp16 scales the loss dynamically. auto: what the device is fastest in."""

    data: str = setting("")
    """Training data, as KIND or KIND:PATH."""

    model: str = setting("")
    """Model architecture."""

    optimizer: str = setting("sgd", choices=OPTIMIZERS)
    """Optimizer; nesterov is sgd with Nesterov's momentum."""

    lr: float = setting(0.1, low=0)
    """Peak learning rate, for the whole global batch."""

    momentum: float = setting(0.9, low=0, high=1)
    """Momentum of sgd and nesterov, and beta1 of adam and adamw."""

    beta2: float = setting(0.999, low=0, high=1)
    """Second-moment decay of adam and adamw."""

    weight_decay: float = setting(0.0, low=0)
    """Weight decay: L2 for sgd, nesterov and adam, decoupled for adamw."""

    decay: str = setting("all", choices=("all", "matrices"))
    """What weight decay applies to: all parameters, or matrices only (no biases, no normalization)."""

    clip_norm: float = setting(0.0, low=0)
    """Largest global gradient norm; larger gradients are scaled down to it. 0: no clipping."""

    schedule: str = setting("cosine", choices=("cosine", "step", "linear", "constant"))
    """Learning rate after warm-up: cosine or linear to 0, step (times 0.1 at 1/3, 2/3 and 8/9 of the run), constant."""

    warmup: float = setting(0.0, low=0, high=1)
    """Share of the run in which the learning rate rises linearly from 0."""

    reduce: str = setting("fixed", choices=("fixed", "ddp"))
    """Gradient reduction: fixed (the same bits for any number of workers) or ddp (DistributedDataParallel)."""

    parallel: Parallel = setting(Parallel(), result=False)
    """How the model is held: ddp (whole by every worker), fsdp (its parameters spread over all), hsdp=N (over groups of
    N), tensor=N (layers split among N), pipeline=N (layers dealt out to N). Last bits may differ but with pipeline."""

    pipeline_schedule: str = setting("1f1b", result=False, choices=("gpipe", "1f1b"))
    """Order of a pipeline's microbatches: all forward then all backward (gpipe), or in turns, with less memory."""

    sync: str = setting("allreduce", choices=("allreduce", "parameter-server", "local-sgd", "diloco"))
    """How workers share what they learn: gradients every step (allreduce), through parameter servers, or parameters
    every --local-steps steps: their average (local-sgd), or an outer Nesterov step along it (diloco)."""

    staleness: Staleness = setting(Staleness())
    """Steps by which a microbatch may be ahead of the oldest unfinished one, with --sync parameter-server. 0: workers
    wait for each other, and the result is that of allreduce; above, or inf: it depends on timing."""

    servers: int = setting(2, result=False, low=1, high=1024)
    """Processes that the parameters are spread over, with --sync parameter-server."""

    local_steps: int = setting(8, low=1)
    """Steps that each shard takes alone between two averages, with --sync local-sgd or diloco."""

    outer_lr: float = setting(0.7, low=0)
    """Learning rate of diloco's outer step along the averaged difference; 0.7 in the paper."""

    outer_momentum: float = setting(0.9, low=0, high=1)
    """Nesterov momentum of diloco's outer step; 0.9 in the paper."""

    threads: int = setting(0, low=0, high=1024)
    """CPU threads per worker, which the bits depend on. 0: the CPUs of --resources-per-worker, at least 1."""

    loader_processes: int = setting(-1, result=False, low=-1, high=256)
    """Processes per worker that decode and augment ahead. 0: none, in the training process. -1: by kind of data."""

    shuffle_window: int = setting(16, low=1)
    """Files of prepared data (parquet:URI) whose samples are mixed at a time; data in memory is mixed as a whole."""

    data_cache: float = setting(20.0, result=False, low=0.1)
    """GB of prepared data that a node keeps on its disk, at least two windows; what was not used longest goes."""

    storage_patience: float = setting(60.0, result=False, low=0)
    """Seconds for which storage or data that does not answer is asked again before the run stops."""

    eval_every: float = setting(0.0, result=False, low=0)
    """Epochs, or a part of one (0.25), between evaluations on the held-out split. 0: at the end only."""

    placement: str = setting("pack", result=False, choices=("pack", "spread", "strict-pack", "strict-spread"))
    """How workers are put on nodes: few nodes, many nodes, one node, one node each."""

    node_labels: Pairs = setting(Pairs(), result=False)
    """Only nodes with these labels, k=v,... ; a value may be in(a,b) or !c as in Ray's label selectors."""

    resources_per_worker: Pairs = setting(Pairs(), result=False)
    """What each worker reserves, such as GPU=1,CPU=8 or CPU=0.5. Empty: one GPU where there are GPUs, else CPU=1."""

    checkpoint_every: Cadence = setting(Cadence(seconds=60.0), result=False)
    """Checkpoint cadence: steps (100) or seconds (60s)."""

    keep_checkpoints: int = setting(3, result=False, low=1)
    """How many checkpoints are kept."""

    max_incidents: int = setting(100, result=False, low=0)
    """How many lost workers or nodes a run survives before it stops."""

    stall_limit: float = setting(0.0, result=False, low=0)
    """Seconds without a sign of life or progress until a worker is replaced. 0: 20 steps, at least 5 s (first 300)."""

    balance: str = setting("measured", result=False, choices=("measured", "even"))
    """Shards of each worker: by its measured speed (with --reduce fixed), or as even as can be."""

    address: str = setting("", result=False)
    """Ray cluster to use. Empty: RAY_ADDRESS, else the cluster on this machine, else a new local one."""

    def check_split(self) -> None:
        """Whether this model can be held in the parts of --parallel; raises UserError with one line."""


def build(config_type: type[C], given: Mapping[str, Any]) -> C:
    """The configuration of the given settings over the defaults, checked; raises UserError with one line."""
    config = assemble(config_type, given)
    check_together(config)
    return config


def assemble(config_type: type[C], given: Mapping[str, Any]) -> C:
    """The configuration of the given settings over the defaults, each checked alone; raises UserError.

    Args:
        given: setting name -> flag text or TOML value.
    """
    unknown = [name for name in given if name not in settings(config_type)]
    if unknown:
        close = difflib.get_close_matches(unknown[0], settings(config_type), n=1)
        hint = f"did you mean {close[0]}?" if close else "see --help for all settings"
        raise UserError(f"{unknown[0]}: no such setting; {hint}")
    values = {name: parse_value(config_type, name, raw) for name, raw in given.items()}
    if values.get("steps") and values.get("epochs"):
        raise UserError("--steps and --epochs are both given: give one of them")
    if values.get("steps"):
        values["epochs"] = None
    if values.get("epochs"):
        values["steps"] = None
    config = config_type(**values)
    if "workers" not in values:
        size = max(1, config.parallel.size)
        config = dataclasses.replace(config, workers=WorkerRange(size, max(size, config.shards // size * size)))
    return config


def check_together(config: RunConfig) -> None:
    """What no setting can tell alone; raises UserError with one line."""
    shards, batch, workers = config.shards, config.batch_size, config.workers
    if shards & (shards - 1):
        below = 1 << (shards.bit_length() - 1)
        raise UserError(f"--shards {shards}: not a power of two; use {below} or {2 * below}")
    together = config.parallel.size if config.parallel.kind in ("tensor", "pipeline") else 1  # who share a shard
    if workers.maximum > shards * together:
        enough = 1 << (-(-workers.maximum // together) - 1).bit_length()
        raise UserError(
            f"--workers {workers}: more workers than shards ({shards}); use at most {shards * together} workers, "
            f"or --shards {enough}"
        )
    if batch % shards:
        lower = batch - batch % shards
        allowed = f"{lower} or {lower + shards}" if lower else str(shards)
        raise UserError(f"--batch-size {batch}: {shards} shards do not divide it; use {allowed}, or fewer --shards")
    if not (config.steps or config.epochs):
        raise UserError("--steps, --epochs: neither is given; give one of them")
    _check_pairs(config)
    _check_sync(config)
    _check_parallel(config)


SYNC_SETTINGS = {  # setting -> the values of --sync that it goes with
    "staleness": ("parameter-server",),
    "servers": ("parameter-server",),
    "local_steps": ("local-sgd", "diloco"),
    "outer_lr": ("diloco",),
    "outer_momentum": ("diloco",),
}


def _check_sync(config: RunConfig) -> None:
    """What goes with which --sync."""
    for name, modes in SYNC_SETTINGS.items():
        if config.sync not in modes and getattr(config, name) != settings(type(config))[name].default:
            raise UserError(
                f"{flag(name)} {getattr(config, name)}: does nothing with --sync {config.sync}; "
                f"leave it out, or use --sync {' or '.join(modes)}"
            )
    if config.sync == "allreduce":
        return
    if config.reduce != "fixed":
        raise UserError(f"--reduce {config.reduce}: goes with --sync allreduce; leave it out")
    if config.precision == "fp16":
        raise UserError(f"--precision fp16: --sync {config.sync} does not scale losses; use fp32 or bf16")
    if config.sync == "parameter-server" and config.loader_processes > 0:
        raise UserError(
            f"--loader-processes {config.loader_processes}: --sync parameter-server tells a worker its samples one "
            "microbatch at a time, and reads them itself; leave it out"
        )


def _check_parallel(config: RunConfig) -> None:
    """What goes with a model in parts."""
    parallel, workers, size = config.parallel, config.workers, config.parallel.size
    if parallel.kind != "pipeline" and config.pipeline_schedule != settings(type(config))["pipeline_schedule"].default:
        raise UserError(
            f"--pipeline-schedule {config.pipeline_schedule}: goes with --parallel pipeline=N; leave it out"
        )
    if not parallel.splits:
        return
    for name, allowed in (("sync", "allreduce"), ("reduce", "fixed")):
        if getattr(config, name) != allowed:
            given = f"{flag(name)} {getattr(config, name)}"
            raise UserError(f"{given}: goes with --parallel ddp; with {parallel} use {flag(name)} {allowed}")
    if config.precision == "fp16":
        raise UserError(f"--precision fp16: a loss scale is not split with --parallel {parallel}; use fp32 or bf16")
    if size and (workers.minimum % size or workers.maximum % size):
        lower = max(size, workers.maximum - workers.maximum % size)
        raise UserError(f"--workers {workers}: --parallel {parallel} needs multiples of {size}; use {lower}")
    if parallel.kind == "hsdp" and (size & (size - 1) or size > config.shards):
        raise UserError(f"--parallel {parallel}: N shares {config.shards} shards; use a power of two up to as many")
    config.check_split()


def _check_pairs(config: RunConfig) -> None:
    given = config.resources_per_worker
    try:
        amounts = given.numbers()
    except ValueError as error:
        raise UserError(f"--resources-per-worker {given}: {error}; write such as GPU=1,CPU=8") from None
    if given.items and not any(amounts.values()):
        raise UserError(f"--resources-per-worker {given}: reserves nothing; write such as CPU=1")
    whole = [k for k, v in amounts.items() if v > 1 and v != int(v)]
    if whole:
        raise UserError(f"--resources-per-worker {given}: {whole[0]} above 1 must be a whole number")


def to_toml(config: RunConfig, workload: str) -> str:
    """The complete configuration as TOML; `python -m orchestrator.run WORKLOAD --config` takes it back."""
    lines = [f"workload = {json.dumps(workload)}"]
    for name in settings(type(config)):
        value = getattr(config, name)
        if value is None:
            continue
        plain = value if isinstance(value, int | float | str) else str(value)
        # JSON's scalars are TOML's, but for surrogate pairs and an unescaped DEL.
        lines.append(f"{name} = {json.dumps(plain, ensure_ascii=False)}".replace("\x7f", "\\u007f"))
    return "\n".join(lines) + "\n"
