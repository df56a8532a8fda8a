"""Reads a config: YAML file, `key=value` overrides, validation, and one clear line for whatever is wrong.

    python -m pipeline.config.load > docs/config.md      # the config reference, generated from the schema

Relative paths are taken from the working directory; one that is not there but lies next to the config file is
taken from there. A reward file (`scorer: my_rewards.py:score`) becomes absolute, because reward servers may run
in another working directory.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from pipeline.config.old_keys import advice
from pipeline.config.resources import RESOURCE_ALIASES
from pipeline.config.schema import Config
from pipeline.core.errors import ConfigError
from pipeline.core.files import describe_os_error, did_you_mean, nearest

FREE = ("generator.call_kwargs", "rewards.*.args")  # dicts whose keys the schema does not list


# ----------------------------------------------------------------------------------------------- the schema


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaf:
    """One key that takes a value. `path` has `*` for the user's own names."""

    path: str
    kind: str  # what is allowed, in words
    default: Any  # `...` when required
    description: str
    schema: dict[str, Any]


@functools.cache
def leaves() -> tuple[Leaf, ...]:
    """Every leaf key of `Config`, in order."""
    root = Config.model_json_schema()
    return tuple(_walk(root, root.get("$defs", {}), "", _defaults(root)))


def _defaults(schema: dict[str, Any]) -> set[str]:
    return set(schema.get("required", []))


def _walk(schema: dict, defs: dict, prefix: str, required: set[str]) -> Iterator[Leaf]:
    for key, spec in schema.get("properties", {}).items():
        path = f"{prefix}{key}"
        target = _deref(spec, defs)
        if target.get("properties"):
            yield from _walk(target, defs, f"{path}.", _defaults(target))
            continue
        values = spec.get("additionalProperties")
        inner = _deref(values, defs) if isinstance(values, dict) else {}
        if inner.get("properties"):
            yield from _walk(inner, defs, f"{path}.*.", _defaults(inner))
            continue
        yield Leaf(
            path=path,
            kind=_kind(spec),
            default=... if key in required else spec["default"] if "default" in spec else _factory_default(path),
            description=spec.get("description", ""),
            schema=spec,
        )


def _factory_default(path: str) -> Any:
    """Defaults made by a factory are not in the JSON schema."""
    model: Any = Config
    for part in path.split("."):
        if part == "*":
            continue
        field = model.model_fields[part]
        model = get_args(field.annotation)[-1] if get_origin(field.annotation) is dict else field.annotation
    return field.get_default(call_default_factory=True)


def _deref(spec: dict, defs: dict) -> dict:
    ref = spec.get("$ref")
    return defs[ref.rsplit("/", 1)[1]] if ref else spec


def _kind(spec: dict) -> str:
    """What a JSON schema allows, in words a user would use."""
    if "anyOf" in spec:
        return " or ".join(_kind(option) for option in spec["anyOf"])
    if "enum" in spec:
        return "one of " + ", ".join(str(v) for v in spec["enum"])
    if "const" in spec:
        return f"{spec['const']}"
    kind = spec.get("type")
    if kind in ("integer", "number"):
        text = "whole number" if kind == "integer" else "number"
        bounds = [
            f"{sign} {_number(spec[name])}"
            for name, sign in (
                ("exclusiveMinimum", ">"),
                ("minimum", ">="),
                ("exclusiveMaximum", "<"),
                ("maximum", "<="),
            )
            if name in spec
        ]
        return f"{text} {' and '.join(bounds)}" if bounds else text
    if kind == "array":
        return f"list of ({_kind(spec.get('items', {}))})"
    names = {"string": "text", "boolean": "true or false", "null": "null", "object": "mapping"}
    return "path" if spec.get("format") == "path" else names.get(str(kind), "any value")


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else str(value)


def _match(path: str, pattern: str) -> bool:
    a, b = path.split("."), pattern.split(".")
    return len(a) == len(b) and all(q == "*" or p == q for p, q in zip(a, b, strict=True))


