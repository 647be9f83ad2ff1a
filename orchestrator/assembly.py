"""A configuration from what was given: each setting checked alone, then those that belong together."""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.settings import flag, parse_value, settings
from orchestrator.values import WorkerRange

C = TypeVar("C", bound=RunConfig)


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
    _check_compile(config)
    _check_parallel(config)
    check_accelerator(config, config.accelerator)


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


def _check_compile(config: RunConfig) -> None:
    """What --compile goes with."""
    if config.compile and config.reduce != "fixed":
        raise UserError(f"--compile true: goes with --reduce fixed, not {config.reduce}; leave one of them out")
    if config.compile and config.sync == "parameter-server":
        raise UserError("--compile true: goes with --sync allreduce, local-sgd or diloco; leave one of them out")
    if config.compile and config.parallel.splits:
        raise UserError(f"--compile true: goes with --parallel ddp, not {config.parallel}; leave one of them out")


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
    if parallel.kind == "hsdp" and (size & (size - 1) or size > config.shards):
        raise UserError(f"--parallel {parallel}: N shares {config.shards} shards; use a power of two up to as many")
    config.check_split()
    if size and (workers.minimum % size or workers.maximum % size):
        lower = max(size, workers.maximum - workers.maximum % size)
        raise UserError(f"--workers {workers}: --parallel {parallel} needs multiples of {size}; use {lower}")


LEAST_STALL_S = 1.0  # heartbeats come every 0.25 s
# What Ray takes (ray._private.label_utils), which says no when workers are asked for.
LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
LABEL_KEY = re.compile(rf"(?:(?:{LABEL})?(?:\.(?:{LABEL})?)*/)?{LABEL}")
LABEL_RULE = re.compile(rf"!?in\({LABEL}(?:, ?{LABEL})*\)|!?{LABEL}")


def _check_pairs(config: RunConfig) -> None:
    if 0 < config.stall_limit < LEAST_STALL_S:
        raise UserError(
            f"--stall-limit {config.stall_limit:g}: is less than {LEAST_STALL_S:g} s, in which a healthy worker "
            "may not be heard; give more, or 0 to have it follow the steps"
        )
    given = config.resources_per_worker
    try:
        amounts = given.numbers()
    except ValueError as error:
        raise UserError(f"--resources-per-worker {given}: {error}; write such as GPU=1,CPU=8") from None
    if given.items and not any(amounts.values()):
        raise UserError(f"--resources-per-worker {given}: reserves nothing; write such as CPU=1")
    if parts := given.not_whole():
        raise UserError(f"--resources-per-worker {given}: {parts[0]} above 1 must be a whole number")
    for key, rule in config.node_labels.items:
        if not (LABEL_KEY.fullmatch(key) and LABEL_RULE.fullmatch(rule)):
            raise UserError(f"--node-labels {key}={rule}: write such as zone=a, zone=!a, zone=in(a,b) or zone=!in(a,b)")


RESOURCES = {"cuda": "GPU", "tpu": "TPU"}  # of Ray, by --accelerator
ON_TPU = {"sync": "allreduce", "reduce": "fixed", "parallel": "ddp", "compile": "False"}  # what was written for XLA


def check_accelerator(config: RunConfig, kind: str) -> None:
    """What goes with an accelerator, given or found; raises UserError with one line."""
    given, amounts = config.resources_per_worker, config.resources_per_worker.numbers()
    for other, resource in RESOURCES.items():
        mine = other == kind or (
            kind == "auto" and not any(amounts.get(r) for r in set(RESOURCES.values()) - {resource})
        )
        if amounts.get(resource) and not mine:
            clash = f"--accelerator {kind}: " if kind != "auto" else ""
            raise UserError(f"{clash}--resources-per-worker {given}: {resource} goes with --accelerator {other} alone")
    if kind in RESOURCES and amounts.get(RESOURCES[kind], 1.0) == 0.0:
        raise UserError(f"--accelerator {kind}: --resources-per-worker {given} reserves none; leave one of them out")
    # NCCL wants a GPU for each process; a worker has one device.
    shared = config.workers.maximum == 1 or config.sync == "parameter-server"
    if amounts.get("GPU", 1.0) > 1 or not (shared or amounts.get("GPU", 1.0) in (0.0, 1.0)):
        raise UserError(f"--resources-per-worker {given}: a worker trains on one GPU, its own; use GPU=1")
    if amounts.get("TPU", 1.0) not in (0.0, 1.0):
        raise UserError(f"--resources-per-worker {given}: a worker trains on one TPU chip; use TPU=1")
    if kind == "tpu" or amounts.get("TPU"):
        _check_tpu(config)
    elif (config.topology or config.accelerator_type) and kind != "auto":
        name = "topology" if config.topology else "accelerator_type"
        raise UserError(
            f"{flag(name)} {getattr(config, name)}: goes with --accelerator tpu; a model of GPUs is chosen with "
            "--node-labels ray.io/accelerator-type=A100"
        )


def _check_tpu(config: RunConfig) -> None:
    for name, allowed in ON_TPU.items():
        if str(getattr(config, name)) != allowed:
            raise UserError(
                f"{flag(name)} {getattr(config, name)}: is not there for TPUs; use {flag(name)} {allowed.lower()}, or "
                "--accelerator cpu"
            )
    if config.precision == "fp16":
        raise UserError("--precision fp16: TPUs compute in bf16; use --precision bf16 or fp32")
    if config.placement.startswith("strict") or config.node_labels.items:
        name = "placement" if config.placement.startswith("strict") else "node_labels"
        raise UserError(f"{flag(name)} {getattr(config, name)}: on TPUs workers are where their slice is; leave it out")
