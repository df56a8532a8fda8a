"""JSON over HTTP for scorers that call another program: time limit, retries, size limit, no redirects, no pickle."""

from __future__ import annotations

import base64
import http.client
import io
import json
import logging
import os
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

import numpy as np

from pipeline.config.messages import show
from pipeline.core.deadline import within
from pipeline.core.errors import ConfigError, RewardAway, RewardError, RewardUnavailable, one_line
from pipeline.core.secrets import credentials_in_urls, register
from pipeline.rewards.models.images import shrunk

MAX_ANSWER = 32 * 1024 * 1024  # bytes
log = logging.getLogger("rushes.http")
_AWAY_STATUS = {408, 425, 429, 502, 503, 504}  # come again later
_TRANSIENT = _AWAY_STATUS | {409, 500}
_FATAL_STATUS = {401, 402, 403, 404, 405, 407}  # retrying cannot help, whatever is sent


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the API key to wherever it points."""

    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        return None


class JsonClient:
    """Posts JSON to one server. `post` returns the decoded answer or raises `RewardError`, `RewardUnavailable` when the
    server refuses every request, `RewardAway` when it may be back later; thread-safe."""

    def __init__(
        self, url: str, api_key_env: str | None = None, timeout_s: float = 60.0, retries: int = 2, pause_s: float = 0.5
    ) -> None:
        """`retries`: further tries after a time-out, no connection, a 429 or 5xx, or an answer that is no JSON."""
        parts = urllib.parse.urlsplit(str(url))
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"found the address {url!r}; expected http://host:port/… or https://…")
        if list(credentials_in_urls(str(url))):
            raise ConfigError("url: holds credentials; put them into a variable that api_key_env names")
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise ConfigError(f"retries: found {show(retries)}; expected a whole number of at least 0")
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s < float("inf"):
            raise ConfigError(f"timeout_s: found {show(timeout_s)}; expected seconds above 0")
        self.url, self.timeout_s, self.retries, self.pause_s = str(url).rstrip("/"), float(timeout_s), retries, pause_s
        self.headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "rushes"}
        if api_key_env:
            if not os.environ.get(api_key_env):
                raise ConfigError(f"api_key_env: the environment variable {api_key_env} is not set; set it to the key")
            register(os.environ[api_key_env])
            self.headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"
        handlers: list[Any] = [_NoRedirect()]
        if parts.hostname in ("127.0.0.1", "localhost", "::1"):
            handlers.append(urllib.request.ProxyHandler({}))
        self.opener = urllib.request.build_opener(*handlers)

    def post(self, path: str, payload: Any) -> Any:
        data = json.dumps(payload, allow_nan=False).encode()
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.pause_s * 2 ** (attempt - 1))
            try:
                return self._once(self.url + path, data)
            except _Retryable as error:
                last = error
        kind = RewardAway if isinstance(last, _Away) else RewardUnavailable
        tries = f" ({self.retries + 1} tries)" if self.retries else ""
        raise kind(f"{self.url}{path}: {last}{tries}") from last.__cause__

    def _once(self, url: str, data: bytes) -> Any:
        """One try; `timeout_s` covers the look-up of the name, the connection, sending, headers and body together: a
        socket's own time-out begins again with every byte."""
        try:
            return within(self.timeout_s, lambda: self._exchange(url, data), url, log)
        except TimeoutError as error:
            raise _Away(f"no answer within {self.timeout_s:g} s") from error

    def _exchange(self, url: str, data: bytes) -> Any:
        deadline = time.monotonic() + self.timeout_s
        request = urllib.request.Request(url, data=data, headers=self.headers, method="POST")
        try:
            with self.opener.open(request, timeout=self.timeout_s) as answer:
                body = _read(answer, deadline)
        except urllib.error.HTTPError as error:
            with error:
                text = " ".join(error.read(2000).decode("utf-8", "replace").split())[:200]
            message = f"the server answered {error.code} {error.reason}{': ' + text if text else ''}"
            if error.code in _TRANSIENT:
                raise (_Away if error.code in _AWAY_STATUS else _Retryable)(message) from error
            refused = RewardUnavailable if error.code in _FATAL_STATUS else RewardError
            raise refused(f"{url}: {message}") from error
        except TimeoutError as error:
            raise _Away(f"no answer within {self.timeout_s:g} s") from error
        except (urllib.error.URLError, OSError, urllib.error.ContentTooShortError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _Away(f"no answer within {self.timeout_s:g} s") from error
            kind = _Retryable if isinstance(reason, ssl.SSLCertVerificationError) else _Away
            raise kind(f"cannot be reached ({reason})") from error
        except http.client.IncompleteRead as error:
            raise _Away("the connection ended in the middle of the answer") from error
        except Exception as error:  # http.client raises its own tree for broken answers
            raise _Retryable(f"broken answer ({type(error).__name__}: {one_line(error)})") from error
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise _Retryable(f"the answer is not JSON: {body[:60]!r}") from error


class _Retryable(Exception):
    """A failure that another attempt may not have."""


class _Away(_Retryable):
    """No server was there, or it asked to come again: says nothing about what was sent."""


def _read(answer: Any, deadline: float) -> bytes:
    """The body, within the deadline."""
    chunks: list[bytes] = []
    size = 0
    while chunk := answer.read1(1 << 16):
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_ANSWER:
            raise _Retryable(f"the answer is longer than {MAX_ANSWER} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError
    if answer.length:  # of what Content-Length announced, this has not come; `read1` does not say so
        raise http.client.IncompleteRead(b"", answer.length)
    return b"".join(chunks)


def png_base64(frame: np.ndarray, max_side: int | None = None) -> str:
    """uint8 [H, W, 3] -> PNG (lossless, so that scores do not depend on the transport), base64."""
    buffer = io.BytesIO()
    shrunk(frame, max_side).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
