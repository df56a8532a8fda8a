"""Reads text that others have written: UTF-8 files, JSON, JSONL and YAML, within limits.

Whatever is wrong with a file is one error of a line that names the file, what was found and the fix: text that is not
UTF-8, a number of 5,000 digits, lists nested a thousand deep, a key given twice, an alias that unfolds to millions of
values. `pipeline.core.parquet` does the same for tables. Nothing else parses a file that a user or another program
wrote.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.errors import InputError, RushesError, one_line
from pipeline.core.files import describe_os_error
from pipeline.core.safe_paths import check_regular
from pipeline.core.secrets import mask

MAX_TEXT = 16 * 2**20  # bytes of a JSON file
MAX_YAML = 2**20  # bytes of a YAML file: its parser reads about 200 KB a second
MAX_LINES = 512 * 2**20  # bytes of a file that is read line by line
MAX_DEPTH = 48  # of nested lists and mappings
MAX_VALUES = 100_000  # of a YAML file, once its aliases are unfolded
LARGEST, SMALLEST = 2**64 - 1, -(2**63)  # whole numbers that parquet, numpy and safetensors can hold
LENIENT = 10**40  # of `lenient` JSON

_SURROGATE = re.compile("[\ud800-\udfff]")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_UNUSUAL_NUMBER = re.compile(r"\d{19}|[eE]\+?\d{3}")
_LINE_END = re.compile(rb"\r\n|\n|\r")
_NOT_UTF8 = "is not UTF-8 text{at}; save the file as UTF-8"

Kind = type[RushesError]  # of the error to raise


# ----------------------------------------------------------------------------------------------------- the text


def read_bytes(path: Path, limit: int, error: Kind = InputError) -> bytes:
    """A regular file of at most `limit` bytes. Raises `error` naming the path."""
    path = Path(path)
    try:
        check_regular(path)
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except InputError as problem:
        raise error(str(problem)) from None
    except (OSError, ValueError) as problem:
        detail = describe_os_error(problem, path) if isinstance(problem, OSError) else f"{path!s}: {problem}"
        raise error(f"cannot read {detail}") from None
    if len(data) > limit:
        raise error(f"{path}: is larger than {limit / 2**20:g} MiB, the most that such a file may have; split it")
    return data


def decode(data: bytes, where: str, error: Kind = InputError) -> str:
    """UTF-8 text without its byte order mark. Raises `error`."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise error(f"{where}: {_NOT_UTF8.format(at=' but UTF-16')}")
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{where}: {_NOT_UTF8.format(at=f' (byte {problem.start})')}") from None


def read_text(path: Path, limit: int = MAX_TEXT, error: Kind = InputError) -> str:
    """A whole text file, without its byte order mark. Raises `error`."""
    return decode(read_bytes(path, limit, error), str(path), error)


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of each line, whether lines end in LF, CRLF or CR. Raises `InputError` with the line."""
    data = read_bytes(path, MAX_LINES)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        decode(data, str(path))
    for number, raw in enumerate(_LINE_END.split(data.removeprefix(codecs.BOM_UTF8)), start=1):
        try:
            yield number, raw.decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{path}, line {number}: {_NOT_UTF8.format(at='')}") from None


def bad_text(text: str) -> str | None:
    """'holds …', of a character that no file can store; None for proper text."""
    match = _SURROGATE.search(text)
    if match is None:
        return None
    code = ord(match.group())
    if 0xDC80 <= code <= 0xDCFF:  # how Python shows the bytes of names that are not UTF-8
        return f"holds the byte 0x{code - 0xDC00:02x}, which is not UTF-8"
    return f"holds half a character (the lone surrogate U+{code:04X})"


def storable(text: str) -> str:
    """The text with escapes in place of what UTF-8 cannot store, for tables and terminals."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shown(value: Any, limit: int = 60) -> str:
    """A value for a message: short, without bytes."""
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, Mapping):
        return f"a mapping ({', '.join(storable(str(key))[:20] for key in list(value)[:4])})"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST:
        return "a number of more than 64 bits"
    text = (
        storable(mask(repr(value)))
        if isinstance(value, str | int | float | bool | None)
        else f"a {type(value).__name__}"
    )
    return text if len(text) <= limit else text[: limit - 1] + "…"


