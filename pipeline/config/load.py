"""Reads a config: YAML file, `key=value` overrides, validation.

Relative paths are taken from the working directory; one that is not there but lies next to the config file is
taken from there, and else from what ships with Rushes (`configs/…`, `models/…`). A reward file
(`scorer: my_rewards.py:score`) becomes absolute, because reward servers may run in another working directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config.messages import Source, error_message, refuse_odd_numbers, show, type_name
from pipeline.config.parts import DEFAULTS, PARTS
from pipeline.config.reference import Keys
from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError
from pipeline.core.files import did_you_mean
from pipeline.core.reading import MAX_YAML, parse_yaml, read_text, shown, yaml_keys
from pipeline.core.secrets import credentials_in_urls, mask_tree, register_tree, texts_of
from pipeline.core.shipped import shipped_file


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads, merges and validates a config. Raises `ConfigError` with one line."""
    path = Path(path)
    if not path.exists():
        path = shipped_file(path) or path
    file = _parse_file(path)
    overridden = apply_overrides(file.data, overrides)
    return validate(file.data, Source(str(path), file.lines, frozenset(overridden)), base=path.parent)


def load_run_config(run: Path) -> Config:
    """The config in a run's folder. Its relative paths are also looked for where the run was started, which is the
    folder that `run.dir` is relative to. Raises `ConfigError`."""
    config = load_config(run / "config.yaml")
    runs, parts = run.resolve().parent, config.run.dir.parts
    if not parts or config.run.dir.is_absolute() or runs.parts[-len(parts) :] != parts:
        return config
    return _resolve_paths(config, Path(*runs.parts[: -len(parts)]))


def validate(data: dict[str, Any], source: Source, base: Path | None = None) -> Config:
    """Validates a plain mapping. `source` is what errors name; paths may be relative to the folder `base`."""
    register_tree(data)
    keys = Keys(data)
    refuse_odd_numbers(data, source, keys)
    for key, text in texts_of(data):
        if "\0" in text:
            raise ConfigError(f"{source.of(key)}: {key}: holds a NUL character, which no path or text may; remove it")
    for key in credentials_in_urls(data):
        raise ConfigError(
            f"{source.of(key)}: {key}: holds credentials in its URL; leave them to the environment, such as a variable "
            "that api_key_env names"
        )
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(error_message(error, source, data, keys)) from None
    return _resolve_paths(config, base) if base is not None else config


def to_yaml(config: Config) -> str:
    """The full resolved config, secrets masked; `load_config` of it gives an equal config where there are none."""
    return yaml.safe_dump(mask_tree(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True, width=110)


# ------------------------------------------------------------------------------------------------- the YAML


@dataclass(frozen=True, slots=True)
class _ConfigFile:
    """A parsed file, and the line of each dotted key in it."""

    data: dict[str, Any]
    lines: dict[str, int]


def _parse_file(path: Path) -> _ConfigFile:
    data, node = parse_yaml(_read(path), str(path), ConfigError)
    lines = yaml_keys(node, str(path), ConfigError)
    if data is None:
        raise ConfigError(f"{path}: is empty; copy configs/quickstart.yaml and change it")
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: holds a {type_name(data)}; a config is a mapping of sections (generator:, rewards:, …)"
        )
    return _ConfigFile(data, lines)


def _read(path: Path) -> str:
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; give a YAML file, such as configs/quickstart.yaml")
    if not path.exists():
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, siblings) or (
            f"; found there: {', '.join(sorted(siblings))}" if siblings else ""
        )
        raise ConfigError(f"{path}: no such config file{hint or '; check the path'}")
    return read_text(path, MAX_YAML, ConfigError)


# --------------------------------------------------------------------------------------------- the overrides


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> set[str]:
    """Sets each `dotted.key=value` (value read as YAML) in `data`; returns the keys. Raises `ConfigError`.

    Another name for a part (`objective.name=awm`) replaces it with the options that the file gave it, since they were
    those of the other one.
    """
    overridden = set()
    names = {f"{section}.name" for section in PARTS}
    for text in sorted(overrides, key=lambda text: text.partition("=")[0].strip() not in names):  # names come first
        key, sign, raw = text.partition("=")
        key = key.strip()
        if not sign or not key or any(not part for part in key.split(".")):
            raise ConfigError(f"override {text!r}: write it as key=value, such as run.steps=20")
        where = f"override {shown(text, 100)}"
        value, node = parse_yaml(raw, where, ConfigError)
        yaml_keys(node, where, ConfigError)
        leaf = Keys(data).at(key)
        if leaf is not None and leaf.text_only and not isinstance(value, str | None):
            value = raw  # a run named 007 stays text
        *sections, name = key.split(".")
        section = data
        for depth, part in enumerate(sections):
            if section.get(part) is None:
                section[part] = {}
            section = section[part]
            if not isinstance(section, dict):
                raise ConfigError(
                    f"override {text!r}: {'.'.join(sections[: depth + 1])} is {show(section)}, not a section with keys"
                )
        if key in names and section.get(name, DEFAULTS[sections[0]]) != value:
            section.clear()
        section[name] = value
        overridden.add(key)
    return overridden


# ------------------------------------------------------------------------------------------------- the paths


def with_absolute_paths(config: Config) -> Config:
    """The config as a run keeps it, to be read from any folder."""

    def absolute(path: Path | None) -> Path | None:
        return None if path is None else path.expanduser().absolute()

    prompts = {"train": absolute(config.prompts.train), "heldout": absolute(config.prompts.heldout)}
    update: dict[str, Any] = {"prompts": config.prompts.model_copy(update=prompts)}
    folder = Path(config.generator.pretrained).expanduser()
    if folder.is_dir():
        update["generator"] = config.generator.model_copy(update={"pretrained": str(folder.absolute())})
    return config.model_copy(update=update)


def _resolve_paths(config: Config, base: Path) -> Config:
    def beside(path: Path | None) -> Path | None:
        if path is None or path.is_absolute() or path.exists():
            return path
        return (base / path).resolve() if (base / path).exists() else shipped_file(path) or path

    prompts = config.prompts.model_copy(
        update={"train": beside(config.prompts.train), "heldout": beside(config.prompts.heldout)}
    )
    folder = Path(config.generator.pretrained)
    generator = config.generator.model_copy(update={"pretrained": str(beside(folder))})
    rewards = {}
    for name, reward in config.rewards.items():
        file, colon, function = reward.scorer.rpartition(":")
        if colon and file.endswith(".py"):
            reward = reward.model_copy(update={"scorer": f"{Path(str(beside(Path(file)))).absolute()}:{function}"})
        rewards[name] = reward
    return config.model_copy(update={"prompts": prompts, "generator": generator, "rewards": rewards})
