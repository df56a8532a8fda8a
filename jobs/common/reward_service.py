"""One scorer behind an HTTP server (`rushes serve-reward`).

    POST /score     the request and the answer of `pipeline.rewards.models.protocol`
    GET  /health    {"status": "ok", …}; needs no token
    GET  /schema    JSON schemas of both

Errors are {"error": "one line"}: 401 wrong token, 413 too large, 415 not JSON, 422 a fault of the request or of a take
(the line says which), 502 the scorer's own back end is unreachable, 503 too many requests waiting.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from aiohttp import web

from actors.request_queue import RequestQueue
from pipeline.config.schema import RewardConfig
from pipeline.core.errors import ConfigError, InputError, RewardError, RewardUnavailable
from pipeline.core.types import Media, PromptItem, RewardScores
from pipeline.rewards import routing
from pipeline.rewards.batching import WAIT_FOR_GROUPS_S, Takes, score_groups
from pipeline.rewards.models.protocol import (
    MAX_PIXEL_BYTES,
    Item,
    ScoreAnswer,
    decode_image,
    decode_item,
    parse_request,
    schema,
    too_many_pixels,
)
from pipeline.rewards.runner import RewardRunner, build_reward

if TYPE_CHECKING:
    from rich.console import Console

MAX_WAITING = 64  # requests; further clients get 503 and retry
SHUTDOWN_S = 60.0
LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(eq=False)
class _Work:
    """A request: its takes by shape and rate (a group each), where they stood, and what came of them."""

    groups: list[Takes]
    places: list[list[int]]
    outcomes: asyncio.Future

    @property
    def takes(self) -> int:
        return sum(len(places) for places in self.places)


class RewardService:
    """The web application around one scorer. Requests that wait at the same time are scored together as far as
    `batch_items` of the reward's config allows."""

    def __init__(self, runner: RewardRunner, token: str | None = None, max_bytes: int = 64 * 2**20) -> None:
        self.runner, self.max_bytes = runner, max_bytes
        self._token = token.encode() if token else None
        self._queue: RequestQueue[_Work] = RequestQueue("score", MAX_WAITING)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scorer")  # one model, one call at a time
        self._started = time.time()
        self._counts = {"scored": 0, "failed": 0}
        self.app = web.Application(client_max_size=max_bytes, middlewares=[self._guard])
        self.app.add_routes(
            [web.post("/score", self.score), web.get("/health", self.health), web.get("/schema", self.schema)]
        )
        self.app.cleanup_ctx.append(self._scoring)

    # ------------------------------------------------------------------------------------------- requests

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Token, size, content type; and every error as one line of JSON."""
        if request.path != "/health" and not self._allowed(request):
            return _error(
                401, "wrong or missing token; send it as: Authorization: Bearer …", "WWW-Authenticate: Bearer"
            )
        if (request.content_length or 0) > self.max_bytes:
            return self._too_large()
        if request.method == "POST" and request.content_type != "application/json":
            # also keeps web pages out: a browser asks leave before it sends JSON to another site
            return _error(415, f"found the content type {request.content_type}; send application/json")
        try:
            return await handler(request)
        except web.HTTPRequestEntityTooLarge:
            return self._too_large()
        except web.HTTPException as error:
            hint = "; there are POST /score, GET /health and GET /schema" if error.status in (404, 405) else ""
            return _error(error.status, f"{request.method} {request.path}: {error.reason}{hint}")

    def _allowed(self, request: web.Request) -> bool:
        if self._token is None:
            return True
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("utf-8", "replace"), self._token)

    def _too_large(self) -> web.Response:
        return _error(413, f"the request is larger than {self.max_bytes / 2**20:g} MB (--max-mb); send fewer items")

    async def health(self, _request: web.Request) -> web.Response:
        return web.json_response(
            {
                "status": "ok",
                "reward": self.runner.name,
                "scorer": self.runner.cfg.scorer,
                "reads": self.runner.scorer.reads,
                "uptime_s": round(time.time() - self._started, 1),
                "waiting": len(self._queue),
                **self._counts,
            }
        )

    async def schema(self, _request: web.Request) -> web.Response:
        return web.json_response(schema())

    async def score(self, request: web.Request) -> web.Response:
        body = await request.read()
        with tempfile.TemporaryDirectory(prefix="rushes-") as folder:
            return await self._score(body, Path(folder))

    async def _score(self, body: bytes, folder: Path) -> web.Response:
        """`folder`: for the prompts' own pictures, until they are scored."""
        try:
            groups, places = await asyncio.to_thread(_groups_of, body, folder)
        except InputError as error:
            return _error(422, str(error))
        if len(self._queue) >= MAX_WAITING:
            return _error(503, f"{MAX_WAITING} requests are waiting; try again in a moment", "Retry-After: 1")
        work = _Work(groups, places, asyncio.get_running_loop().create_future())
        await self._queue.put(work)
        outcomes = await work.outcomes
        for outcome, indices in zip(outcomes, places, strict=True):
            if isinstance(outcome, RewardError):
                self._counts["failed"] += work.takes
                among = f"items {', '.join(map(str, indices))}: " if len(places) > 1 else ""
                return _error(502 if isinstance(outcome, RewardUnavailable) else 422, f"{among}{outcome}")
        self._counts["scored"] += work.takes
        answer = _answer(outcomes, places)
        return web.Response(text=answer.model_dump_json(), content_type="application/json")

    # ------------------------------------------------------------------------------------------- scoring

    async def _scoring(self, _app: web.Application) -> Any:
        task = asyncio.create_task(self._loop())
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self._thread.shutdown(wait=False)

    async def _loop(self) -> None:
        cfg, loop = self.runner.cfg, asyncio.get_running_loop()
        while True:
            works = [await self._queue.get()]
            room = cfg.batch_items - works[0].takes
            works += await self._queue.take_more(room, lambda work: work.takes, WAIT_FOR_GROUPS_S)
            groups = [group for work in works for group in work.groups]
            try:
                outcomes = await loop.run_in_executor(self._thread, score_groups, self.runner, groups)
            except Exception as error:  # a bug: these requests get a 500, the server keeps running
                for work in works:
                    work.outcomes.set_exception(error)
                continue
            for work in works:
                own, outcomes = outcomes[: len(work.groups)], outcomes[len(work.groups) :]
                if not work.outcomes.done():
                    work.outcomes.set_result(own)