# ----------------------------------------------------------------------------------------------------- JSON


class _Refused(ValueError):
    """What valid JSON or YAML may hold, but no file of ours."""


def parse_json(text: str | bytes, where: str, fix: str, *, lenient: bool = False, error: Kind = InputError) -> Any:
    """The value of a JSON text. `lenient`: with NaN, Infinity and whole numbers of up to 40 digits, which PyTorch,
    transformers (model_max_length) and Rushes itself write.

    Raises `error`: not JSON, a key given twice, numbers beyond 64 bits, nesting beyond `MAX_DEPTH`, half characters.
    """
    if isinstance(text, bytes):
        text = decode(text, where, error)
    hooks: dict[str, Any] = {"object_pairs_hook": _object}
    if not lenient:
        hooks["parse_constant"] = _refuse_constant
    if _UNUSUAL_NUMBER.search(text):
        hooks |= {"parse_int": _lenient_number if lenient else _whole_number, "parse_float": _number}
    try:
        value = json.loads(text, **hooks)
        if text.count("[") + text.count("{") > MAX_DEPTH or _SURROGATE_ESCAPE.search(text) or bad_text(text):
            check_plain(value, LENIENT if lenient else LARGEST)
    except json.JSONDecodeError as problem:
        place = f"column {problem.colno}" if problem.lineno == 1 else f"line {problem.lineno}, column {problem.colno}"
        raise error(f"{where}: is not valid JSON ({problem.msg}, {place}); {fix}") from None
    except RecursionError:
        raise error(f"{where}: is nested more than {MAX_DEPTH} levels deep; {fix}") from None
    except _Refused as problem:
        raise error(f"{where}: {problem}; {fix}") from None
    return value


def parse_json_object(
    text: str | bytes, where: str, fix: str, *, lenient: bool = False, error: Kind = InputError
) -> dict[str, Any]:
    """As `parse_json`, for a JSON object."""
    value = parse_json(text, where, fix, lenient=lenient, error=error)
    if not isinstance(value, dict):
        raise error(f"{where}: is not a JSON object but {shown(value)}; {fix}")
    return value


def read_json_object(
    path: Path, fix: str, *, lenient: bool = False, limit: int = MAX_TEXT, error: Kind = InputError
) -> dict[str, Any]:
    """The JSON object in a file. Raises `error` naming the path."""
    return parse_json_object(read_bytes(path, limit, error), str(path), fix, lenient=lenient, error=error)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Refused(f"has the key {shown(twice)} twice")
    return value


def _refuse_constant(name: str) -> Any:
    raise _Refused(f"is not valid JSON: {name} is no number")


def _whole_number(digits: str) -> int:
    if len(digits) > 20 or not SMALLEST <= int(digits) <= LARGEST:
        raise _Refused(f"holds a whole number of {len(digits.lstrip('-'))} digits, and 64 bits is the most")
    return int(digits)


def _lenient_number(digits: str) -> int:
    if len(digits) > 40:
        raise _Refused(f"holds a whole number of {len(digits)} digits, and 40 is the most")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise _Refused(f"holds the number {digits[:24]}, which is beyond what a float can hold")
    return value


