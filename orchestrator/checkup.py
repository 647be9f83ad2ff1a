"""What `orchestrator.doctor` looks at on this machine and on every node of a cluster, and what to do about it."""

import contextlib
import hashlib
import importlib.metadata
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from orchestrator.errors import OrchestratorError, UserError, one_line
from orchestrator.nodewatch import on_node
from orchestrator.storage import Folder, cache_folder

GB = 1e9
FREE_GB = 5.0  # a checkout with its packages takes 2; checkpoints and the cache of data come to it
SKEW_S = 1.0  # times of several machines stand side by side in the logs
PROBE_BYTES = 8_000_000
SENT_BYTES = 32_000_000
SLOW_MB_PER_S = 50.0  # a gigabit link brings about 115
ASKED_S = 60.0
NODES_TIMED = 8


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: ok, warning or problem.
        what: what was found, one line.
        advice: what to do; "" where nothing needs doing.
    """

    level: str
    what: str
    advice: str = ""


def ok(what: str) -> Finding:
    return Finding("ok", what)


def packages(version_of: Callable[[str], str] = importlib.metadata.version) -> Iterator[Finding]:
    """Whether what is installed is what this package asks for."""
    wrong = 0
    try:
        lines = importlib.metadata.requires("elastic-orchestrator") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("warning", "this package runs from its folder; what it needs is not known", "pip install -e .")
        return
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is not None:
            continue  # of an extra
        try:
            found = version_of(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found = ""
        if not found or not requirement.specifier.contains(found, prereleases=True):
            wrong += 1
            has = f"{requirement.name} {found}" if found else f"{requirement.name} is missing"
            yield Finding(
                "problem", f"{has}; {requirement.name}{requirement.specifier} is asked for", "pip install -e ."
            )
    if not wrong:
        yield ok("installed packages are those asked for")


def token(file: Path) -> Finding:
    """Whether others can read the token that lets them run code on the cluster."""
    if not _is_there(file):
        return ok(f"no token yet ({file}); Ray makes one when it first starts a cluster")
    # Ray writes it with the usual mode, which only a closed folder above it makes good.
    reachable = all(folder.stat().st_mode & 0o011 for folder in file.parents)
    if file.stat().st_mode & 0o044 and reachable:
        return Finding("problem", f"{file} can be read by others", f"chmod 600 {file}")
    return ok(f"token: {file}, readable by its owner only")


def space(path: Path, purpose: str) -> Finding:
    """Free disk where `path` is or will be."""
    there = next(p for p in (path, *path.parents) if _is_there(p))
    free = shutil.disk_usage(there).free / GB
    if free < FREE_GB:
        advice = f"free some, or move {purpose} to another disk"
        return Finding("warning", f"{free:.1f} GB free for {purpose} ({path})", advice)
    return ok(f"{free:.0f} GB free for {purpose} ({path})")


def _is_there(path: Path) -> bool:
    """Whether it can be seen; a folder that may not be looked into says neither."""
    try:
        return path.exists()
    except OSError:
        return False


def shared_memory(path: Path = Path("/dev/shm")) -> Finding:
    """Ray's object store lies there."""
    if not path.exists():
        return ok("no /dev/shm: Ray keeps its objects elsewhere")
    size = shutil.disk_usage(path).total / GB
    if size < 1:
        return Finding("warning", f"/dev/shm has {size:.2f} GB; Ray wants more", "in Docker: --shm-size=2g")
    return ok(f"/dev/shm has {size:.0f} GB")


def storage(folder: Folder) -> Finding:
    """Write, read back, compare and delete a file of some megabytes."""
    data, name = os.urandom(PROBE_BYTES), f".doctor-{uuid.uuid4().hex[:8]}"
    try:
        started = time.perf_counter()
        folder.write(name, data)
        written = time.perf_counter()
        same = hashlib.sha256(folder.read(name)).digest() == hashlib.sha256(data).digest()
        read = time.perf_counter()
        folder.delete(name)
    except (OSError, OrchestratorError) as error:
        reason = one_line(error)
        return Finding("problem", f"storage {folder.uri}: {reason}", "check its address, your rights and credentials")
    if not same:
        return Finding("problem", f"storage {folder.uri} gave back other bytes than were written", "do not train on it")
    rates = [PROBE_BYTES / 1e6 / seconds for seconds in (written - started, read - written)]
    return ok(f"storage {folder.uri}: writes {rates[0]:.0f} MB/s, reads {rates[1]:.0f} MB/s")


def here(where: str) -> Iterator[Finding]:
    """This machine, and the storage as it sees it."""
    yield from packages()
    yield token(Path.home() / ".ray" / "auth_token")
    yield shared_memory()
    yield space(cache_folder(), "the cache of data")
    try:
        folder = Folder(where)
    except UserError as error:
        yield Finding("problem", str(error).splitlines()[0], "give a folder or a URI such as s3://bucket/runs")
        return
    if folder.is_local:
        yield space(Path(folder.uri), "runs")
    yield storage(folder)


