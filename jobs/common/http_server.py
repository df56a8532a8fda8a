"""What the HTTP servers of the commands share: whom they answer, how they listen, and when they end."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.core.errors import InputError

if TYPE_CHECKING:
    from aiohttp import web

LOCAL = ("127.0.0.1", "localhost", "::1")
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def allowed_hosts(host: str, names: Sequence[str]) -> list[str] | None:
    """What clients may call a server that listens on `host`; None: anything.

    Other machines know this one by names that it cannot know: there the token keeps strangers out.
    """
    return [*LOCAL, *(name.lower() for name in names)] if host in LOCAL or names else None


def refused_host(request: web.Request, hosts: Sequence[str] | None) -> str | None:
    """One line if the Host header is none of `hosts`: DNS rebinding, a web page whose name was pointed at this
    machine once it was loaded."""
    host = _without_port(request.headers.get("Host", ""))
    if hosts is None or host in hosts or _is_loopback(host):
        return None
    return f"found the host {host[:80]!r} in the request; use localhost, or start with --allow-host"


def _without_port(host: str) -> str:
    """The name in a Host header: `[::1]:80` -> `::1`."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower().rstrip(".")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def listen(runner: web.AppRunner, host: str, port: int) -> str:
    """`http://HOST:PORT` of the application, which is set up. Raises `InputError` if the port cannot be listened on."""
    from aiohttp import web

    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        raise InputError(
            f"--host {host} --port {port}: cannot be listened on ({error.strerror or error}); choose another, "
            "or --port 0 for a free one"
        ) from None
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{runner.addresses[0][1]}"


async def until_stopped() -> None:
    """Returns at SIGINT, SIGTERM or SIGHUP; a second signal then ends the process at once."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, stop.set)
    try:
        await stop.wait()
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
