"""One scorer behind an HTTP server (`rushes serve-reward`).

    POST /score     the request and the answer of `pipeline.rewards.models.protocol`
    GET  /health    {"status": "ok", …}; or 503 {"status": "failed", "error": …}: nothing is scored; needs no token
    GET  /schema    JSON schemas of both

Errors are {"error": "one line"}: 401 wrong token, 408 the body took too long, 413 too large, 415 not JSON, 421 another
host's name, 422 a fault of the request or of a take (the line says which), 500 the scorer broke, 502 the scorer's own
back end is unreachable, 503 no memory is free in time, or nothing is scored (see /health).

A request takes memory in three steps: its body as it arrives, its JSON, its pictures. Each step has its own share of
the server's budget (`SHARES`), is measured before it is taken, and waits for the next step while it holds the ones
before: since the order is the same for all, requests never wait for each other in a circle.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiohttp import web

from jobs.common.http_server import LOCAL, allowed_hosts, listen, refused_host, until_stopped
from jobs.common.memory_budget import GrowingReservation, MemoryBudget, NoRoom, TooLarge
from jobs.common.score_request import decode_takes, decoding_size, parsing_size
from jobs.common.scoring_loop import NotScoring, ScorerBroken, ScoringLoop, Work
from pipeline.config.schema import RewardConfig
from pipeline.core.errors import ConfigError, InputError, RewardError, RewardUnavailable
from pipeline.core.secrets import mask, register
from pipeline.core.types import RewardScores
from pipeline.rewards.models.protocol import ScoreAnswer, parse_request, schema
from pipeline.rewards.runner import RewardRunner, build_reward

if TYPE_CHECKING:
    from rich.console import Console

SHARES = {"bodies": 1 / 8, "parsed": 1 / 8, "decoded": 3 / 4}
HEADERS_S = 15.0  # seconds for a request's headers, and between requests of one connection
BODY_S, BODY_RATE = 10.0, 2**20  # a body may take BODY_S and a second for each BODY_RATE bytes
MEMORY_S = 30.0  # seconds that a request waits for memory, at each step
ANSWER_S = 30.0  # seconds for a client to take its answer
SHUTDOWN_S = 30.0
log = logging.getLogger("rushes.server")


class RewardService:
    """The web application around one scorer. Requests that wait at the same time are scored together as far as
    `batch_items` of the reward's config allows.

    `max_bytes`: of one body. `memory`: bytes that all requests together may take, the scorer's own not counted.
    `hosts`: what clients may call the server in their Host header; None: anything.
    """

    def __init__(
        self,
        runner: RewardRunner,
        token: str | None = None,
        max_bytes: int = 64 * 2**20,
        memory: int = 4 * 2**30,
        stuck_s: float = 120.0,
        hosts: Sequence[str] | None = LOCAL,
    ) -> None:
        self.runner, self.max_bytes, self.hosts = runner, max_bytes, hosts
        self.scoring = ScoringLoop(runner, stuck_s)
        self._token = token.encode() if token else None
        self._memory = {step: MemoryBudget(int(share * memory)) for step, share in SHARES.items()}
        self._cpu = ThreadPoolExecutor(2, thread_name_prefix="decoder")  # a large request leaves one for the others
        self._started = time.time()
        self._counts = {"scored": 0, "failed": 0}
        self.app = web.Application(middlewares=[self._answered, self._guard])
        self.app.add_routes(
            [web.post("/score", self.score), web.get("/health", self.health), web.get("/schema", self.schema)]
        )
        self.app.cleanup_ctx.append(self.scoring.running)

    # ------------------------------------------------------------------------------------------- every request

    @web.middleware
    async def _answered(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Every failure as one line of JSON, and a deadline for clients that do not read their answer."""
        try:
            response = await handler(request)
        except web.HTTPException as error:
            hint = "; there are POST /score, GET /health and GET /schema" if error.status in (404, 405) else ""
            response = _error(error.status, f"{request.method} {request.path}: {error.reason}{hint}")
        except (TooLarge, web.HTTPRequestEntityTooLarge):
            response = _error(
                413, "the request takes more memory than the server has for requests (--memory-gb); send fewer items"
            )
        except NoRoom:
            response = _error(503, "the server has no memory free for this request; try again", "Retry-After: 1")
        except NotScoring as error:
            response = _error(503, f"nothing is scored: {error}")
        except ScorerBroken as error:
            response = _error(500, str(error))
        except InputError as error:
            response = _error(422, str(error))
        except Exception as error:  # a bug: its request gets a 500, the server keeps running
            log.error("a request failed", exc_info=error)
            response = _error(500, f"the server failed on this request ({type(error).__name__}); its log says where")
        try:
            async with asyncio.timeout(ANSWER_S):
                await response.prepare(request)
                await response.write_eof()
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        return response

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        """Host, token, size, content type."""
        if problem := refused_host(request, self.hosts):
            return _error(421, problem)
        if request.path != "/health" and not self._allowed(request):
            return _error(
                401, "wrong or missing token; send it as: Authorization: Bearer …", "WWW-Authenticate: Bearer"
            )
        if (request.content_length or 0) > self.max_bytes:
            return self._too_large()
        if coding := request.headers.get("Content-Encoding"):  # a small body could become a very large one
            return _error(415, f"found the content encoding {coding[:40]}; send the body as it is")
        if request.method == "POST" and request.content_type != "application/json":
            # also keeps web pages out: a browser asks leave before it sends JSON to another site
            return _error(415, f"found the content type {request.content_type}; send application/json")
        return await handler(request)

    def _allowed(self, request: web.Request) -> bool:
        if self._token is None:
            return True
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("utf-8", "replace"), self._token)

    def _too_large(self) -> web.Response:
        return _error(413, f"the request is larger than {self.max_bytes / 2**20:g} MB (--max-mb); send fewer items")

    # ------------------------------------------------------------------------------------------- the three paths

    async def health(self, _request: web.Request) -> web.Response:
        problem = self.scoring.problem
        state = {"status": "failed", "error": problem} if problem else {"status": "ok"}
        return web.json_response(
            {
                **state,
                "reward": self.runner.name,
                "scorer": self.runner.cfg.scorer,
                "reads": self.runner.scorer.reads,
                "uptime_s": round(time.time() - self._started, 1),
                "waiting": len(self.scoring.queue),
                "call_s": self.scoring.call_s,
                "memory_mb": {step: round((b.total - b.free) / 2**20, 1) for step, b in self._memory.items()},
                **self._counts,
            },
            status=503 if problem else 200,
        )

    async def schema(self, _request: web.Request) -> web.Response:
        return web.json_response(schema())

    async def score(self, request: web.Request) -> web.Response:
        if problem := self.scoring.problem:
            raise NotScoring(problem)
        run, loop = self._cpu, asyncio.get_running_loop()
        with ExitStack() as held:
            arriving = held.enter_context(GrowingReservation(self._memory["bodies"]))
            body = await self._body(request, arriving)
            if body is None:
                return self._too_large()
            if isinstance(body, web.Response):
                return body
            held.enter_context(await self._memory["parsed"].reserve(parsing_size(body), MEMORY_S))
            asked = await loop.run_in_executor(run, parse_request, body)
            del body
            arriving.release()
            size = await loop.run_in_executor(run, decoding_size, asked)
            held.enter_context(await self._memory["decoded"].reserve(size, MEMORY_S))
            if request.transport is None or request.transport.is_closing():
                return _error(499, "the client has gone")
            folder = held.enter_context(tempfile.TemporaryDirectory(prefix="rushes-"))
            groups, places = await loop.run_in_executor(run, decode_takes, asked, Path(folder))
            del asked
            return await self._scored(Work(groups, places, loop.create_future()))

    async def _body(self, request: web.Request, arriving: GrowingReservation) -> bytes | web.Response | None:
        """None: too large. A response: too slow. Raises `NoRoom`."""
        length = request.content_length
        within_s = BODY_S + (self.max_bytes if length is None else length) / BODY_RATE
        body = bytearray()
        try:
            async with asyncio.timeout(within_s) as deadline:
                arriving.growing_under(deadline)
                async for chunk in request.content.iter_any():
                    if len(body) + len(chunk) > self.max_bytes:
                        return None
                    await arriving.grow(len(chunk))
                    body += chunk
        except TimeoutError:
            if arriving.gave_way:
                raise NoRoom from None
            return _error(408, f"the body did not arrive within {within_s:.0f} s; send it faster, or fewer items")
        finally:
            arriving.finished()
        return bytes(body)

    async def _scored(self, work: Work) -> web.Response:
        outcomes = await self.scoring.score(work)
        for outcome, indices in zip(outcomes, work.places, strict=True):
            if isinstance(outcome, RewardError):
                self._counts["failed"] += work.takes
                among = f"items {', '.join(map(str, indices))}: " if len(work.places) > 1 else ""
                return _error(502 if isinstance(outcome, RewardUnavailable) else 422, f"{among}{outcome}")
        self._counts["scored"] += work.takes
        answer = _answer([outcome for outcome in outcomes if isinstance(outcome, RewardScores)], work.places)
        return web.Response(text=answer.model_dump_json(), content_type="application/json")


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
    return web.json_response({"error": mask(message)}, status=status, headers={name: value} if header else None)


