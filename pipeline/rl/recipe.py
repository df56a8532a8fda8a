"""A recipe is source x rewards x signal x objective: whether the chosen parts fit each other and the config."""

from __future__ import annotations

from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError
from pipeline.rl.objectives import Objective, objective_of
from pipeline.rl.signals import signal_of
from pipeline.rl.sources import source_of


def check_recipe(cfg: Config) -> None:
    """Raises `ConfigError` naming the key and the fix."""
    source, signal, objective = source_of(cfg), signal_of(cfg), objective_of(cfg)
    for part in (source, signal, objective):
        part.check(cfg)
    data = not source.draws or "labels" in source.judged_by
    if data and not objective.requirements.given_takes:
        raise ConfigError(
            f"objective.name: {objective.name} trains on what the policy drew, and source {source.name} gives finished "
            "takes of data; use an objective on finished takes, such as awm"
        )
    if objective.requirements.several_prompts and not source.several_prompts:
        raise ConfigError(
            f"objective.name: {objective.name} compares the prompts of a group, and source {source.name} gives it one "
            "alone; set source clips with distinct: true"
        )
    needed = objective.requirements.feedback
    if needed not in ("none", signal.gives):
        raise ConfigError(
            f"signal.name: {signal.name} gives {signal.gives}, and objective {objective.name} needs {needed}"
        )
    if needed == "none" and signal.gives != "none":
        raise ConfigError(
            f"signal.name: {signal.name} compares scores, of which objective {objective.name} makes no use; set none"
        )
    if signal.gives != "none" and (unread := source.judged_by - signal.reads):
        raise ConfigError(
            f"signal.name: {signal.name} orders takes by {' and '.join(sorted(signal.reads))}, and takes of source "
            f"{source.name} are judged by {' and '.join(sorted(unread))}; set another signal"
            + (", such as labels or select" if "labels" in unread else "")
        )
    _check_gradient_rewards(cfg, objective)


def _check_gradient_rewards(cfg: Config, objective: Objective) -> None:
    """Rewards that teach through gradients are there where the objective requires them, and only there."""
    gradient = cfg.gradient_rewards
    if not objective.requirements.reward_gradient:
        if gradient:
            raise ConfigError(
                f"rewards.{gradient[0]}.gradient: objective {objective.name} does not learn through a reward; leave it "
                "out, or set objective.name=reward_gradient"
            )
        return
    if not any(cfg.rewards[name].weight for name in gradient):
        raise ConfigError(
            f"rewards: objective {objective.name} learns through a reward, and none has gradient: true and a weight "
            "other than 0; set rewards.NAME.gradient=true for one whose scorer can be differentiated, such as "
            "clip_score"
        )
    for name, reward in cfg.rewards.items():
        if not reward.gradient and reward.weight:
            raise ConfigError(
                f"rewards.{name}.weight: found {reward.weight:g}, but objective {objective.name} learns from rewards "
                "with gradient: true alone; set weight 0 to watch it, or gradient"
            )
        unused = {"normalize": "none", "clip": None} if reward.gradient else {}
        for key, default in unused.items():
            if (found := getattr(reward, key)) != default:
                raise ConfigError(
                    f"rewards.{name}.{key}: found {found}, which changes scores on servers, not the gradient; leave it "
                    "out"
                )
