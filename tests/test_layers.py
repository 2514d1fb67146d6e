"""Imports run one way, and what must start at once imports nothing heavy."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "ssdtune"

# Each layer may import those below it, and every leaf. Modules of one layer may import each other.
LAYERS: tuple[frozenset[str], ...] = tuple(
    map(
        frozenset,
        (
            ["__main__", "quickstart"],  # entry points beside each other
            ["cli"],
            ["generate", "replay", "planning", "tracing", "doctor", "pace", "probe", "pack"],
            ["jobs", "opened", "machines", "fidelity"],
            ["trainer"],
            ["api", "profiles"],
            ["packing"],
            ["peft", "zeroth_order", "full"],
            ["visit"],
            ["swap"],
            ["schedule", "kernels"],
        ),
    )
)
LEAVES = frozenset(
    {"cache", "cores", "errors", "sizes", "durable", "memory", "run_files", "hardware", ""}
)  # "": the package itself
CONFIG = frozenset({"config", "keys", "settings", "strict_yaml", "foreign_keys"})
ASIDE = {  # besides itself and the leaves, what each of these may import
    "errors": frozenset[str](),
    "config": CONFIG,
    "data": frozenset[str](),
    "report": frozenset[str](),
    "assets": frozenset[str](),
}
USERS = CONFIG | {"data", "report", "assets"}  # for layers that know of users
KNOW_OF_USERS = frozenset().union(*LAYERS[:8])  # everything above the visits
HEAVY = frozenset({"torch", "transformers", "numpy", "datasets", "peft", "accelerate"})
IMPURE = HEAVY | {"os", "pathlib", "time", "io", "threading", "subprocess", "random", "safetensors"}


def modules() -> Iterator[Path]:
    return (path for path in sorted(PACKAGE.rglob("*.py")) if "__pycache__" not in path.parts)


def part_of(path: Path) -> str:
    """ "visit" for visit/check.py, "api" for api.py, "" for __init__.py."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, inside functions too; not what only types need."""
    yield from _imports(ast.parse(path.read_text(encoding="utf-8")))


def _imports(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute here"
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from _imports(child)


def part_imported(name: str) -> str | None:
    """The part of ssdtune that `ssdtune.visit.check.x` lies in; None for other packages."""
    head, *rest = name.split(".")
    if head != "ssdtune":
        return None
    first = rest[0] if rest else ""
    is_part = (PACKAGE / f"{first}.py").exists() or (PACKAGE / first).is_dir()
    return first if is_part else ""


def level(part: str) -> int | None:
    return next((i for i, layer in enumerate(LAYERS) if part in layer), None)


def may_import(part: str, other: str) -> bool:
    if other == part or other in LEAVES:
        return True
    if part in LEAVES:
        return False
    own, theirs = level(part), level(other)
    if own is None:
        return other in ASIDE.get("config" if part in CONFIG else part, ())
    if theirs is None:
        return part in KNOW_OF_USERS and other in USERS
    return theirs >= own


def test_imports_run_downward() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in modules()
        if part_of(path) != ""
        for name in imports(path)
        if (other := part_imported(name)) is not None and not may_import(part_of(path), other)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_module_has_its_layer() -> None:
    known = LEAVES | USERS | frozenset().union(*LAYERS)
    parts = {part_of(path) for path in modules()}
    assert parts <= known, f"say in LAYERS where they belong: {parts - known}"


def test_the_arrow_would_be_seen_if_it_pointed_up() -> None:
    assert not may_import("swap", "visit")
    assert not may_import("visit", "report")
    assert not may_import("schedule", "config")
    assert not may_import("durable", "swap")
    assert not may_import("data", "trainer")
    assert may_import("trainer", "data")
    assert may_import("visit", "schedule")


def test_lazy_imports_are_seen_and_those_for_types_are_not(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from ssdtune.cli import main\n"
        "def f():\n    if True:\n        from ssdtune.visit import check\n"
    )
    assert list(imports(path)) == ["typing.TYPE_CHECKING", "ssdtune.visit.check"]


def test_schedules_are_pure() -> None:
    """Names, bytes and FLOPs: no tensors, files, clocks or threads. A generator with a seed of its own is pure."""
    impure = [
        f"{path.name} imports {name}"
        for path in (PACKAGE / "schedule").glob("*.py")
        for name in imports(path)
        if name.split(".")[0] in IMPURE and name != "random.Random"
    ]
    assert not impure


@pytest.mark.parametrize(
    "names",
    [
        "ssdtune",
        "ssdtune.cli",
        "ssdtune.config",
        "ssdtune.api",
        "ssdtune.trainer",
        "ssdtune.doctor, ssdtune.planning, ssdtune.report",
        "ssdtune.schedule.planner, ssdtune.schedule.trace",
    ],
)
def test_importing_costs_nothing(names: str) -> None:
    code = f"import {names}, sys; print(*sorted({set(HEAVY)} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert run.stdout.split() == []
