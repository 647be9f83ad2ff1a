"""The house: who may import whom, and what every file must be. Read with ast; nothing is imported."""

import ast
import functools
import subprocess
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("orchestrator", "workloads", "cluster")
DOWNWARD = {"torch": 2, "torch_xla": 2, "torchvision": 2, "transformers": 2, "ray": 4}
# What a decision cannot have: a clock, the world, chance.
IMPURE = {
    "time",
    "datetime",
    "os",
    "pathlib",
    "io",
    "socket",
    "subprocess",
    "threading",
    "tempfile",
    "shutil",
}
IMPURE |= {
    "random",
    "uuid",
    "secrets",
    "pyarrow",
    "requests",
    "urllib",
    "logging",
    "multiprocessing",
    "asyncio",
}

FLOORS: dict[int, str] = {
    0: "orchestrator orchestrator.errors orchestrator.values orchestrator.digest orchestrator.settings"
    " orchestrator.config orchestrator.assembly workloads workloads.summary cluster",
    1: "orchestrator.layout orchestrator.replicas orchestrator.routes"
    " orchestrator.shards orchestrator.blocks orchestrator.schedule orchestrator.cluster_fit orchestrator.plan"
    " orchestrator.events orchestrator.balance orchestrator.recovery orchestrator.faults orchestrator.seats"
    " orchestrator.meter orchestrator.failure orchestrator.handout orchestrator.served orchestrator.stepbook"
    " orchestrator.accelerators orchestrator.slices orchestrator.sliced orchestrator.incident orchestrator.tally",
    2: "orchestrator.splits orchestrator.precision orchestrator.optimizer orchestrator.batchnorm orchestrator.group"
    " orchestrator.partfiles orchestrator.tree orchestrator.messages orchestrator.sharedmemory orchestrator.collectives"
    " orchestrator.transport orchestrator.reduce orchestrator.state"
    " orchestrator.storage orchestrator.checkpoint orchestrator.runfolder orchestrator.vision_ops"
    " orchestrator.stopwatch orchestrator.sockets orchestrator.channel orchestrator.journal orchestrator.tables"
    " orchestrator.filecache orchestrator.latelogs orchestrator.history orchestrator.exported"
    " orchestrator.logbooks workloads.workload workloads.preparation workloads.exporting workloads.predicting"
    " orchestrator.redact orchestrator.toolchain orchestrator.devices orchestrator.communicators orchestrator.stores"
    " orchestrator.slice_sums",
    3: "orchestrator.feed orchestrator.step orchestrator.evaluate orchestrator.loop orchestrator.build"
    " orchestrator.split_build orchestrator.split_step orchestrator.pipeline orchestrator.pipeline_step"
    " orchestrator.programs orchestrator.int8_static orchestrator.int8_dynamic orchestrator.measured"
    " orchestrator.exporter orchestrator.microbatch orchestrator.server_part orchestrator.rounds"
    " orchestrator.compiled orchestrator.trial orchestrator.wire",
    4: "orchestrator.coordinator orchestrator.membership orchestrator.balancer orchestrator.nodewatch"
    " orchestrator.injector orchestrator.offer orchestrator.worker orchestrator.recorder"
    " orchestrator.prometheus orchestrator.ray_backend orchestrator.ray_policy orchestrator.worker_group"
    " orchestrator.reporter orchestrator.charts orchestrator.spoken orchestrator.liveview orchestrator.checkup"
    " workloads.registry"
    " orchestrator.lastwords orchestrator.server orchestrator.crew orchestrator.crowd orchestrator.keeper"
    " orchestrator.dispatcher orchestrator.served_worker orchestrator.split_worker orchestrator.split_recorder"
    " orchestrator.worker_device orchestrator.slice_rooms orchestrator.scorer",
    5: "orchestrator.command orchestrator.connect orchestrator.launch orchestrator.run orchestrator.rehearse"
    " orchestrator.watch orchestrator.doctor orchestrator.report orchestrator.export orchestrator.predict"
    " orchestrator.prepare orchestrator.resume orchestrator.dry_run orchestrator.progress orchestrator.afterword"
    " orchestrator.track orchestrator.clerk orchestrator.score orchestrator.scoring",
}
FOLDERS = {"workloads.resnet": 3, "workloads.bert": 3, "cluster": 4}  # every module within, whatever its name
LOOP_SIDE = {"orchestrator.feed", "orchestrator.step", "orchestrator.evaluate", "orchestrator.loop"}


