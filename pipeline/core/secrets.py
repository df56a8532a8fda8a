"""Keeps secrets out of what a run writes and prints: one `mask` of values, applied at every sink.

Sinks: stdout and stderr (`masked_streams`), run.log, tables of scores, config.yaml, the report, summary.json, trackers,
answers of `serve-reward`, and error messages before they are cut to a length.

A value is secret when it stands in an environment variable, or under a config key, with a name such as OPENAI_API_KEY;
in a variable that a config names (`api_key_env`); in `runtime_env.env_vars`, unless it is plainly a path or a number;
or when its form says so (the user:password of a URL, `Bearer …`, a private key).
"""

from __future__ import annotations

import functools
import html
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any
from urllib.parse import parse_qsl, quote, quote_plus, urlsplit

MASK = "***"
MIN_LENGTH = 6  # characters; shorter values would mask parts of ordinary words
_NAME = re.compile(
    r"secret|passw|passphrase|api_?key|credential|private_?key|access_?key"
    r"|(?:^|[_.-])(?:token|pwd|pass|pat|key|auth|dsn|bearer|cookie)(?:$|[_.-])|(?:auth|access|api|bearer)token",
    re.IGNORECASE,
)
_HARMLESS = re.compile(r"[./~][^\s]*|[\d.,:x-]+|true|false|none|null|default|disabled|enabled", re.IGNORECASE)
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://[^\s'\"<>]*")
_FORMS = (
    (re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]{0,20}://)[^\s/?#'\"<>@]+@"), rf"\1{MASK}@"),
    (re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{12,}"), rf"\1 {MASK}"),
    (
        re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
        f"(private key) {MASK}",
    ),
    (re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,})"), MASK),
)
_registered: set[str] = set()


@functools.lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether a variable or key of this name holds a secret; `api_key_env` holds the name of a variable."""
    return bool(_NAME.search(name)) and not name.lower().endswith(("_env", "_file", "_path", "_dir"))


def register(value: str) -> None:
    """Masks `value` from now on, in this process."""
    if len(value) >= MIN_LENGTH and not _HARMLESS.fullmatch(value):
        _registered.add(value)


def register_tree(plain: Any) -> None:
    """Masks the secrets of a config from now on: see the module's description."""
    for key, value, in_env_vars in _leaves(plain):
        if key.endswith("_env"):
            register(os.environ.get(value, ""))
        elif in_env_vars or is_secret_name(key):
            register(value)


def mask(text: str) -> str:
    """`text` with *** in place of every known secret."""
    pattern = _pattern(_values())
    if pattern is not None:
        text = pattern.sub(MASK, text)
    for form, replacement in _FORMS:
        text = form.sub(replacement, text)
    return text


def mask_tree(plain: Any) -> Any:
    """A JSON-able value with *** in place of secrets, also of those whose key alone tells."""
    return _masked(plain, "", False)


def credentials_in_urls(plain: Any) -> Iterator[str]:
    """Dotted keys of the texts with a URL that holds a password or token: `user:password@`, `?api_key=…`. Variables of
    `env_vars` may hold such URLs; they are masked."""
    for path, value in texts_of(plain, ""):
        if ".env_vars." not in f".{path}." and any(_holds_credentials(url) for url in _URL.findall(value)):
            yield path


def _holds_credentials(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    user, at, _ = parts.netloc.rpartition("@")
    login_only = parts.scheme.split("+")[-1] in ("ssh", "sftp") and ":" not in user  # ssh://git@host: no secret
    return (bool(at and user) and not login_only) or any(is_secret_name(key) for key, _ in parse_qsl(parts.query))


@contextmanager
def masked_streams() -> Iterator[None]:
    """Within the block, what Python code writes to stdout and stderr is masked."""
    before = {"stdout": sys.stdout, "stderr": sys.stderr}
    mask_streams()
    try:
        yield
    finally:
        for name, stream in before.items():
            if isinstance(getattr(sys, name), _Masked):  # else replaced meanwhile, as for a reader that has gone
                setattr(sys, name, stream)


def mask_streams() -> None:
    """What Python code writes to stdout and stderr is masked for the rest of the process."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Masked):
            setattr(sys, name, _Masked(stream))


class _Masked:
    """A text stream whose writes are masked; everything else is the stream's own."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(mask(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


# ----------------------------------------------------------------------------------------------- what is secret


def _values() -> frozenset[str]:
    named = {
        value
        for name, value in os.environ.items()
        if len(value) >= MIN_LENGTH and is_secret_name(name) and not _HARMLESS.fullmatch(value)
    }
    return frozenset(named | _registered)


@functools.lru_cache(maxsize=8)
def _pattern(values: frozenset[str]) -> re.Pattern[str] | None:
    """Matches the values as they are, and as URLs, JSON, HTML and error messages show them."""
    forms = set()
    for value in values:
        forms |= {value, " ".join(value.split()), quote(value, safe=""), quote_plus(value), html.escape(value)}
        forms |= {json.dumps(value)[1:-1], repr(value)[1:-1]}
    longest_first = sorted((form for form in forms if len(form) >= MIN_LENGTH), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _leaves(plain: Any, key: str = "", in_env_vars: bool = False) -> Iterator[tuple[str, str, bool]]:
    """(key, text, whether it stands in `env_vars`) of all texts."""
    if isinstance(plain, Mapping):
        for name, value in plain.items():
            yield from _leaves(value, str(name), in_env_vars or key == "env_vars")
    elif isinstance(plain, list | tuple):
        for value in plain:
            yield from _leaves(value, key, in_env_vars)
    elif isinstance(plain, str):
        yield key, plain, in_env_vars or key == "env_vars"


def texts_of(plain: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of all texts in mappings and lists."""
    if isinstance(plain, Mapping):
        for name, value in plain.items():
            yield from texts_of(value, f"{path}.{name}" if path else str(name))
    elif isinstance(plain, list | tuple):
        for value in plain:
            yield from texts_of(value, path)
    elif isinstance(plain, str):
        yield path, plain


def _masked(plain: Any, key: str, in_env_vars: bool) -> Any:
    if isinstance(plain, Mapping):
        inside = in_env_vars or key == "env_vars"
        return {name: _masked(value, str(name), inside) for name, value in plain.items()}
    if isinstance(plain, list | tuple):
        return [_masked(value, key, in_env_vars) for value in plain]
    if not isinstance(plain, str):
        return plain
    named = is_secret_name(key) or (in_env_vars and len(plain) >= MIN_LENGTH)
    return MASK if named and plain and not _HARMLESS.fullmatch(plain) else mask(plain)