# ------------------------------------------------------------------------------------------------ the server


def serve(
    name: str,
    cfg: RewardConfig,
    *,
    host: str,
    port: int,
    token_env: str | None,
    max_mb: float,
    memory_gb: float,
    stuck_s: float,
    allow_hosts: Sequence[str],
    console: Console,
) -> None:
    """Serves until SIGINT or SIGTERM, then finishes the pending requests. Raises `RushesError`."""
    largest_mb = memory_gb * 1024 * SHARES["parsed"] / 2  # a body is copied once while it is parsed
    if max_mb > largest_mb:
        raise ConfigError(
            f"--max-mb: found {max_mb:g}; --memory-gb {memory_gb:g} allows at most {largest_mb:g}; lower the one or "
            "raise the other"
        )
    token = os.environ.get(token_env) if token_env else None
    if token_env and not token:
        raise ConfigError(f"--token-env: the environment variable {token_env} is not set; set it to the token")
    register(token or "")
    hosts = allowed_hosts(host, allow_hosts)
    runner = build_reward(name, cfg)
    service = RewardService(runner, token, int(max_mb * 2**20), int(memory_gb * 2**30), stuck_s, hosts)
    if host not in LOCAL and token is None:
        console.print(f"warning: anyone who can reach {host} can use this server; give --token-env", style="yellow")
    problem = asyncio.run(_serve(service, host, port, console))
    if problem:  # the stuck call would keep the process alive
        console.print(f"error: {problem}", style="red", soft_wrap=True, highlight=False, markup=False)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


async def _serve(service: RewardService, host: str, port: int, console: Console) -> str | None:
    """What was wrong with the scoring when it ended, if anything was."""
    runner = web.AppRunner(
        service.app,
        access_log=None,
        shutdown_timeout=SHUTDOWN_S,
        keepalive_timeout=HEADERS_S,  # counted from the start of a connection, and again after each answer
        lingering_time=5.0,
        read_bufsize=2**15,
        auto_decompress=False,
    )
    await runner.setup()
    try:
        url = await listen(runner, host, port)
        console.print(
            f"{service.runner.name} is served at {url}/score (Ctrl-C ends it)",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
        await until_stopped()
        console.print(f"finishing the pending requests (at most {SHUTDOWN_S:.0f} s)", highlight=False)
        return service.scoring.problem
    finally:
        await runner.cleanup()
