"""Reward configs from the options --reward and --set of the commands that score files."""

from __future__ import annotations

from pipeline.config.schema import RewardConfig
from pipeline.core.errors import ConfigError


def build_reward_configs(names: list[str], options: list[str]) -> list[RewardConfig]:
    """The config of each --reward with its --set options. Raises `ConfigError` in the words of a run's config."""
    from pipeline.config.load import apply_overrides, validate
    from pipeline.config.messages import Source

    entries: dict = {name: {"scorer": name} for name in dict.fromkeys(names)}
    longest_first = sorted(entries, key=len, reverse=True)  # names such as my.py:score contain dots
    for text in options:
        name = next((n for n in longest_first if text.startswith(f"{n}.")), None)
        if name is None:
            raise ConfigError(
                f"--set {text}: must start with a reward given by --reward ({', '.join(entries) or 'none'}) and a dot"
            )
        apply_overrides(entries[name], [text.removeprefix(f"{name}.")])
    if not entries:
        return []
    plain = {"generator": {"pretrained": "-"}, "prompts": {"train": "-"}, "rewards": entries}
    rewards = validate(plain, Source("--set")).rewards
    return [rewards[name] for name in names]


def refuse_duplicates(command: str, names: list[str]) -> None:
    """Raises `ConfigError` when no --reward is given, or one twice."""
    if not names:
        raise ConfigError(f"{command}: give at least one --reward NAME (`rushes score --list` shows them)")
    if len(set(names)) < len(names):
        raise ConfigError(f"--reward {max(names, key=names.count)}: is given twice; keep one")
