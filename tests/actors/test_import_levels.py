"""actors/ can be read in layers: what a module imports lies below it, and there are few layers."""

import ast
from functools import cache
from pathlib import Path

import actors

FOLDER = Path(actors.__file__).parent
MAX_LEVELS = 6


@cache
def imports(module: str) -> frozenset[str]:
    """Modules of actors/ that `module` imports, inside functions and for types only too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((FOLDER / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "actors":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("actors."):
            names.add(str(node.module).removeprefix("actors."))
        elif isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("actors.") for alias in node.names if alias.name.startswith("actors.")}
    return frozenset(names)


def level(module: str, above: tuple[str, ...] = ()) -> int:
    """1: imports nothing of actors/."""
    assert module not in above, f"a circle of imports: {' -> '.join((*above, module))}"
    return 1 + max((level(name, (*above, module)) for name in imports(module)), default=0)


def test_modules_import_downwards_on_few_levels():
    levels = {path.stem: level(path.stem) for path in FOLDER.glob("*.py") if path.stem != "__init__"}
    assert len(levels) > 10 and levels["controller"] == max(levels.values()) <= MAX_LEVELS, levels
