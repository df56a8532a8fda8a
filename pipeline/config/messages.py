"""What is wrong with a config, in one line: the key, what was found, what is allowed, and where it stands.

pydantic finds the errors; this module words the first one and names the keys of the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from pipeline.config.old_keys import advice
from pipeline.config.parts import WrongOptions
from pipeline.config.reference import Keys, Leaf
from pipeline.config.resources import RESOURCE_ALIASES
from pipeline.core.errors import ConfigError
from pipeline.core.files import did_you_mean, nearest
from pipeline.core.secrets import mask, mask_tree


@dataclass(frozen=True, slots=True)
class Source:
    """Where a config comes from: a name (of the file), the line of each dotted key, and the overridden keys."""

    name: str
    lines: dict[str, int] = field(default_factory=dict)
    overridden: frozenset[str] = frozenset()

    def of(self, path: str) -> str:
        """`FILE:LINE` of a key, or `override`."""
        if any(path == key or path.startswith(f"{key}.") or key.startswith(f"{path}.") for key in self.overridden):
            return "override"
        line = self.lines.get(path)
        return f"{self.name}:{line}" if line else self.name


MAX_WHOLE = 2**53  # larger ones are mistakes, and as floats no longer exact


def refuse_odd_numbers(data: Any, source: Source, keys: Keys, prefix: str = "") -> None:
    """Raises `ConfigError` for `true` as a number, which pydantic reads as 1 (a user who wrote it meant another key),
    and for counts of 1e23."""
    if not isinstance(data, dict):
        return
    for key, value in data.items():
        path = f"{prefix}{key}"
        if not isinstance(key, str):
            raise ConfigError(f"{source.of(path)}: key {key!r} must be text; put it in quotes")
        leaf = keys.at(path)
        if leaf is None:
            refuse_odd_numbers(value, source, keys, f"{path}.")
        elif isinstance(value, bool) and leaf.numeric:
            raise ConfigError(f"{source.of(path)}: {path}: found {show(value)}; expected {leaf.allowed}")
        elif leaf.whole and isinstance(value, int | float) and abs(value) > MAX_WHOLE:
            raise ConfigError(
                f"{source.of(path)}: {path}: found {show(value)}; expected {leaf.allowed}, at most {MAX_WHOLE:,}"
            )


@dataclass(frozen=True, slots=True)
class _Problem:
    """One error: the key's path, and `key: what is wrong and what is allowed`."""

    path: str
    text: str


def error_message(error: ValidationError, source: Source, data: dict, keys: Keys) -> str:
    """One line for the first error; the other keys are only named."""
    items = _items(error)
    items.sort(key=lambda item: item["type"] != "extra_forbidden")  # a mistyped key is why another one is missing
    first, *rest = [_problem(item, data, keys) for item in items]
    others = list(dict.fromkeys(problem.path for problem in rest if problem.path != first.path))
    also = f" (also wrong: {', '.join(others[:5])}{', …' if len(others) > 5 else ''})" if others else ""
    return f"{source.of(first.path)}: {first.text}{also}"


def _items(error: ValidationError, prefix: tuple = ()) -> list[dict]:
    """pydantic's errors, with those of a part's options in the place of the part's."""
    items: list[dict] = []
    for item in error.errors(include_url=False):
        location = (*prefix, *item["loc"])
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, WrongOptions):
            items += _items(cause.error, location)
        else:
            items.append({**item, "loc": location})
    return items


