"""The recipes, prompts and small models that ship with Rushes: in the repository, or in the installed wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def shipped_root() -> Path:
    """The folder that holds `configs` and `models`."""
    packed = _PACKAGE / "shipped"  # where setup.py puts them in a wheel
    return packed if packed.is_dir() else _PACKAGE.parent


def shipped_file(path: Path) -> Path | None:
    """`path`, such as configs/quickstart.yaml, among what ships; None if it is absolute or not there."""
    inside = path.parts[:1] in (("configs",), ("models",)) and ".." not in path.parts
    file = shipped_root() / path
    return file if inside and file.exists() else None
