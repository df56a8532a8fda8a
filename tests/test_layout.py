"""The house's plan: the order of the wings, no circle among modules, and files that fit in one reading.

Imports count wherever they stand: at the top of a module, inside a function, or only for types.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "actors", "jobs")  # each imports only itself and those before it
WINGS = ("core", "config", "rl", "generators", "rewards", "learner", "search", "runs", "tools", "plain_loop")
MAX_LINES = 400


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imported_names(path: Path) -> tuple[str, ...]:
    """Dotted names of everything a file imports; for `from a import b` also `a.b`, which may be a module."""
    return tuple(_imported_names(path))


def _imported_names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def imports() -> dict[str, set[str]]:
    """Module -> our own modules that it imports."""
    files = {module_name(path): path for path in python_files(*PACKAGES)}
    return {
        module: {name for name in imported_names(path) if name in files and name != module}
        for module, path in files.items()
    }


def arrows() -> list[tuple[str, str]]:
    return [(module, name) for module, names in sorted(imports().items()) for name in sorted(names)]


def test_packages_import_downwards():
    upwards = [
        f"{module} imports {name}"
        for module, name in arrows()
        if PACKAGES.index(module.split(".")[0]) < PACKAGES.index(name.split(".")[0])
    ]
    assert not upwards, "\n".join(upwards)


def test_the_wings_of_the_pipeline_import_downwards():
    modules = [name.split(".")[1] for name in imports() if name.startswith("pipeline.")]
    assert set(modules) <= set(WINGS), f"a wing without a place in the order: {set(modules) - set(WINGS)}"
    upwards = [
        f"{module} imports {name}"
        for module, name in arrows()
        if module.startswith("pipeline.") and name.startswith("pipeline.")
        if WINGS.index(module.split(".")[1]) < WINGS.index(name.split(".")[1])
    ]
    assert not upwards, "\n".join(upwards)


def test_actors_import_no_tools():
    tools = [
        f"{module} imports {name}" for module, name in arrows() if module.startswith("actors.") and "tools" in name
    ]
    assert not tools, "\n".join(tools)


def test_the_pipeline_does_not_import_ray():
    offenders = [
        str(path.relative_to(ROOT))
        for path in python_files("pipeline")
        if any(name.split(".")[0] == "ray" for name in imported_names(path))
    ]
    assert not offenders


def test_no_module_imports_itself_through_others():
    """A package's `__init__` is part of importing its modules, so one that only lists them is no circle."""
    graph = {module: {n for n in names if not module.startswith(f"{n}.")} for module, names in imports().items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail("imports in a circle: " + " -> ".join(reversed(error.args[1])))


def test_files_are_short():
    lengths = {path.relative_to(ROOT): len(path.read_text("utf-8").splitlines()) for path in python_files(*PACKAGES)}
    long = [f"{path}: {count} lines" for path, count in lengths.items() if count > MAX_LINES]
    assert not long, "\n".join(long)


def test_the_order_is_seen_in_a_small_example(tmp_path, monkeypatch):
    """The checks find what they are for."""
    for name, text in {
        "pipeline/core/a.py": "def f():\n    from pipeline.tools import b\n",
        "pipeline/tools/b.py": "import ray\nfrom pipeline.core.a import f\nimport jobs.c\n",
        "actors/d.py": "from pipeline.tools.b import x\n",
        "jobs/c.py": "\n" * 500,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    imports.cache_clear()
    checks = (
        test_packages_import_downwards, test_the_wings_of_the_pipeline_import_downwards, test_actors_import_no_tools,
        test_the_pipeline_does_not_import_ray, test_no_module_imports_itself_through_others, test_files_are_short,
    )  # fmt: skip
    try:
        for check in checks:
            with pytest.raises((AssertionError, pytest.fail.Exception)):
                check()
    finally:
        imports.cache_clear()
