"""Which scorers there are, which options they take, and how one is built: by its registered name or from the user's
own `file.py:function`. Only the module of the scorer that a config names is imported.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import ConfigError
from pipeline.core.files import did_you_mean
from pipeline.rewards.base import REGISTRY, Scorer
from pipeline.rewards.function import FunctionScorer, is_function_spec


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorerSummary:
    """A registered scorer as `rushes score --list` shows it."""

    name: str
    reads: str  # frame | video
    tested_with: str  # see `Scorer.tested_with`
    description: str  # first line of its docstring


@functools.cache
def _modules() -> dict[str, str]:
    """Scorer name -> module. Names are read from the source text, so listing them imports none of the models."""
    modules = {}
    for file in sorted((Path(__file__).parent / "scorers").glob("*.py")):
        for name in re.findall(r'^@register\(\s*"([^"]+)"', file.read_text(encoding="utf-8"), flags=re.MULTILINE):
            modules[name] = f"pipeline.rewards.scorers.{file.stem}"
    return modules


def scorer_names() -> list[str]:
    return sorted(set(_modules()) | set(REGISTRY))


def list_scorers() -> list[ScorerSummary]:
    """All registered scorers, by name."""
    classes = {name: scorer_class(name) for name in scorer_names()}
    return [
        ScorerSummary(
            name=name,
            reads=cls.reads,
            tested_with=cls.tested_with,
            description=(inspect.getdoc(cls) or "").split("\n")[0],
        )
        for name, cls in classes.items()
    ]


def scorer_class(scorer: str) -> type[Scorer]:
    """Raises `ConfigError` with the nearest name."""
    if scorer not in REGISTRY and scorer in _modules():
        importlib.import_module(_modules()[scorer])
    if scorer not in REGISTRY:
        hint = did_you_mean(scorer, scorer_names())
        raise ConfigError(
            f"unknown scorer {scorer!r}{hint or '; there are: ' + ', '.join(scorer_names())} (or your "
            "own file.py:function)"
        )
    return REGISTRY[scorer]


def check_options(scorer: str, args: dict[str, Any], key: str = "args") -> None:
    """What can be checked without loading a model: the scorer exists and takes the options. Raises `ConfigError`.

    `key`: where in the config the options stand, for the message.
    """
    if is_function_spec(scorer):
        FunctionScorer(scorer, args)
        return
    cls = scorer_class(scorer)
    parameters = [p for p in inspect.signature(cls.__init__).parameters.values() if p.name != "self"]
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        return
    options = [p.name for p in parameters if p.kind != p.VAR_POSITIONAL]
    if cls.__init__ is object.__init__:
        options = []
    for name in args:
        if name not in options:
            hint = did_you_mean(name, options) or f"; its options are: {', '.join(options) or 'none'}"
            raise ConfigError(f"{key}.{name}: {scorer} has no such option{hint}")
    required = [p.name for p in parameters if p.default is p.empty and p.kind != p.VAR_POSITIONAL and p.name in options]
    for name in required:
        if name not in args:
            raise ConfigError(f"{key}.{name}: {scorer} needs this option; set it")
    cls.check_args(args)


def gradient_note(scorer: str, args: dict[str, Any]) -> str:
    """ "" if `scorer` with these options has gradients; else why not, and what to use instead. Loads no model."""
    if is_function_spec(scorer):
        return FunctionScorer(scorer, args).gradient_note
    return scorer_class(scorer).why_no_gradient(args)


def create_scorer(scorer: str, args: dict[str, Any]) -> Scorer:
    """Checks the options and loads the model. Raises `ConfigError`, or whatever `RushesError` the model raises."""
    if is_function_spec(scorer):
        return FunctionScorer(scorer, args)
    check_options(scorer, args)
    return scorer_class(scorer)(**args)