def _leaf(path: str) -> Leaf | None:
    return next((leaf for leaf in leaves() if _match(path, leaf.path)), None)


def _children(prefix: str) -> list[str]:
    """Names of the keys directly below `prefix` ('' for the top)."""
    depth = len(prefix.split(".")) if prefix else 0
    found = []
    for leaf in leaves():
        parts = leaf.path.split(".")
        if len(parts) > depth and (not prefix or _match(prefix, ".".join(parts[:depth]))) and parts[depth] not in found:
            found.append(parts[depth])
    return found


# ------------------------------------------------------------------------------------------------- the YAML


class _Loader(yaml.SafeLoader):
    """safe_load that also reads 1e-4 as a number (YAML 1.1 wants 1.0e-4)."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _parse_file(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns (mapping, line of each dotted key)."""
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; give a YAML file, such as configs/quickstart.yaml")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, siblings) or (
            f"; found there: {', '.join(sorted(siblings))}" if siblings else ""
        )
        raise ConfigError(f"{path}: no such config file{hint or '; check the path'}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not a UTF-8 text file (byte {error.start}); give a YAML file") from None
    except OSError as error:
        raise ConfigError(f"cannot read {describe_os_error(error, path)}") from None
    lines: dict[str, int] = {}
    try:
        node = yaml.compose(text, Loader=_Loader)
        _index_lines(path, node, "", lines)
        data = yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader subclass)
    except yaml.YAMLError as error:
        raise ConfigError(_yaml_message(path, error)) from None
    if data is None:
        raise ConfigError(f"{path}: is empty; copy configs/quickstart.yaml and change it")
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: holds a {_found_type(data)}; a config is a mapping of sections (generator:, rewards:, …)"
        )
    return data, lines