def versions() -> dict[str, str]:
    """What nodes should have alike, "none" where it is not installed."""
    found = dict.fromkeys(("ray", "torch", "transformers", "pyarrow"), "none")
    for name in found:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def look_at_node(probe: tuple[str, str]) -> dict[str, Any]:
    """Runs on a node.

    Args:
        probe: URI of the storage, and the name of a file that was just written there.
    """
    found: dict[str, Any] = {"now_s": time.time(), "free_gb": shutil.disk_usage("/tmp").free / GB}
    found["versions"] = versions()
    try:
        found["sees_storage"] = Folder(probe[0]).read_text(probe[1]) is not None
    except Exception as error:
        found["sees_storage"], found["storage_error"] = False, one_line(error, 200)
    if os.path.exists("/dev/nvidia0"):
        import torch

        found["gpus"] = torch.cuda.device_count()
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if found["gpus"] else ""
    return found


def judge_node(name: str, found: dict[str, Any], asked: tuple[float, float], mine: dict[str, str]) -> Iterator[Finding]:
    """What a node said of itself.

    Args:
        asked: when it was asked and when it had answered, by this machine's clock.
        mine: this machine's versions.
    """
    other = [f"{package} {v} (here {mine[package]})" for package, v in found["versions"].items() if v != mine[package]]
    if other:
        yield Finding("problem", f"node {name}: {', '.join(other)}", "install the same versions on every node")
    skew_s = max(asked[0] - found["now_s"], found["now_s"] - asked[1], 0.0)
    if skew_s > SKEW_S:
        yield Finding(
            "warning", f"node {name}: its clock is {skew_s:.1f} s off", "run chrony or another NTP client on it"
        )
    if found["free_gb"] < FREE_GB:
        yield Finding("warning", f"node {name}: {found['free_gb']:.1f} GB free in /tmp", "free some")
    if not found["sees_storage"]:
        why = found.get("storage_error", "the file that was written here is not there")
        advice = "use storage that all nodes reach: s3://..., or a shared folder at the same path"
        yield Finding("problem", f"node {name}: storage cannot be read: {why}", advice)
    if found.get("gpus") == 0:
        yield Finding(
            "problem", f"node {name}: has a GPU that torch cannot use", "install a CUDA build of torch and the driver"
        )
    elif found.get("gpus"):
        yield ok(f"node {name}: {found['gpus']} GPUs, NCCL {found['nccl']}")
    if not other and found["sees_storage"] and skew_s <= SKEW_S:
        yield ok(f"node {name}: same versions, its clock agrees, sees the storage")


def on_nodes(where: str) -> Iterator[Finding]:
    """Every node of the connected cluster, and the way to it from the first."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    total = ray.cluster_resources()
    yield ok(f"cluster: {len(alive)} nodes, {total.get('CPU', 0):g} CPUs, {total.get('GPU', 0):g} GPUs")
    mine = versions()
    folder, probe = Folder(where), f".doctor-{uuid.uuid4().hex[:8]}"
    refused = contextlib.suppress(OSError, OrchestratorError)  # `here` has found out why
    with refused:
        folder.write(probe, b"here")
    answered = []
    try:
        for node in alive:
            name, started = node["NodeManagerAddress"], time.time()
            try:
                said = ray.get(on_node(look_at_node, node["NodeID"]).remote((folder.uri, probe)), timeout=ASKED_S)
            except ray.exceptions.RayError as error:
                reason = str(error).splitlines()[-1][:200]
                yield Finding("problem", f"node {name} does not do what it is told: {reason}", "see its raylet's log")
                continue
            answered.append(node)
            yield from judge_node(name, said, (started, time.time()), mine)
    finally:
        with refused:
            folder.delete(probe)
    for node in answered[1:NODES_TIMED]:
        one, other = answered[0]["NodeManagerAddress"], node["NodeManagerAddress"]
        sent = on_node(os.urandom, answered[0]["NodeID"]).remote(SENT_BYTES)
        try:
            ray.wait([sent], fetch_local=False, timeout=ASKED_S)
            seconds = ray.get(on_node(_receive, node["NodeID"]).remote([sent]), timeout=ASKED_S)
        except ray.exceptions.RayError as error:
            said = f"{one} to {other}: {SENT_BYTES / 1e6:g} MB do not arrive ({type(error).__name__})"
            yield Finding("problem", said, "see the network between them, and the raylets' logs")
            continue
        yield judge_link(one, other, seconds)


def _receive(reference: list[Any]) -> float:
    import ray

    started = time.perf_counter()
    ray.get(reference[0])
    return time.perf_counter() - started


def judge_link(one: str, other: str, seconds: float) -> Finding:
    """What came of sending SENT_BYTES between two nodes."""
    rate = SENT_BYTES / 1e6 / seconds
    if rate < SLOW_MB_PER_S:
        return Finding(
            "warning", f"{one} to {other}: {rate:.0f} MB/s", "put workers that share gradients on nearer nodes"
        )
    return ok(f"{one} to {other}: {rate:.0f} MB/s")
