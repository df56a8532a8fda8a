"""Parts that are chosen by name (samplers, sources, signals, objectives): each is one file that registers itself.

Nothing lists the parts: a file in the folder with `@register("name")` above its class is one.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from pipeline.core.errors import ConfigError
from pipeline.core.files import did_you_mean
from pipeline.core.reading import shown

Part = TypeVar("Part")


class Registry(Generic[Part]):
    """What a name stands for: the registered class, or what `make` makes of it.

    `key`: the config key that holds the name; `package`: the folder whose modules register.
    """

    def __init__(self, key: str, package: str, make: Callable[[Any], Part] = lambda cls: cls) -> None:
        self.key, self._package, self._make = key, package, make
        self._classes: dict[str, type[Any]] = {}
        self._parts: dict[str, Part] = {}
        self._imported = False

    def register(self, name: str) -> Callable[[type[Any]], type[Any]]:
        """Class decorator: makes the class available as `name`, which it gets as attribute `name`."""

        def add(cls: type[Any]) -> type[Any]:
            if self._classes.get(name, cls) is not cls:
                raise ValueError(f"{self.key}: two classes are registered as {name!r}")
            cls.name = name
            self._classes[name], self._parts[name] = cls, self._make(cls)
            return cls

        return add

    def all(self) -> dict[str, Part]:
        """Name -> part, names in order."""
        if not self._imported:
            folder = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(folder.__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            self._imported = True
        return dict(sorted(self._parts.items()))

    def get(self, name: str) -> Part:
        """Raises `ConfigError` with the allowed names and the nearest one."""
        return self._parts[name] if name in self._parts else choose(self.key, name, self.all())


def choose(key: str, name: str, parts: dict[str, Part]) -> Part:
    """The part `name`. Raises `ConfigError` with the allowed names, in the given order, and the nearest one."""
    if name not in parts:
        raise ConfigError(f"{key}: found {shown(name)}; expected one of {', '.join(parts)}{did_you_mean(name, parts)}")
    return parts[name]


def first_line(part: object) -> str:
    """The first line of a part's docstring: what it is."""
    return (inspect.getdoc(part) or "").split("\n")[0]
