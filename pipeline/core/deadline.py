"""Bounds a call that cannot be interrupted: a connection, a name look-up, a library's own retries."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

TELL_AFTER_S = 30.0
Answer = TypeVar("Answer")


def within(
    seconds: float,
    call: Callable[[], Answer],
    waiting_for: str,
    log: logging.Logger,
    check: Callable[[], None] = lambda: None,
) -> Answer:
    """The answer or the exception of `call`, which runs in a thread of its own. Raises `TimeoutError` after `seconds`;
    the thread is then left behind, and does not hold the end of the process.

    Says `waiting_for` to the log after 30 s. `check` is called several times a second in the caller's thread, where
    signals are handled, and ends the wait by raising.
    """
    outcome: list[Any] = []
    failure: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:
            failure.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name=f"waiting for {waiting_for}"[:60], daemon=True).start()
    started, told = time.monotonic(), False
    while not done.wait(min(0.2, max(0.0, started + seconds - time.monotonic()))):
        check()
        waited = time.monotonic() - started
        if waited >= seconds and not done.is_set():
            raise TimeoutError(f"{waiting_for}: no answer within {seconds:g} s")
        if waited >= TELL_AFTER_S and not told:
            told = True
            log.warning("waiting for %s for %.0f s; giving up after %g s", waiting_for, waited, seconds)
    if failure:
        raise failure[0]
    return outcome[0]
