"""From given settings to settled ones: names, paths, "auto", and what a resumed run was started with."""

import dataclasses
import os
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from orchestrator.accelerators import Accelerator, decide
from orchestrator.assembly import assemble, check_together
from orchestrator.cluster_fit import Node, Offer, choose_workers
from orchestrator.config import RunConfig
from orchestrator.errors import UserError
from orchestrator.runfolder import CONFIG, RunFolder
from orchestrator.settings import flag, settings
from orchestrator.slices import choose_slices, whole_range
from orchestrator.uris import local_path

C = TypeVar("C", bound=RunConfig)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def resolve(config: C) -> C:
    """The same settings with name and storage settled."""
    name = config.name or f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
    if not NAME.fullmatch(name):
        raise UserError(f"--name {name}: use letters, digits, '.', '_' and '-', at most 100, a letter or digit first")
    storage = config.storage or default_storage()
    if in_package():
        check_absolute("--storage", storage, "s3://bucket/runs")
    return dataclasses.replace(config, name=name, storage=local_path(storage, "--storage") or storage)


def in_package() -> bool:
    """Whether this is a submitted job in the folder that was sent with it, which Ray deletes after it."""
    return bool(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")) and "_ray_pkg_" in os.getcwd()


def check_absolute(flag: str, uri: str, example: str) -> None:
    """Refuse a relative folder of a submitted job, which Ray deletes after it."""
    if "://" not in uri and uri[0] not in "/~":
        raise UserError(
            f"{flag} {uri}: a submitted job's folder is deleted after it; give an absolute path or {example}"
        )


def default_storage() -> str:
    """./runs; in a submitted job ~/runs, for a job's working directory is deleted after it."""
    return "~/runs" if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") else "runs"


def settle_threads(config: C) -> C:
    """The same settings with the threads that the bits depend on."""
    cpus = config.resources_per_worker.numbers().get("CPU", 1.0)
    return dataclasses.replace(config, threads=config.threads or max(1, int(cpus)))


def settle_arithmetic(config: C, gpu: bool) -> C:
    """The same settings with threads, and with the precision where workers cannot measure it.

    The precision may stay "auto", which the first workers settle (recorder.py). Parameter servers are started with the
    same plan, --compile comes before workers meet, and a part of a model is not tried alone: with these it is bf16 on
    GPUs, and fp32 elsewhere.
    """
    precision = config.precision
    if precision == "auto" and (config.compile or config.parallel.splits or config.sync == "parameter-server"):
        precision = "bf16" if gpu else "fp32"
    return dataclasses.replace(settle_threads(config), precision=precision)


def settle_accelerator(config: C, nodes: Sequence[Node], offer: Offer | None) -> tuple[C, Accelerator]:
    """The same settings with what the cluster's nodes decide, and the decision; raises UserError."""
    found = decide(config, nodes, offer)
    settled = dataclasses.replace(config, accelerator=found.kind)
    if found.shape:
        kind, size = found.shape.accelerator_type, found.shape.topology
        whole = whole_range(config, found.shape)
        settled = dataclasses.replace(settled, accelerator_type=kind, topology=size, workers=whole)
    return settle_arithmetic(settled, gpu=found.kind == "cuda"), found


def choose(config: RunConfig, found: Accelerator, nodes: Sequence[Node], offer: Offer | None) -> int:
    """How many workers to start, of settled settings; see choose_workers."""
    if found.shape:
        return choose_slices(config, found.shape, nodes, offer)
    return choose_workers(config, found.per_worker, nodes, offer)


def fewer(config: RunConfig, workers: int) -> int:
    """About half as many workers to start with, in whole groups, and at least the minimum."""
    size = max(1, config.parallel.size)
    half = workers // 2
    return max(min(workers, config.workers.minimum), half - half % size)


def take_up(config: C, given: Mapping[str, Any], folder: RunFolder, workload: str) -> C:
    """The configuration to train with: as given for a new run, as stored for a resumed one.

    A resumed run takes what cannot change the result as it is given now, and keeps what was not given.

    Raises:
        UserError: a given setting would change the result of the run in `folder`.
    """
    stored = folder.config()
    if stored is None:
        if there := folder.remains():
            raise UserError(
                f"--name {config.name}: {folder.uri} has {there} and no {CONFIG}, so that it is of something else; use "
                "another --name"
            )
        check_together(config)
        return settle_threads(config)
    was = stored.pop("workload", "something else")
    if was != workload:
        raise UserError(f"--name {config.name}: is a run of {was} in {folder.uri}; use another --name")
    known = {name: value for name, value in stored.items() if name in settings(type(config))}
    old = assemble(type(config), known)
    fields = settings(type(config))
    for name in given:
        automatic = (name == "threads" and not config.threads) or (
            name in ("precision", "accelerator") and getattr(config, name) == "auto"
        )
        # Nothing has been computed before it is settled, which is when the command has seen the cluster.
        automatic |= name == "accelerator" and old.accelerator == "auto"
        if fields[name].metadata["result"] and not automatic and getattr(old, name) != getattr(config, name):
            was = getattr(old, name)
            if was is None and name in ("steps", "epochs"):  # it has the other one
                was = f"--steps {old.steps}" if name == "epochs" else f"--epochs {old.epochs}"
            raise UserError(
                f"{flag(name)} {getattr(config, name)}: run {config.name} was started with {was}, and "
                "another value changes its result; leave it out, or use another --name"
            )
    taken = {name: getattr(config, name) for name in given if not fields[name].metadata["result"]}
    if old.accelerator == "auto":
        taken["accelerator"] = config.accelerator
    taken |= {"name": config.name, "storage": config.storage}
    if "workers" not in given and "workers" not in known:
        taken["workers"] = config.workers
    if "parallel" in given and "pipeline_schedule" not in given and config.parallel.kind != "pipeline":
        taken["pipeline_schedule"] = config.pipeline_schedule  # the stored one goes with a pipeline alone
    resumed = dataclasses.replace(old, **taken)
    check_together(resumed)
    return resumed
