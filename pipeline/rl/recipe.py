"""A recipe is source x rewards x signal x objective: whether the chosen parts fit each other and the config."""

from __future__ import annotations

from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError
from pipeline.rl.objectives import objective_of
from pipeline.rl.signals import signal_of
from pipeline.rl.sources import source_of


def check_recipe(cfg: Config) -> None:
    """Raises `ConfigError` naming the key and the fix."""
    source, signal, objective = source_of(cfg), signal_of(cfg), objective_of(cfg)
    for part in (source, signal, objective):
        part.check(cfg)
    needed = objective.requirements.feedback
    if needed not in ("none", signal.gives):
        raise ConfigError(
            f"signal.name: {signal.name} gives {signal.gives}, and objective {objective.name} needs {needed}"
        )
