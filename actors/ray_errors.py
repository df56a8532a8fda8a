"""Classifies exceptions of actor calls, and turns them into one line: who, where, and the root cause."""

from __future__ import annotations

import asyncio
import re

from ray import exceptions as rx

from pipeline.core.errors import InputError, RewardAway, RushesError, one_line

_LIMIT = 600  # characters of a described error
_LOST = (
    rx.ObjectLostError,
    rx.ObjectFetchTimedOutError,
    rx.ReferenceCountingAssertionError,
    rx.OwnerDiedError,
    rx.ObjectReconstructionFailedError,
    rx.ObjectFreedError,
)


def root(error: BaseException) -> BaseException:
    """The exception that the remote code raised, without Ray's wrappers."""
    while isinstance(error, rx.RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def first_error(error: BaseException) -> BaseException:
    """The first failure inside the exception group of a `TaskGroup`, however deep; any other exception as it is."""
    while isinstance(error, BaseExceptionGroup):
        error.__traceback__ = None  # it leads back to the group: what its frames hold would wait for the collector
        error = error.exceptions[0]
    return error


def is_lost(error: BaseException) -> bool:
    """An object of the object store is gone (its node or owner died); it has to be computed again."""
    return isinstance(root(error), _LOST)


def is_deterministic(error: BaseException) -> bool:
    """The input's or the configuration's fault: another actor would fail in the same way."""
    return isinstance(root(error), RushesError)


def is_bad_input(error: BaseException) -> bool:
    """A file that the group's data names cannot be read."""
    return isinstance(root(error), InputError)


def is_away(error: BaseException) -> bool:
    """A service that a scorer calls is away: it may be back later, whatever the actor and the input."""
    return isinstance(root(error), RewardAway)


class WorkerPreempted(RuntimeError):
    """A worker that is shutting down (SIGTERM) refuses a call; its groups go to another worker."""


def is_preempted(error: BaseException) -> bool:
    return isinstance(root(error), WorkerPreempted)


def describe(error: BaseException) -> str:
    """One line, without a traceback or Ray's own wording."""
    error = root(error)
    if isinstance(error, RushesError | WorkerPreempted):
        return one_line(str(error), _LIMIT)
    if isinstance(error, asyncio.TimeoutError | TimeoutError):
        return one_line(str(error), _LIMIT) or "timed out"
    if isinstance(error, rx.ActorUnavailableError):
        detail = re.search(r"unavailable: (.+?)\. The task may", str(error), re.DOTALL)
        return one_line(detail.group(1), _LIMIT) if detail else "it cannot be reached"
    if isinstance(error, rx.RayActorError):
        detail = re.search(r"Worker exit detail: (.+?)(?:\n|$)", str(error))
        reason = re.search(r"Worker exit type: (\w+)", str(error))
        if "node" in str(error).lower() and "died" in str(error).lower() and not detail:
            return "its process died with its node"
        text = one_line(detail.group(1), _LIMIT) if detail else ""
        text = re.split(r"(?<=\.) There are some potential root causes", text)[0]
        kind = f" ({reason.group(1)})" if reason and not detail else ""
        return f"its process died{kind}{': ' + text if text else ''}"
    if isinstance(error, rx.OutOfMemoryError):
        return "killed by Ray because the node ran out of memory"
    if isinstance(error, _LOST):
        return f"data lost from the object store ({type(error).__name__})"
    text = one_line(str(error), _LIMIT)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
