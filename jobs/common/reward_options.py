"""The options --reward and --set of the commands that score files."""

from __future__ import annotations

from pipeline.config.schema import RewardConfig
from pipeline.core.errors import ConfigError


def reward_configs(names: list[str], options: list[str]) -> list[RewardConfig]:
    """RewardConfig of each --reward with its --set options; the config's own validation and wording."""
    from pipeline.config.load import apply_overrides, validate

    entries: dict = {name: {"scorer": name} for name in dict.fromkeys(names)}
    by_length = sorted(entries, key=len, reverse=True)  # names of own files hold dots themselves
    for text in options:
        name = next((n for n in by_length if text.startswith(f"{n}.")), None)
        if name is None:
            raise ConfigError(
                f"--set {text}: must start with a reward given by --reward ({', '.join(entries) or 'none'}) and a dot"
            )
        apply_overrides(entries[name], [text.removeprefix(f"{name}.")])
    if not entries:
        return []
    plain = {"generator": {"pretrained": "-"}, "prompts": {"train": "-"}, "rewards": entries}
    found = validate(plain, "--set").rewards
    return [found[name] for name in names]
