"""Several groups in one call of a scorer; a take that cannot be scored fails its group only.

Each group is scored by `RewardRunner.run` as if it were alone (its own frames, its own options). What they share is the
scorer: calls that the groups make at the same time are joined, where frame size, length and rate agree. A joined call
that fails is halved until only the groups that fail alone have failed; such a group is then halved by takes, and the
reason names the take.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.core.errors import RewardError, RewardUnavailable
from pipeline.core.types import Media, PromptItem, RewardScores
from pipeline.rewards.base import Scored, ScorerCall
from pipeline.rewards.runner import RewardRunner

WAIT_FOR_GROUPS_S = 0.01  # how long a server waits for more groups to fill a call (rewards.*.batch_items)


@dataclass(frozen=True, slots=True)
class Takes:
    """The takes of one group that a reward server scores."""

    media: Media  # [K, F, H, W, 3]
    prompts: Sequence[PromptItem]  # [K]
    seed: int | None  # frame picks; None: centre picks

    def only(self, chosen: Sequence[int]) -> Takes:
        rows = list(chosen)
        frames = self.media.frames[rows]
        return Takes(Media(frames=frames, fps=self.media.fps), [self.prompts[k] for k in rows], self.seed)


def score_groups(runner: RewardRunner, groups: Sequence[Takes]) -> list[RewardScores | RewardError]:
    """One outcome per group, in order. A failure is returned, not raised, and says which take it was.

    A relative scorer (whose scores depend on what else is shown) gets one group a call.
    """
    if len(groups) <= 1 or runner.scorer.relative:
        outcomes = [_outcome(runner, group) for group in groups]
    else:
        outcomes = _score_joined(runner, groups)
    return [
        name_take(runner, group, outcome) if isinstance(outcome, RewardError) else outcome
        for group, outcome in zip(groups, outcomes, strict=True)
    ]


def name_take(runner: RewardRunner, group: Takes, error: RewardError) -> RewardError:
    """The same failure with the take that causes it, found in at most 2 log2(K) calls; `error` itself if no part of
    the group fails, or if the failure is not the input's fault."""
    takes = len(group.prompts)
    if takes == 1 or runner.scorer.relative or isinstance(error, RewardUnavailable):
        return error
    bad: Sequence[int] = range(takes)
    cause = error
    while len(bad) > 1:
        middle = len(bad) // 2
        for half in (bad[:middle], bad[middle:]):
            outcome = _outcome(runner, group.only(half))
            if isinstance(outcome, RewardUnavailable):
                return error
            if isinstance(outcome, RewardError):
                bad, cause = half, outcome
                break
        else:
            return error
    prefix = f"reward {runner.name}: "
    named = RewardError(f"{prefix}take {bad[0]}: {str(cause).removeprefix(prefix)}")
    named.__cause__ = cause  # with its traceback, for the log
    return named


def _outcome(runner: RewardRunner, group: Takes) -> RewardScores | RewardError:
    try:
        return runner.run(group.media, group.prompts, group.seed)
    except RewardError as error:
        return error


@dataclass(eq=False, slots=True)
class _Call:
    """A group's call of the scorer, waiting for its share of a joined one."""

    media: Media
    prompts: Sequence[PromptItem]
    done: threading.Event = field(default_factory=threading.Event)
    result: Scored | BaseException | None = None

    def answer(self, result: Scored | BaseException) -> None:
        self.result = result
        self.done.set()


def _score_joined(runner: RewardRunner, groups: Sequence[Takes]) -> list[RewardScores | RewardError]:
    """Each group runs in its own thread, which prepares and waits; this thread makes the calls."""
    joint = _Joint(len(groups))
    through = runner.through(joint.call)

    def run(group: Takes) -> RewardScores | RewardError:
        try:
            return _outcome(through, group)
        finally:
            joint.finished()

    with ThreadPoolExecutor(len(groups)) as pool:
        futures = [pool.submit(run, group) for group in groups]
        while calls := joint.ready():
            buckets = defaultdict(list)
            for call in calls:
                buckets[call.media.frames.shape[1:], call.media.fps].append(call)
            for bucket in buckets.values():
                _call_together(runner.call, bucket)
        outcomes = [future.result() for future in futures]
    return [
        outcome if isinstance(outcome, RewardError) else replace(outcome, seconds=outcome.seconds / len(groups))
        for outcome in outcomes
    ]


def _call_together(call: ScorerCall, calls: list[_Call]) -> None:
    """Answers every call. A joined call that fails is repeated in halves."""
    try:
        media, prompts = calls[0].media, list(calls[0].prompts)
        if len(calls) > 1:
            media = Media(frames=np.concatenate([c.media.frames for c in calls]), fps=media.fps)
            prompts = [prompt for c in calls for prompt in c.prompts]
        scores, parts = call(media, prompts)
    except RewardError as error:
        if len(calls) > 1 and not isinstance(error, RewardUnavailable):
            middle = len(calls) // 2
            _call_together(call, calls[:middle])
            _call_together(call, calls[middle:])
            return
        for waiting in calls:
            waiting.answer(error)
    except BaseException as error:  # a bug, or out of memory: the waiting threads must end
        for waiting in calls:
            waiting.answer(error)
    else:
        start = 0
        for waiting in calls:
            rows = slice(start, start + len(waiting.prompts))
            waiting.answer((scores[rows], {name: part[rows] for name, part in parts.items()}))
            start = rows.stop


class _Joint:
    """Where the groups' threads meet: a round of calls is ready once every thread still running waits in `call`."""

    def __init__(self, running: int) -> None:
        self._running = running
        self._waiting: list[_Call] = []
        self._changed = threading.Condition()

    def call(self, media: Media, prompts: Sequence[PromptItem]) -> Scored:
        mine = _Call(media, prompts)
        with self._changed:
            self._waiting.append(mine)
            self._changed.notify_all()
        mine.done.wait()
        if isinstance(mine.result, BaseException):
            raise mine.result
        assert mine.result is not None
        return mine.result

    def finished(self) -> None:
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def ready(self) -> list[_Call]:
        """The next round; [] when all have finished."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) == self._running)
            calls, self._waiting = self._waiting, []
            return calls
