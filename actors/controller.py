"""The controller actor: runs the training loop, reports progress, shuts down cleanly."""

from __future__ import annotations

import asyncio
from typing import Any

from actors.ray_errors import describe, first_error
from actors.ray_options import RunContext
from actors.role_actor import RoleActor
from actors.train_loop import Stopped, TrainLoop
from pipeline.core.errors import RunFailed, RushesError
from pipeline.runs.snapshot import RunSnapshot


class Controller(RoleActor):
    """An asyncio actor: `run` is the whole run, `progress`, `scale` and `stop` answer meanwhile.

    It owns every object that passes between the roles, so results stay readable when the worker that made them dies;
    and it owns the other actors, so they end with it.
    """

    role = "controller"

    def __init__(self, ctx: RunContext, resume_from: str | None) -> None:
        super().__init__(ctx, "controller")
        self._resume_from = resume_from
        self._loop: TrainLoop | None = None
        self._stop_asked = asyncio.Event()

    async def run(self) -> dict[str, Any]:
        """Runs to the end, or until stopped. Returns what the summary needs; raises `RushesError`."""
        loop = self._loop = TrainLoop(self.ctx, self._resume_from, self._stop_asked)
        try:
            result = await self._supervised(loop)
        except RunFailed as error:
            self.log.error("the run failed: %s", error)
            raise
        except RushesError as error:
            self.log.error("%s", error)
            raise
        except Exception:
            self.log.exception("unexpected error")
            raise
        finally:
            await loop.close()
        return result | {"peaks": result["peaks"] | {self.name: self.info()["peak_rss"]}}

    async def _supervised(self, loop: TrainLoop) -> dict[str, Any]:
        """The loop beside its background tasks: the first failure of either ends both, and is raised."""
        try:
            async with asyncio.TaskGroup() as tasks:
                main = tasks.create_task(self._to_the_end(loop, tasks))
        except BaseExceptionGroup as failures:
            failure = first_error(failures)
            if not main.cancelled():  # the loop's own failure
                raise failure from None
            if not isinstance(failure, RushesError):
                self.log.error("a background task failed", exc_info=failure)
                failure = RunFailed(f"controller: {describe(failure)} (see {self.ctx.run.log})")
            if isinstance(failure, RunFailed):
                await loop.rescue()
            raise failure from None
        return main.result()

    async def _to_the_end(self, loop: TrainLoop, background: asyncio.TaskGroup) -> dict[str, Any]:
        try:
            await loop.start(background)
            await loop.run()
            status = "finished"
        except Stopped:
            await loop.save_and_stop()
            status = "stopped"
        result = await loop.finish(status)
        await loop.end_background()
        return result

    async def stop(self) -> None:
        """Nothing new is begun; the last completed step is saved."""
        self.log.info("asked to stop")
        self._stop_asked.set()

    async def scale(self, targets: dict[str, int]) -> dict[str, str]:
        """Sets pools ("rollout", "reward.<name>") to a number of workers; 0 gives a pool back to its policy and limits.

        A target holds until the next one, or until the run's process ends: a resumed run begins with its config.
        Returns a sentence for each pool. Raises `ConfigError` (unknown pool, negative number; nothing is changed then)
        or `RushesError` (the run has not begun yet).
        """
        if self._loop is None:
            raise RushesError("the run is still starting; try again in a few seconds")
        return self._loop.scale(targets)

    async def progress(self, since: int) -> dict[str, Any]:
        """A `RunSnapshot`; its `records` are those of the steps after the first `since`, or the last n of them (-n)."""
        if self._loop is None:
            return RunSnapshot(state="starting", step=0, steps=self.cfg.run.steps).to_dict()
        return self._loop.snapshot(since).to_dict()

    async def read_log(self, offset: int) -> dict[str, Any]:
        """run.log from byte `offset` on, at most 1 MiB of it, whole lines: {"text": ..., "offset": of the rest}."""
        with open(self.ctx.run.log, "rb") as file:
            file.seek(offset)
            data = file.read(2**20)
        data = data[: data.rfind(b"\n") + 1]
        return {"text": data.decode("utf-8", "replace"), "offset": offset + len(data)}