def files() -> dict[str, Path]:
    """Module name -> file."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = files()


def floor(module: str) -> int | None:
    for number, names in FLOORS.items():
        if module in names.split():
            return number
    for folder, number in FOLDERS.items():
        if module == folder or module.startswith(folder + "."):
            return number
    return None


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(module: str) -> Iterator[tuple[str, int]]:
    """(imported module, line) of every import statement, also within functions."""
    for node in ast.walk(tree(MODULES[module])):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}:{node.lineno}: relative import; write the whole name"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in MODULES else str(node.module)), node.lineno


def ours(module: str) -> list[tuple[str, int]]:
    return [(name, line) for name, line in imports(module) if name.split(".")[0] in PACKAGES]


every_module = pytest.mark.parametrize("module", sorted(MODULES))


@every_module
def test_every_module_has_a_floor(module):
    assert floor(module) is not None, f"{module} is not in the house: give it a floor in {Path(__file__).name}"


@every_module
def test_imports_go_down(module):
    own = floor(module)
    assert own is not None, f"{module} is not in the house"
    for name, line in ours(module):
        below = floor(name)
        assert below is not None, f"{module}:{line}: {name} is not in the house"
        assert below <= own, f"{module}:{line}: floor {own} imports {name} of floor {below}"


def test_no_import_cycles():
    """Rooms of one floor may use each other, but never in a circle, not even by a late import."""
    graph = {module: {name for name, _ in ours(module)} - {module} for module in MODULES}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_loop_and_workloads_do_not_know_each_other():
    for module in MODULES:
        for name, line in ours(module):
            inside = name.startswith(("workloads.resnet", "workloads.bert"))
            if module in LOOP_SIDE or (module.startswith("orchestrator.") and (floor(module) or 0) < 4):
                assert not inside, f"{module}:{line} imports a workload"
            if module.startswith(("workloads.resnet", "workloads.bert")):
                assert name not in LOOP_SIDE, f"{module}:{line} imports the loop"
                sibling = ".".join(module.split(".")[:2])
                assert not inside or name.startswith(sibling), f"{module}:{line} imports another workload"


@every_module
def test_heavy_libraries_begin_on_their_floor(module):
    for name, line in imports(module):
        lowest = DOWNWARD.get(name.split(".")[0], 0)
        assert (floor(module) or 0) >= lowest, f"{module}:{line}: {name} begins on floor {lowest}"


@pytest.mark.parametrize("module", [m for m in sorted(MODULES) if floor(m) == 1])
def test_decisions_are_pure(module):
    for name, line in imports(module):
        assert name.split(".")[0] not in IMPURE, f"{module}:{line}: a decision imports {name}"
    for node in ast.walk(tree(MODULES[module])):
        called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        assert called not in {"open", "print", "input", "exec", "eval", "__import__"}, (
            f"{module}:{node.lineno}: a decision calls {called}()"
        )
        assert not isinstance(node, ast.Global), f"{module}:{node.lineno}: a decision keeps state"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "np":
            assert node.attr != "random", f"{module}:{node.lineno}: chance comes from derive_seed alone"


def test_floors_are_not_stale():
    """Balance and recovery are on the plan; all else that the map names exists or is a door of the design."""
    planned = {"orchestrator.balance", "orchestrator.report"}
    named = {name for names in FLOORS.values() for name in names.split()}
    assert named - set(MODULES) <= planned


@functools.cache
def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / name for name in sorted(listed.stdout.split()) if (ROOT / name).exists()]


def test_there_are_files_to_check():
    assert len(tracked()) > 40
    assert ROOT / "orchestrator" / "config.py" in tracked()


@pytest.mark.parametrize("path", tracked(), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_is_one_room(path):
    content = path.read_bytes()
    assert content.isascii(), f"{path.name}: not ASCII: {next(c for c in content.decode() if ord(c) > 127)!r}"
    lines = content.count(b"\n")
    assert lines < 300, f"{path.name}: {lines} lines; under 300 is one room"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path.name}:{node.lineno}: bare except"
            silent = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
            assert not silent, f"{path.name}:{node.lineno}: an error is swallowed"
        elif isinstance(node, ast.Name | ast.Attribute):
            word = node.id if isinstance(node, ast.Name) else node.attr
            assert word != "TYPE_CHECKING", f"{path.name}:{node.lineno}: TYPE_CHECKING; move the word down a floor"
