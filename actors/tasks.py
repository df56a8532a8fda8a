"""What the loop does with asyncio tasks."""

from __future__ import annotations

import asyncio


async def cancel(task: asyncio.Future | None) -> None:
    """Cancels a task and waits for its end; a failure of its own has already ended the run."""
    if task is not None and not task.done():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