def _problem(item: dict, data: dict, keys: Keys) -> _Problem:
    """Of one pydantic error: its `type`, `loc`, `input`."""
    parts = [str(part) for part in item["loc"]]
    path = ".".join(parts)
    inside_a_leaf = keys.at(path) is None and any(keys.at(".".join(parts[:n])) for n in range(1, len(parts)))
    while inside_a_leaf and keys.at(".".join(parts)) is None:
        parts.pop()  # union branches and list positions end the location: go back to the key itself
    leaf = keys.at(".".join(parts))
    if leaf is not None:
        path = ".".join(parts)
    kind = item["type"]
    if kind == "extra_forbidden":
        return _Problem(path, advice(path, data) or _unknown(path, keys))
    if kind == "value_error":
        return _broken_rule(path, keys, str(item.get("ctx", {}).get("error", item["msg"])))
    if kind == "missing":
        if leaf is None:
            needs = ", ".join(keys.children(path)) or "an entry"
            return _Problem(path, f"{path}: this section is missing; it needs {needs}")
        return _Problem(path, f"{path}: is missing; set it ({leaf.allowed}): {leaf.description}")
    if path == "rewards" and kind == "too_short":
        example = "rewards: {jpeg: {scorer: jpeg_compressibility}}"
        return _Problem(path, f"rewards: found none; at least one is needed, such as {example}")
    if leaf is None:
        names = ", ".join(name if name != "*" else "<name>" for name in keys.children(path))
        return _Problem(path, f"{path}: found {show(item['input'])}; expected a section with the keys {names}")
    return _Problem(path, _wrong_value(path, leaf, _value_at(data, parts, item["input"])))


def _broken_rule(path: str, keys: Keys, text: str) -> _Problem:
    """Of a validator. Rules of `rewards.*` and of single keys do not know the whole path, the others begin with it."""
    key = text.split(":")[0]
    if keys.at(path) is not None:
        return _Problem(path, f"{path}: {text}")
    if keys.at(f"{path}.{key}") is not None:
        return _Problem(f"{path}.{key}", f"{path}.{text}")
    return _Problem(key, text)


def _wrong_value(path: str, leaf: Leaf, value: Any) -> str:
    hint = ""
    if isinstance(value, str):
        hint = did_you_mean(value, leaf.choices)
    elif leaf.text_only and not isinstance(value, dict | list | None):
        hint = "; put it in quotes"
    return f"{path}: found {show(value)}; expected {leaf.allowed}{hint}"


def _value_at(data: Any, parts: list[str], fallback: Any) -> Any:
    for part in parts:
        if not isinstance(data, dict) or part not in data:
            return fallback
        data = data[part]
    return data


def _unknown(path: str, keys: Keys) -> str:
    part = keys.parts.get(path.split(".")[0])
    problem = "unknown key" if part is None else f"{part.name} has no such option"
    return f"{path}: {problem}{_suggestion(path, keys)}"


def _suggestion(path: str, keys: Keys) -> str:
    """'; did you mean X?' for an unknown key: a sibling, or a key of another section, with a similar name."""
    head, _, name = path.rpartition(".")
    siblings = keys.children(head)
    if name in RESOURCE_ALIASES and "resources" in siblings:
        return f"; did you mean {head}.resources.{RESOURCE_ALIASES[name]}?"
    sibling = nearest(name, siblings)
    if sibling:
        return f"; did you mean {f'{head}.{sibling}' if head else sibling}?"
    by_name: dict[str, str] = {}
    for leaf in keys.leaves:
        by_name.setdefault(leaf.path.rsplit(".", 1)[-1], leaf.path)
    similar = name if name in by_name else nearest(name, by_name)
    if similar:
        return f"; did you mean {by_name[similar].replace('*', '<name>')}?"
    return f"; allowed here: {', '.join(sibling for sibling in siblings if sibling != '*')}"


def type_name(value: Any) -> str:
    """The type of a YAML value, as a user would say it."""
    names = {dict: "mapping", list: "list", str: "text", bool: "true/false", int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)


def show(value: Any) -> str:
    """A value for an error message, cut to about 80 characters."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = f"a {type_name(value)} ({mask_tree(value)!r}" if isinstance(value, dict | list) else mask(repr(value))
    text = text if len(text) <= 80 else text[:77] + "…"
    return f"{text})" if isinstance(value, dict | list) else text
