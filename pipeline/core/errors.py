"""Errors a user can act on. Each message names the key or file, what was found, what is allowed, and a fix.

The command line prints the message on one line and exits with `exit_code`; anything that is not a
`RushesError` is a bug of ours and is reported as such.
"""

from __future__ import annotations

from pipeline.core.secrets import mask


class RushesError(Exception):
    """Base of every error caused by the input or the environment. Pickles across Ray actors."""

    exit_code = 1


class ConfigError(RushesError):
    """A key or value of the config, or a command-line option, is wrong. Found before any model is loaded."""

    exit_code = 2


class InputError(RushesError):
    """A file given by the user is missing, corrupt or of the wrong kind."""

    exit_code = 2


class CheckpointError(RushesError):
    """A checkpoint of a run is missing, half-written or belongs to another config."""


class UnsupportedPolicyError(RushesError):
    """The diffusers pipeline cannot be trained as a policy; the message carries the numbers found."""


class CannotRun(UnsupportedPolicyError):
    """The pipeline could not even be called as configured: sizes, arguments or conditions it does not accept."""


class RewardError(RushesError):
    """A scorer raised, returned NaN or the wrong length. Never turned into a score."""


class RewardUnavailable(RewardError):
    """The program that computes a reward cannot be reached or refuses every request: not the takes' fault."""


class RewardAway(RewardUnavailable):
    """The program cannot be reached, does not answer in time or asks to come again: it may be back later, so no
    attempt is counted (`pipeline.rewards.patience`)."""


class RunFailed(RushesError):
    """The run ended after repeated failures; names actor, node and cause."""


class RunInterrupted(RushesError):
    """The run was stopped by a signal after saving."""

    exit_code = 130


def one_line(error: BaseException | str, limit: int = 200) -> str:
    """The text of an exception on one line of at most `limit` characters, secrets masked; its type's name where it has
    none."""
    text = mask(" ".join(str(error).split()))
    if not text and isinstance(error, BaseException):
        text = type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
