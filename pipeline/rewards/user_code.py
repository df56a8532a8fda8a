"""Imports a user's reward file as Python imports a module, under a name that no other file can have.

    pipeline.rewards.user_code.%2Fhome%2Fme%2Frewards.redness        /home/me/rewards/redness.py

The folder's quoted path is part of the name, so helpers of the same name in two folders are two modules, and a spawned
process (a process pool, unpickling) finds the file by the name alone. Within the folder's modules `import helpers` and
`from .helpers import x` both mean its own helpers.py. A folder with an `__init__.py` is a package of the folder above,
as for Python: the reward file can then also write `from ..common import x`.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any
from urllib.parse import quote, unquote_to_bytes

__path__: list[str] = []  # makes this module the package that the folders' packages are in
_PREFIX = __name__ + "."
_INNER = "@"  # in a folder's name: separates the folder on the search path from the packages within it

_loaded: dict[str, tuple[int, int]] = {}  # module name -> (modification time, size) of its file when it was imported


def import_file(path: Path) -> ModuleType:
    """The module of a `.py` file, imported once while the file stays as it is. Raises what importing it raises."""
    path = Path(os.path.abspath(path))
    packages: list[str] = []
    root = path.parent
    while (root / "__init__.py").is_file() and root != root.parent:
        packages.insert(0, root.name)
        root = root.parent
    importlib.invalidate_caches()  # the file, or a helper, may be as new as this call
    name = ".".join([*packages, path.stem])
    if not packages or not _is_importable(packages[0], root):
        folder = _INNER.join([_quoted(str(root)), *map(_quoted, packages)])
        name = _PREFIX + ".".join([folder, *map(_quoted, packages), _quoted(path.stem)])
        stat = path.stat()
        version = (stat.st_mtime_ns, stat.st_size)
        if _loaded.get(name, version) != version:
            for other in [m for m in sys.modules if m.startswith(f"{_PREFIX}{folder}.")]:
                del sys.modules[other]
        _loaded[name] = version
    return importlib.import_module(name)


def _is_importable(package: str, root: Path) -> bool:
    """Whether `import package` already finds the one in `root`: an installed package, or one on PYTHONPATH."""
    return str(root / package) in _places(_ordinary_spec(package))


def _quoted(name: str) -> str:
    """As one part of a dotted name."""
    return quote(os.fsencode(name), safe="").replace(".", "%2E")


def _unquoted(part: str) -> str:
    return os.fsdecode(unquote_to_bytes(part))


class _UserCodeFinder(MetaPathFinder):
    """Finds the modules of user folders by their names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(_PREFIX):
            return None
        folder, *inner = fullname.removeprefix(_PREFIX).split(".")
        if not inner:
            package = ModuleSpec(fullname, None, is_package=True)
            package.submodule_search_locations = [_unquoted(folder.split(_INNER)[0])]
            return package
        spec = PathFinder.find_spec(fullname, path)
        if spec is None and "%" in inner[-1]:  # a name that is no identifier: my-file.v2.py
            file = Path((path or [""])[0], _unquoted(inner[-1]) + ".py")
            spec = importlib.util.spec_from_file_location(fullname, file) if file.is_file() else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _UserCodeLoader(fullname, spec.loader.path)
        return spec


class _UserCodeLoader(SourceFileLoader):
    """Runs a module of a user folder with an `import` statement that looks into the folder first.

    Writes no bytecode: a file that is rewritten within a second must not be taken for the old one.
    """

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import_for(module.__name__)}
        super().exec_module(module)


def _import_for(importer: str) -> Callable[..., Any]:
    """`__import__` for a module of a user folder: its neighbours come before anything installed.

    That is the order in which Python looks when it runs the file as a script.
    """
    folder = importer.removeprefix(_PREFIX).split(".")[0]
    root = _PREFIX + folder
    package = ".".join([root, *folder.split(_INNER)[1:]])  # of the reward file

    def import_(
        name: str,
        globals: dict[str, Any] | None = None,
        locals: dict[str, Any] | None = None,
        fromlist: Sequence[str] = (),
        level: int = 0,
    ) -> ModuleType:
        if level == 0 and name:
            top = name.partition(".")[0]
            for home in dict.fromkeys((package, root)):
                if _is_neighbour(top, home, importer):
                    return builtins.__import__(name, {"__package__": home}, None, fromlist, 1)
        return builtins.__import__(name, globals, locals, fromlist, level)

    return import_


def _is_neighbour(name: str, package: str, importer: str) -> bool:
    """Whether `import name` in a module of `package` means a file or package beside it.

    Not: the importing file itself (clip.py that imports the installed clip), what the ordinary import finds in the
    same place, this project, and a mere folder (checkpoints in torch/) where something of that name is installed.
    """
    if f"{package}.{name}" == importer or name in sys.builtin_module_names or name == __name__.split(".")[0]:
        return False
    spec = PathFinder.find_spec(f"{package}.{name}", sys.modules[package].__path__)
    if spec is None:
        return False
    ordinary = _ordinary_spec(name)
    return ordinary is None or (spec.loader is not None and spec.origin is not None and spec.origin != ordinary.origin)


def _ordinary_spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):  # ValueError: a module that was put into sys.modules by hand
        return None


def _places(spec: ModuleSpec | None) -> list[str]:
    """The folders of a package."""
    return [os.path.abspath(place) for place in (spec.submodule_search_locations or ())] if spec else []


sys.meta_path.insert(0, _UserCodeFinder())
