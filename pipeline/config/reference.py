"""The keys of the config as data, for error messages and docs/config.md, which `rushes config --docs` prints."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.config.parts import DEFAULTS, PARTS, Part, chosen_class
from pipeline.config.resources import WorkerRange
from pipeline.config.schema import Config
from pipeline.config.sections.base import Allowed
from pipeline.core.registry import first_line

REQUIRED = object()  # default of a key that has none


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaf:
    """One key that takes a value. `path` has `*` for the user's own names."""

    path: str
    allowed: str  # the accepted values, as a user would say it
    default: Any  # `REQUIRED` if there is none
    description: str
    choices: tuple[str, ...]  # the words among the accepted values
    numeric: bool  # accepts a number, so `true` is a mistake
    whole: bool  # its numbers are whole ones
    text_only: bool  # accepts text or a path and, apart from null, nothing else


@functools.cache
def leaves() -> tuple[Leaf, ...]:
    """Every key of `Config` that takes a value, in order."""
    return tuple(_walk(Config, ""))


def _walk(section: type[BaseModel], prefix: str) -> Iterator[Leaf]:
    for name, field in section.model_fields.items():
        path = f"{prefix}{name}"
        if _is_section(field.annotation) and issubclass(field.annotation, Part):
            yield _name_of_part(path, field.description or "")
            continue
        value_type = get_args(field.annotation)[-1] if get_origin(field.annotation) is dict else None
        if _is_section(field.annotation):
            yield from _walk(field.annotation, f"{path}.")
        elif _is_section(value_type):
            yield from _walk(value_type, f"{path}.*.")
        else:
            accepted = _accepted(field.annotation, field.metadata)
            yield Leaf(
                path=path,
                allowed=accepted.text,
                default=REQUIRED if field.is_required() else field.get_default(call_default_factory=True),
                description=field.description or "",
                choices=accepted.choices,
                numeric=accepted.numeric,
                whole=accepted.text.startswith("whole number"),
                text_only=accepted.text_only,
            )


def _name_of_part(section: str, description: str) -> Leaf:
    """The key that chooses a part; its options are keys of the part (`Keys`)."""
    names = tuple(PARTS[section].all())
    return Leaf(
        path=f"{section}.name",
        allowed=f"one of {', '.join(names)}",
        default=DEFAULTS[section],
        description=description,
        choices=names,
        numeric=False,
        whole=False,
        text_only=True,
    )


def option_leaves(section: str, part: type[Part]) -> tuple[Leaf, ...]:
    """The options of a part, as keys of the section that chooses it."""
    return tuple(_walk(part, f"{section}."))