def check_plain(value: Any, largest: int = LARGEST) -> None:
    """Raises `ValueError` ('holds …') for nesting beyond `MAX_DEPTH`, half characters, whole numbers beyond `largest`,
    and for what JSON has no type for, such as dates and bytes."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise _Refused(f"is nested more than {MAX_DEPTH} levels deep")
        below: list[Any] = []
        for entry in level:
            if isinstance(entry, dict):
                for key in entry:
                    if not isinstance(key, str):
                        raise _Refused(f"holds the key {shown(key)}, and keys must be text")
                    if problem := bad_text(key):
                        raise _Refused(problem)
                below += entry.values()
            elif isinstance(entry, list | tuple):
                below += entry
            elif isinstance(entry, str):
                if problem := bad_text(entry):
                    raise _Refused(problem)
            elif isinstance(entry, int):
                if not (SMALLEST if largest == LARGEST else -largest) <= entry <= largest:
                    raise _Refused(f"holds a whole number of {len(str(abs(entry)))} digits, and 64 bits is the most")
            elif not isinstance(entry, float | None):
                raise _Refused(f"holds a {type(entry).__name__}, which is no text, number, list or mapping")
        level = below


# ----------------------------------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """safe_load that also reads 1e-4 as a number (YAML 1.1 wants 1.0e-4), and dates as the text that they are."""


_DROPPED = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _DROPPED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


def parse_yaml(text: str, where: str, error: Kind = InputError) -> tuple[Any, yaml.Node | None]:
    """(the value, its node with the lines of all keys) of a YAML text.

    Raises `error`: not YAML, tags such as !!python/name, a key given twice, aliases that unfold to more than
    `MAX_VALUES` values or contain themselves, numbers beyond 64 bits, nesting beyond `MAX_DEPTH`.
    """
    if problem := bad_text(text):
        raise error(f"{where}: {problem}; remove it")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None, None
            _count_values(node, where, error, {}, ())
            return loader.construct_document(node), node
        finally:
            loader.dispose()
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        reason = one_line(str(getattr(problem, "problem", None) or problem))
        hint = "indent with spaces, not tabs" if "'\\t'" in reason else "check indentation, colons and quotes there"
        raise error(f"{place}: not valid YAML: {reason}; {hint}") from None
    except RecursionError:
        raise error(f"{where}: is nested more than {MAX_DEPTH} levels deep; make it flatter") from None
    except (ValueError, OverflowError, TypeError) as problem:
        raise error(f"{where}: holds a value that cannot be read ({one_line(problem, 120)}); quote it") from None


def _count_values(node: yaml.Node, where: str, error: Kind, counted: dict[int, int], above: tuple[int, ...]) -> int:
    """Values below a node with its aliases unfolded; checks tags, numbers, nesting and doubled keys."""
    line = f"{where}:{node.start_mark.line + 1}"
    if id(node) in above:
        raise error(f"{line}: an alias that contains itself; write the values out")
    if id(node) in counted:
        return counted[id(node)]
    if len(above) >= MAX_DEPTH:
        raise error(f"{line}: is nested more than {MAX_DEPTH} levels deep; make it flatter")
    if node.tag not in _TAGS:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise error(f"{line}: not valid YAML here: the tag {tag:.60}, and only plain values are read; remove it")
    count, below = 1, (*above, id(node))
    if isinstance(node, yaml.ScalarNode):
        if problem := bad_text(node.value):
            raise error(f"{line}: {problem}; remove it")
        if node.tag.endswith(":int") and len(node.value) > 22:
            raise error(f"{line}: a whole number of {len(node.value)} characters; 64 bits is the most, or quote it")
    elif isinstance(node, yaml.SequenceNode):
        count += sum(_count_values(child, where, error, counted, below) for child in node.value)
    elif isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise error(f"{where}:{key.start_mark.line + 1}: a key must be plain text, found a {key.id}")
            count += _count_values(key, where, error, counted, below)
            count += _count_values(child, where, error, counted, below)
    if count > MAX_VALUES:
        raise error(f"{line}: holds more than {MAX_VALUES:,} values, its aliases unfolded; write fewer")
    counted[id(node)] = count
    return count


def yaml_keys(node: yaml.Node | None, where: str, error: Kind = InputError) -> dict[str, int]:
    """dotted.key -> line of each mapping key. Raises `error` for one given twice, of which YAML would keep the last."""
    lines: dict[str, int] = {}
    _index_keys(node, where, error, "", lines)
    return lines


def _index_keys(node: yaml.Node | None, where: str, error: Kind, prefix: str, lines: dict[str, int]) -> None:
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _index_keys(child, where, error, f"{prefix}[].", {})
    if not isinstance(node, yaml.MappingNode):
        return
    for key_node, value_node in node.value:
        line, key = key_node.start_mark.line + 1, f"{prefix}{key_node.value}"
        if key in lines and key_node.value != "<<":
            raise error(f"{where}:{line}: {key} is given twice (first in line {lines[key]}); keep one of them")
        lines[key] = line
        _index_keys(value_node, where, error, f"{key}.", lines)