def _groups_of(body: bytes, folder: Path) -> tuple[list[Takes], list[list[int]]]:
    """Decodes a request. Takes of one size, length and rate form a group; a prompt's index tells takes of the same
    prompt, as a tournament needs. Raises `InputError`."""
    items = parse_request(body).items
    texts = list(dict.fromkeys(item.prompt for item in items))
    media: list[Media] = []
    images: list[str | None] = []
    buckets: dict[tuple, list[int]] = {}
    decoded = 0
    for number, item in enumerate(items):
        one = decode_item(item, number)
        image, size = decode_image(item, number, folder)
        decoded += one.frames.nbytes + size
        if decoded > MAX_PIXEL_BYTES:
            raise InputError(f"items: {too_many_pixels(decoded)}")
        media.append(one)
        images.append(image)
        buckets.setdefault((one.frames.shape[1:], one.fps), []).append(number)
    groups = []
    for (_, fps), numbers in buckets.items():
        prompts = [_prompt(items[n], texts, images[n]) for n in numbers]
        groups.append(Takes(Media(frames=np.concatenate([media[n].frames for n in numbers]), fps=fps), prompts, None))
    return groups, list(buckets.values())


def _prompt(item: Item, texts: list[str], image: str | None) -> PromptItem:
    metadata = {key: value for key, value in item.metadata.items() if key != routing.KEY}  # the client's own business
    return PromptItem(index=texts.index(item.prompt), text=item.prompt, image=image, metadata=metadata)


def _answer(outcomes: Sequence[RewardScores], places: Sequence[Sequence[int]]) -> ScoreAnswer:
    count = sum(len(indices) for indices in places)
    scores = [0.0] * count
    parts: dict[str, list[float | None]] = {name: [None] * count for outcome in outcomes for name in outcome.parts}
    for outcome, indices in zip(outcomes, places, strict=True):
        for k, place in enumerate(indices):
            scores[place] = float(outcome.values[k])
            for name, values in outcome.parts.items():
                parts[name][place] = float(values[k]) if math.isfinite(values[k]) else None
    return ScoreAnswer(scores=scores, parts=parts)


def _error(status: int, message: str, header: str = "") -> web.Response:
    name, _, value = header.partition(": ")
    return web.json_response({"error": message}, status=status, headers={name: value} if header else None)


# ------------------------------------------------------------------------------------------------ the server


def serve(
    name: str, cfg: RewardConfig, *, host: str, port: int, token_env: str | None, max_mb: float, console: Console
) -> None:
    """Serves until SIGINT or SIGTERM, then finishes the pending requests. Raises `RushesError`."""
    token = os.environ.get(token_env) if token_env else None
    if token_env and not token:
        raise ConfigError(f"--token-env: the environment variable {token_env} is not set; set it to the token")
    service = RewardService(build_reward(name, cfg), token, int(max_mb * 2**20))
    if host not in LOCAL and token is None:
        console.print(f"warning: anyone who can reach {host} can use this server; give --token-env", style="yellow")
    asyncio.run(_serve(service, host, port, console))


async def _serve(service: RewardService, host: str, port: int, console: Console) -> None:
    runner = web.AppRunner(service.app, access_log=None, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise InputError(
                f"--host {host} --port {port}: cannot be listened on ({error.strerror or error}); choose another, "
                "or --port 0 for a free one"
            ) from None
        shown = f"[{host}]" if ":" in host else host
        console.print(
            f"{service.runner.name} is served at http://{shown}:{runner.addresses[0][1]}/score (Ctrl-C ends it)",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        await stop.wait()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)  # a second signal ends the process at once
        console.print("finishing the pending requests")
    finally:
        await runner.cleanup()
