"""Makes bad and odd inputs from good ones: values, texts and bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    10**30,
    1e23,
    1e308,
    -0.5,
    "",
    " ",
    "x" * 5000,
    "../../etc/passwd",
    "/dev/zero",
    "a\x00b",
    "\u202e",
    "http://me:secret@host/x",
    [],
    [[]],
    {},
    {"a": {"b": 1}},
    [1, "a", None],
    "2020-01-01",
    "~",
    "-",
    "${HOME}",
    "nan",
]
"""Values for a key of any type."""

DEEP = json.loads("[" * 60 + "]" * 60)
YAML_TEXTS = [
    "",
    "\ufeff",
    "a",
    "- 1\n- 2",
    "a: b: c",
    "a: [1, 2",
    "\ta: 1",
    "a: 1\na: 2",
    "? [a]\n: 1",
    "a: !!python/object:os.system x",
    "a: !!binary aGk=",
    "a: &a [*a]",
    "a: *b",
    "%YAML 9.9\n---\na: 1",
    "---\na: 1\n---\nb: 2",
    "a: 1e999999",
    "a: .nan",
    "a: 2020-13-45",
    "a: 0x" + "f" * 300,
    "1: 2",
    "null: 1",
    "a: " + "9" * 5000,
    "a: " + "[" * 300 + "]" * 300,
    "a: &x ["
    + "1," * 50
    + "]\n"
    + "".join(f"b{i}: &x{i} [*x{i - 1 if i else ''}, *x{i - 1 if i else ''}]\n" for i in range(20)),
    "a: '\\ud800'",
    'a: "\\ud800"',
    "a: |\n" + "  x\n" * 2000,
    "\x00",
    "a: \x07",
    "a: {b: {c: {d: {e: {f: 1}}}}}",
    "=: 1",
    "<<: 1",
    "<<: {a: 1}",
    "a: <<",
    "!!set {a, b}",
    "a: 1_000",
    "a: 1:30",
    "a: 08",
    "on: off",
    "a: \u2028b",
    "generator: 1",
]
JSON_TEXTS = [
    "",
    "{",
    "}",
    "[]",
    "1",
    '"a"',
    "null",
    "{}",
    '{"a": 1, "a": 2}',
    '{"a": NaN}',
    '{"a": 1e999}',
    '{"a": ' + "9" * 5000 + "}",
    '{"a": "\\ud800"}',
    "[" * 2000 + "]" * 2000,
    '{"a": [1, 2}',
    "{'a': 1}",
    '\ufeff{"a": 1}',
    '{"a": 1} x',
    "\x00",
    '{"step": "1"}',
    '{"step": -1}',
    '{"step": 1e99}',
    '{"step": [1]}',
    '{"step": {}}',
    '{"prompt": 1}',
    '{"prompt": null}',
    '{"prompt": ""}',
    '{"prompt": "a", "negative": 3}',
    '{"prompt": "a", "image": "../../etc/passwd"}',
    "true",
    "-",
    "[1,]",
    '{"prompt": "a", "image": "/dev/zero"}',
    '{"prompt": "a", "unknown": 1}',
    '{"prompt": "a", "metadata": 7}',
    '{"prompt": "' + "a" * 100_000 + '"}',
    '{"prompt": "a", "metadata": {"rewards": ["nobody"]}}',
    '{"prompt": ["a"]}',
]


def damaged(data: bytes, rng: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """(what was done, the bytes): cut, flipped, filled, repeated, shuffled."""
    size = len(data)
    for _ in range(count):
        kind = rng.choice(["cut", "flip", "flips", "zeros", "insert", "swap", "tail", "head"])
        at = rng.randrange(max(1, size))
        if kind == "cut":
            yield f"cut at {at}", data[:at]
        elif kind == "flip":
            yield f"flip at {at}", data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        elif kind == "flips":
            changed = bytearray(data)
            for _ in range(20):
                changed[rng.randrange(size)] = rng.randrange(256)
            yield "20 bytes changed", bytes(changed)
        elif kind == "zeros":
            length = rng.randrange(1, 64)
            yield f"{length} zeros at {at}", data[:at] + bytes(length) + data[at + length :]
        elif kind == "insert":
            yield f"inserted at {at}", data[:at] + rng.randbytes(rng.randrange(1, 40)) + data[at:]
        elif kind == "swap":
            yield f"halves swapped at {at}", data[at:] + data[:at]
        elif kind == "tail":
            yield "garbage at the end", data + rng.randbytes(100)
        else:
            yield "another head", rng.randbytes(16) + data[16:]


def changed_values(plain: Any, rng: random.Random, count: int) -> Iterator[tuple[str, Any]]:
    """(path, a copy with another value there, or without it) of a JSON-able value."""
    paths = list(_paths(plain, ()))
    for _ in range(count):
        path = rng.choice(paths)
        copy = json.loads(json.dumps(plain))
        at = copy
        for step in path[:-1]:
            at = at[step]
        value = rng.choice([*VALUES, DEEP, "remove"])
        if value == "remove":
            del at[path[-1]]
        else:
            at[path[-1]] = value
        yield f"{'.'.join(map(str, path))} = {str(value)[:30]!r}", copy


def _paths(plain: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    items = plain.items() if isinstance(plain, dict) else enumerate(plain) if isinstance(plain, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _paths(value, (*path, key))
