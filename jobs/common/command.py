"""How a file of jobs/commands/ becomes a command of `rushes`: it decorates one function with `@command(GROUP)`.

`rushes --help` imports every such file, so these import heavy packages (torch, ray, numpy) inside the function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


class Group(StrEnum):
    """The sections of `rushes --help`, in their order there."""

    RUN = "Train and sample"
    LOOK = "Check and inspect"
    REWARDS = "Rewards"
    CLUSTER = "Runs and clusters"


@dataclass(frozen=True)
class Command:
    """`function`'s parameters are the options, its docstring is the help."""

    name: str
    group: Group
    function: Callable[..., Any]


COMMANDS: dict[str, Command] = {}


def command(group: Group, name: str | None = None) -> Callable[[Function], Function]:
    """Registers a function; `name` defaults to the function's own, with dashes."""

    def register(function: Function) -> Function:
        entry = Command(name or function.__name__.replace("_", "-"), group, function)
        COMMANDS[entry.name] = entry
        return function

    return register
