"""The house: who may import whom, and what every file must be. Read with ast; nothing is imported."""

import ast
import functools
import re
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


def house() -> dict[str, int]:
    """Module, or package with all within -> floor, from the map in the README.

    A file is `folder/name.py`, `name.py` one of orchestrator/; a folder ends with /.
    """
    found = {"orchestrator": 0, "workloads": 0, "cluster": 0}
    for number, row in re.findall(r"^\| ([0-5]) [^|]*\|(.*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE):
        for word in re.findall(r"`([^`]+)`", row):
            path = word if "/" in word else f"orchestrator/{word}"
            name = path.rstrip("/").removesuffix(".py").replace("/", ".")
            assert name not in found or path.endswith("/"), f"{word} has two floors"
            found[name + ("." if path.endswith("/") else "")] = int(number)
    return found


HOUSE = house()


def floor(module: str) -> int | None:
    folders = [number for name, number in HOUSE.items() if name.endswith(".") and f"{module}.".startswith(name)]
    return HOUSE.get(module, folders[0] if folders else None)


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
    assert floor(module) is not None, f"{module} is not in the house: give it a floor on the map in README.md"


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


def test_the_map_is_not_stale():
    gone = [name for name in HOUSE if name not in MODULES and name.rstrip(".") not in MODULES]
    assert not gone, f"{gone}: on the map in README.md, but there is no such file"
    assert set(HOUSE.values()) == set(range(6))


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
