"""The web server of `rushes label`. Every path begins with the token:

    GET  /TOKEN/               the page (label_page.html)
    GET  /TOKEN/state?rater=   the rater's next pair and progress
    POST /TOKEN/answer         {rater, task, choice}, choice the ID of the better take, tie or skip; answered with the
                               state once the answer is on the disk
    POST /TOKEN/undo           {rater, id}: takes the rater's last answer back; answered with the state
    GET  /TOKEN/media/ID       a take

Errors are {"error": "one line"}: 401 wrong token, 404, 415 not JSON, 421 another host's name, 422 a fault of the
request or of a take, 500 the answer could not be written.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

from jobs.common.http_server import LOCAL, listen, refused_host, until_stopped
from jobs.common.label_session import LabelSession, rater_name
from jobs.common.label_takes import Take
from pipeline.core.errors import InputError, RushesError
from pipeline.core.media import read_media
from pipeline.core.media_kinds import media_kind
from pipeline.core.reading import parse_json_object
from pipeline.core.safe_paths import file_inside

PAGE = Path(__file__).with_name("label_page.html")
# What browsers show, by the kind of its first bytes. A Matroska file is mostly a webm.
_TYPES = {"mp4": "video/mp4", "mkv": "video/webm"} | {
    kind: f"image/{kind.lower()}" for kind in ("PNG", "JPEG", "BMP", "GIF", "WebP")
}
_HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",  # the address holds the token
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}
log = logging.getLogger("rushes.label")


class LabelService:
    """`root`: the folder that all takes lie in. `say`: is given one line for each take that cannot be shown."""

    def __init__(
        self,
        session: LabelSession,
        root: Path,
        token: str,
        say: Callable[[str], None],
        hosts: Sequence[str] | None = LOCAL,
    ) -> None:
        self.session, self.root, self.hosts = session, root, hosts
        self._token, self._say = token.encode(), say
        self._types: dict[str, str] = {}  # content types of the takes that can be shown, by name
        self.app = web.Application(middlewares=[self._answered], client_max_size=2**16)
        self.app.add_routes(
            [
                web.get("/{token}/", self.page),
                web.get("/{token}/state", self.state),
                web.post("/{token}/answer", self.answer),
                web.post("/{token}/undo", self.undo),
                web.get("/{token}/media/{id}", self.media),
            ]
        )

    @web.middleware
    async def _answered(self, request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            response = self._refusal(request) or await handler(request)
        except web.HTTPException as error:
            response = _error(error.status, f"{request.method}: {error.reason}")
        except InputError as error:
            response = _error(422, str(error))
        except RushesError as error:  # the disk is full
            self._say(f"not saved: {error}")
            response = _error(500, f"not saved: {error}")
        except Exception as error:  # a bug: its request gets a 500, the server keeps running
            log.error("a request failed", exc_info=error)
            response = _error(500, f"the server failed on this request ({type(error).__name__}); its log says where")
        response.headers.update(_HEADERS)
        return response

    def _refusal(self, request: web.Request) -> web.Response | None:
        """Host, token, content type."""
        if problem := refused_host(request, self.hosts):
            return _error(421, problem)
        given = request.path.split("/")[1].encode("utf-8", "replace")
        if not hmac.compare_digest(given, self._token):
            return _error(401, "wrong or missing token; open the link that `rushes label` printed")
        if request.method == "POST" and request.content_type != "application/json":
            # also keeps web pages out: a browser asks leave before it sends JSON to another site
            return _error(415, f"found the content type {request.content_type}; send application/json")
        return None

    async def page(self, _request: web.Request) -> web.Response:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src blob: data:; "
            "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        text = PAGE.read_text("utf-8").replace("@NONCE@", nonce)
        return web.Response(text=text, content_type="text/html", headers={"Content-Security-Policy": policy})

    async def state(self, request: web.Request) -> web.Response:
        return await self._state(rater_name(request.query.get("rater")))

    async def answer(self, request: web.Request) -> web.Response:
        body = await _body(request)
        rater = rater_name(body.get("rater"))
        self.session.answer(rater, body.get("task"), body.get("choice"))
        return await self._state(rater)

    async def undo(self, request: web.Request) -> web.Response:
        body = await _body(request)
        rater = rater_name(body.get("rater"))
        self.session.undo(rater, body.get("id"))
        return await self._state(rater)

    async def media(self, request: web.Request) -> web.StreamResponse:
        take = self.session.takes.get(request.match_info["id"])
        if take is None:
            return _error(404, "no such take in this session")
        path = self._path(take)
        return web.FileResponse(path, headers={"Content-Type": _content_type(path)})

    async def _state(self, rater: str) -> web.Response:
        """Looks at the takes of the next pair first: what cannot be decoded is left out, with a line on the console."""
        while (task := self.session.next_task(rater)) is not None:
            checked = [await self._is_usable(take) for take in (task.pair.a, task.pair.b)]
            if all(checked):
                break
        state = self.session.state(rater)
        if task is not None:
            kinds = [self._types[take.name].partition("/")[0] for take in self.session.sides(rater, task)]
            state["task"] |= {"left_kind": kinds[0], "right_kind": kinds[1]}
        return web.json_response(state)

    async def _is_usable(self, take: Take) -> bool:
        if take.name not in self._types and take.name not in self.session.unusable:
            try:
                content_type = await asyncio.to_thread(self._check, take)
            except RushesError as error:
                if take.name not in self.session.unusable:  # two raters may have come to it at once
                    self._say(f"left out: {error}")
                self.session.unusable[take.name] = str(error)
            else:
                self._types[take.name] = content_type
        return take.name not in self.session.unusable

    def _check(self, take: Take) -> str:
        """The content type of a take that can be decoded. Raises `InputError`."""
        path = self._path(take)
        content_type = _content_type(path)
        read_media(path)
        return content_type

    def _path(self, take: Take) -> Path:
        """The file, which must still be in `root` (it may have become a link since)."""
        return file_inside(self.root, str(take.path), "take", "put the file back")


def _content_type(path: Path) -> str:
    kind = media_kind(path).name
    if kind not in _TYPES:
        raise InputError(f"{path}: is {kind}, which browsers do not play; convert it to mp4")
    return _TYPES[kind]


async def _body(request: web.Request) -> dict[str, Any]:
    return parse_json_object(await request.read(), "the request", "send a JSON object")


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": message}, status=status)


async def serve(service: LabelService, token: str, host: str, port: int, on_start: Callable[[str], None]) -> None:
    """Serves until SIGINT, SIGTERM or SIGHUP. `on_start` is given the page's address. Raises `InputError`."""
    runner = web.AppRunner(service.app, access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    try:
        url = await listen(runner, host, port)
        on_start(f"{url}/{token}/")
        await until_stopped()
    finally:
        await runner.cleanup()
