"""Reads a search by name, or from a file that names it and sets its options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.config.messages import Source, error_message, refuse_odd_numbers, type_name
from pipeline.config.parts import Part
from pipeline.config.reference import Keys, option_leaves
from pipeline.core.errors import ConfigError
from pipeline.core.files import did_you_mean
from pipeline.core.reading import MAX_YAML, parse_yaml, read_text, yaml_keys
from pipeline.search.base import SEARCHES, Search


class _OptionKeys(Keys):
    """The options of a search, as keys of its file."""

    def __init__(self, part: type[Part]) -> None:
        self.parts = {}
        self.leaves = tuple(replace(leaf, path=leaf.path.removeprefix(".")) for leaf in option_leaves("", part))


def load_search(text: str, passes: int | None = None) -> Search:
    """`text`: a name (`fk`), or a YAML file with `name:` and options beside it. `passes`: in place of the file's.

    Raises `ConfigError` with one line.
    """
    if not text.endswith((".yaml", ".yml")):
        if text not in SEARCHES.all() and Path(text).exists():
            raise ConfigError(f"--search {text}: is no YAML file; name it .yaml")
        return _checked(SEARCHES.get(text), {}, Source(f"--search {text}"), passes)
    path = Path(text)
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(f"--search {path}: no such file{did_you_mean(path.name, siblings) or '; check the path'}")
    data, node = parse_yaml(read_text(path, MAX_YAML, ConfigError), str(path), ConfigError)
    if not isinstance(data, dict) or "name" not in data:
        holds = "no name" if isinstance(data, dict) else f"a {type_name(data)}"
        raise ConfigError(
            f"{path}: holds {holds}; write name: with one of {', '.join(SEARCHES.all())}, and its options"
        )
    lines = yaml_keys(node, str(path), ConfigError)
    options = {key: value for key, value in data.items() if key != "name"}
    try:
        kind = SEARCHES.get(str(data["name"]))
    except ConfigError as error:
        raise ConfigError(f"{path}: name: {str(error).partition(': ')[2]}") from None
    return _checked(kind, options, Source(str(path), lines), passes)


def _checked(kind: type[Search], options: dict[str, Any], source: Source, passes: int | None) -> Search:
    keys = _OptionKeys(kind)
    if passes is not None:
        options, source = {**options, "passes": passes}, Source("--passes")
    refuse_odd_numbers(options, source, keys)
    try:
        return kind.model_validate(options)
    except ValidationError as error:
        raise ConfigError(error_message(error, source, options, keys)) from None