def _is_section(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


@dataclass(frozen=True, slots=True)
class _Accepted:
    """The values that a type accepts."""

    text: str
    choices: tuple[str, ...] = ()
    numeric: bool = False
    text_only: bool = False


_BOOL = _Accepted("true or false")


def _accepted(annotation: Any, metadata: Sequence[Any] = ()) -> _Accepted:
    if get_origin(annotation) is Annotated:
        return _accepted(annotation.__origin__, [*annotation.__metadata__, *metadata])
    limits = [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
    for item in limits:
        if isinstance(item, Allowed):
            return _Accepted(item.text, numeric=item.numeric)
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        options = [_accepted(option) for option in get_args(annotation)]
        return _Accepted(
            " or ".join(option.text for option in options),
            choices=tuple(choice for option in options for choice in option.choices),
            numeric=any(option.numeric for option in options)
            and not any(option.text == "true or false" for option in options),
            text_only=all(option.text_only or option.text == "null" for option in options),
        )
    if origin is Literal:
        choices = tuple(str(choice) for choice in get_args(annotation))
        return _Accepted(f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0], choices)
    if origin is list:
        item = _accepted(*get_args(annotation))
        length = next((f"{limit.min_length} " for limit in limits if isinstance(limit, MinLen)), "")
        return _Accepted(f"list of {length}({item.text})", item.choices, item.numeric)
    if annotation is int or annotation is float:
        name = "whole number" if annotation is int else "number"
        return _Accepted(f"{name} {_bounds(limits)}".strip(), numeric=True)
    if annotation is str or annotation is Path:
        return _Accepted("text" if annotation is str else "path", text_only=True)
    if annotation is bool:
        return _BOOL
    if annotation is types.NoneType:
        return _Accepted("null")
    if origin is dict:
        return _Accepted("mapping")
    raise TypeError(f"a config key has the type {annotation}, which has no wording yet")


def _bounds(limits: Sequence[Any]) -> str:
    """`>= 0 and < 1`"""
    bounds = {Gt: (">", "gt"), Ge: (">=", "ge"), Lt: ("<", "lt"), Le: ("<=", "le")}
    parts = [
        f"{sign} {getattr(limit, attribute):g}"
        for kind, (sign, attribute) in bounds.items()
        for limit in limits
        if isinstance(limit, kind)
    ]
    return " and ".join(parts)


def matches(path: str, pattern: str) -> bool:
    """Whether `path` is the key `pattern`, in which `*` stands for any name."""
    names, parts = path.split("."), pattern.split(".")
    return len(names) == len(parts) and all(p in ("*", name) for name, p in zip(names, parts, strict=True))


class Keys:
    """All keys of a config as it was read: those of the schema, and the options of the parts that it chooses."""

    def __init__(self, data: Any) -> None:
        chosen = {section: chosen_class(section, data) for section in PARTS}
        self.parts = {section: part for section, part in chosen.items() if part is not None}
        options = [leaf for section, part in self.parts.items() for leaf in option_leaves(section, part)]
        self.leaves = (*leaves(), *options)

    def at(self, path: str) -> Leaf | None:
        return next((leaf for leaf in self.leaves if matches(path, leaf.path)), None)

    def children(self, prefix: str) -> list[str]:
        """Names of the keys directly below `prefix` ('' for the top)."""
        depth = len(prefix.split(".")) if prefix else 0
        names: dict[str, None] = {}
        for leaf in self.leaves:
            parts = leaf.path.split(".")
            if len(parts) > depth and (not prefix or matches(prefix, ".".join(parts[:depth]))):
                names[parts[depth]] = None
        return list(names)


def docs_markdown(registered: Mapping[str, Sequence[str]]) -> str:
    """docs/config.md. `registered`: key -> the allowed names, where these are registered outside of the schema."""
    lines = [
        "# Config reference",
        "",
        "Generated by `rushes config --docs > docs/config.md`; do not edit.",
        "",
        "A config is a YAML file; `key=value` after it on the command line overrides a key "
        "(`rushes train configs/quickstart.yaml run.steps=20 optimizer.lr=3e-4`). `rushes config "
        "CONFIG` prints the full "
        "resolved config. `<name>` is a name of your own. Unknown keys are refused.",
        "",
        "`source`, `signal` and `objective` are parts chosen by name, each with options of its own; another name on "
        "the command line (`objective.name=awm`) also drops the options that the file gave the other part.",
    ]
    section = None
    for leaf in leaves():
        head = leaf.path.split(".")[0]
        if head != section:
            section = head
            lines += ["", f"## {head}", "", *_TABLE_HEAD]
        lines.append(_row(leaf, registered))
        if head in PARTS:
            for name, part in PARTS[head].all().items():
                lines += ["", f"### {head}: {{name: {name}}}", "", first_line(part), ""]
                options = option_leaves(head, part)
                lines += (
                    [*_TABLE_HEAD, *(_row(option, registered) for option in options)] if options else ["No options."]
                )
    return "\n".join(lines) + "\n"


_TABLE_HEAD = ["| key | allowed | default | meaning |", "|---|---|---|---|"]


def _row(leaf: Leaf, registered: Mapping[str, Sequence[str]]) -> str:
    default = "**required**" if leaf.default is REQUIRED else f"`{_default_text(leaf.default)}`"
    key = leaf.path.replace("*", "<name>")
    allowed = f"one of {', '.join(registered[leaf.path])}" if leaf.path in registered else leaf.allowed
    return f"| `{key}` | {_cell(allowed)} | {default} | {_cell(leaf.description)} |"


def _default_text(value: Any) -> str:
    if isinstance(value, WorkerRange | Path):
        return str(value)
    return yaml.safe_dump(value, default_flow_style=True).split("\n")[0].strip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