def _yaml_message(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else f"{path}"
    problem = " ".join(str(getattr(error, "problem", None) or error).split())
    hint = "; indent with spaces, not tabs" if "'\\t'" in problem else "; check indentation, colons and quotes there"
    return f"{where}: not valid YAML: {problem}{hint}"


def _index_lines(path: Path, node: yaml.Node | None, prefix: str, lines: dict[str, int]) -> None:
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _index_lines(path, child, f"{prefix}[].", {})
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{path}:{line}: a key must be plain text, found a {key_node.id}")
        key = f"{prefix}{key_node.value}"
        if key in lines and key_node.value != "<<":
            raise ConfigError(f"{path}:{line}: {key} is given twice (first in line {lines[key]}); keep one of them")
        lines[key] = line
        _index_lines(path, value_node, f"{key}.", lines)


# --------------------------------------------------------------------------------------------- the overrides


def apply_overrides(data: dict[str, Any], overrides: list[str]) -> set[str]:
    """Sets each `dotted.key=value` (value read as YAML) in `data`; returns the keys. Raises `ConfigError`."""
    done = set()
    for text in overrides:
        key, sign, raw = text.partition("=")
        key = key.strip()
        if not sign or not key or any(not part for part in key.split(".")):
            raise ConfigError(f"override {text!r}: write it as key=value, such as run.steps=20")
        try:
            value = yaml.load(raw, Loader=_Loader)  # noqa: S506 (a SafeLoader subclass)
        except yaml.YAMLError as error:
            problem = " ".join(str(getattr(error, "problem", None) or error).split())
            raise ConfigError(f"override {text!r}: the value is not valid YAML: {problem}; quote it") from None
        leaf = _leaf(key)
        if leaf and not isinstance(value, str | None) and leaf.kind in ("text", "path", "text or null", "path or null"):
            value = raw  # a run named 007 stays text
        parts = key.split(".")
        place = data
        for depth, part in enumerate(parts[:-1]):
            if place.get(part) is None:
                place[part] = {}
            place = place[part]
            if not isinstance(place, dict):
                raise ConfigError(
                    f"override {text!r}: {'.'.join(parts[: depth + 1])} is {_show(place)}, not a "
                    "section with keys of its own"
                )
        place[parts[-1]] = value
        done.add(key)
    return done


# --------------------------------------------------------------------------------------------- the validation


def load_config(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads, merges and validates a config. Raises `ConfigError` with one line."""
    path = Path(path)
    data, lines = _parse_file(path)
    given = apply_overrides(data, list(overrides))
    return validate(data, str(path), lines, given, base=path.parent)


def validate(
    data: dict[str, Any],
    source: str,
    lines: dict[str, int] | None = None,
    given: set[str] | None = None,
    base: Path | None = None,
) -> Config:
    """Validates a plain mapping. `source`, `lines` and `given` (overridden keys) only serve the error's wording."""
    where = _Where(source, lines or {}, given or set())
    _refuse_bools(data, "", where)
    try:
        config = Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_message(error, where, data)) from None
    return _resolve_paths(config, base) if base is not None else config


@dataclass(frozen=True)
class _Where:
    source: str
    lines: dict[str, int]
    given: set[str]

    def __call__(self, path: str) -> str:
        if any(path == key or path.startswith(f"{key}.") or key.startswith(f"{path}.") for key in self.given):
            return "override"
        line = self.lines.get(path)
        return f"{self.source}:{line}" if line else self.source


def _refuse_bools(data: Any, prefix: str, where: _Where) -> None:
    """pydantic reads `true` as 1; a user who wrote it meant another key."""
    if not isinstance(data, dict):
        return
    for key, value in data.items():
        path = f"{prefix}{key}"
        if not isinstance(key, str):
            raise ConfigError(f"{where(path)}: key {key!r} must be text; put it in quotes")
        leaf = _leaf(path)
        if leaf is None:
            _refuse_bools(value, f"{path}.", where)
        elif isinstance(value, bool) and "number" in leaf.kind:
            raise ConfigError(f"{where(path)}: {path}: found {_show(value)}; expected {leaf.kind}")


def _message(error: ValidationError, where: _Where, data: dict) -> str:
    """One line for the first error; the other keys are only named."""
    first: tuple[str, str] | None = None
    others: list[str] = []
    items = error.errors(include_url=False)
    items.sort(key=lambda item: item["type"] != "extra_forbidden")  # a mistyped key is why another one is missing
    for item in items:
        path, text = _one(dict(item), data)
        if first is None:
            first = (path, text)
        elif path != first[0] and path not in others:
            others.append(path)
    if first is None:  # pydantic never raises an empty list
        raise error
    path, text = first
    more = f" (also wrong: {', '.join(others[:5])}{', …' if len(others) > 5 else ''})" if others else ""
    return f"{where(path)}: {text}{more}"


def _one(item: dict, data: dict) -> tuple[str, str]:
    """(key path, 'key: what is wrong and what is allowed') of one pydantic error."""
    parts = [str(p) for p in item["loc"]]
    path = ".".join(parts)
    while parts and _leaf(".".join(parts)) is None and any(_leaf(".".join(parts[:n])) for n in range(1, len(parts))):
        parts.pop()  # union branches and list positions end the location: go back to the key itself
    leaf = _leaf(".".join(parts))
    if leaf is not None:
        path = ".".join(parts)
    kind = item["type"]
    if kind == "extra_forbidden":
        renamed = advice(path)
        return path, renamed or f"{path}: unknown key{_suggest(path)}"
    if kind == "value_error":
        text = str(item.get("ctx", {}).get("error", item["msg"]))
        if leaf is not None:  # a key's own validator, which does not know where it stands
            return path, f"{path}: {text}"
        return text.split(":")[0], text
    if kind == "missing":
        if leaf is None:
            return path, f"{path}: this section is missing; it needs {', '.join(_children(path)) or 'an entry'}"
        return path, f"{path}: is missing; set it ({leaf.kind}): {leaf.description}"
    if path == "rewards" and kind == "too_short":
        return (
            path,
            "rewards: found none; at least one is needed, such as rewards: {jpeg: {scorer: jpeg_compressibility}}",
        )
    found = item["input"] if leaf is None else _get(data, parts, item["input"])
    if leaf is None:
        inside = ", ".join(k if k != "*" else "<name>" for k in _children(path))
        return path, f"{path}: found {_show(found)}; expected a section with the keys {inside}"
    hint = ""
    if isinstance(found, str):
        hint = did_you_mean(found, leaf.schema.get("enum", []))
    elif leaf.kind.startswith("text") and not isinstance(found, dict | list | None):
        hint = "; put it in quotes"
    return path, f"{path}: found {_show(found)}; expected {leaf.kind}{hint}"


def _get(data: Any, parts: list[str], fallback: Any) -> Any:
    for part in parts:
        if not isinstance(data, dict) or part not in data:
            return fallback
        data = data[part]
    return data


def _suggest(path: str) -> str:
    head, _, name = path.rpartition(".")
    siblings = _children(head)
    if name in RESOURCE_ALIASES and "resources" in siblings:
        return f"; did you mean {head}.resources.{RESOURCE_ALIASES[name]}?"
    hit = nearest(name, siblings)
    if hit:
        return f"; did you mean {f'{head}.{hit}' if head else hit}?"
    same = [leaf.path for leaf in leaves() if leaf.path.rsplit(".", 1)[-1] == name]
    if same:
        return f"; did you mean {same[0].replace('*', '<name>')}?"
    far = nearest(name, {leaf.path.rsplit(".", 1)[-1] for leaf in leaves()})
    if far:
        full = next(leaf.path for leaf in leaves() if leaf.path.rsplit(".", 1)[-1] == far)
        return f"; did you mean {full.replace('*', '<name>')}?"
    return f"; allowed here: {', '.join(k for k in siblings if k != '*')}"


def _found_type(value: Any) -> str:
    names = {dict: "mapping", list: "list", str: "text", bool: "true/false", int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)


def _show(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value) if not isinstance(value, dict | list) else f"a {_found_type(value)} ({value!r}"
    text = text if len(text) <= 80 else text[:77] + "…"
    return f"{text})" if isinstance(value, dict | list) else text


def _resolve_paths(config: Config, base: Path) -> Config:
    def beside(path: Path | None) -> Path | None:
        if path is None or path.is_absolute() or path.exists() or not (base / path).exists():
            return path
        return (base / path).resolve()

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


# ------------------------------------------------------------------------------------------------------ output


def to_yaml(config: Config) -> str:
    """The full resolved config; `load_config` of it gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def docs_markdown() -> str:
    """docs/config.md, generated from the schema."""
    lines = [
        "# Config reference",
        "",
        "Generated by `python -m pipeline.config.load > docs/config.md`; do not edit.",
        "",
        "A config is a YAML file; `key=value` after it on the command line overrides a key "
        "(`rushes train configs/quickstart.yaml run.steps=20 optimizer.lr=3e-4`). `rushes config "
        "CONFIG` prints the full "
        "resolved config. `<name>` is a name of your own. Unknown keys are refused.",
    ]
    section = None
    for leaf in leaves():
        head = leaf.path.split(".")[0]
        if head != section:
            section = head
            lines += ["", f"## {head}", "", "| key | allowed | default | meaning |", "|---|---|---|---|"]
        default = "**required**" if leaf.default is ... else f"`{_default_text(leaf.default)}`"
        key = leaf.path.replace("*", "<name>")
        lines.append(f"| `{key}` | {_cell(leaf.kind)} | {default} | {_cell(leaf.description)} |")
    return "\n".join(lines) + "\n"


def _default_text(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).split("\n")[0].strip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(docs_markdown(), end="")
