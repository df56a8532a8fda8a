"""One reward of the config: builds its scorer, runs it on media, and turns whatever goes wrong while scoring into a
`RewardError` that names the reward.
"""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config.schema import RewardConfig
from pipeline.core.errors import ConfigError, RewardAway, RewardError, one_line
from pipeline.core.reading import shown
from pipeline.core.types import Media, PromptItem, RewardScores
from pipeline.rewards.base import Scored, Scorer, ScorerCall, check_output
from pipeline.rewards.function import is_function_spec
from pipeline.rewards.gradients import frames_looked_at, gradient_scores
from pipeline.rewards.patience import Patience
from pipeline.rewards.registry import check_options, create_scorer
from pipeline.rewards.repeats import score_repeatedly
from pipeline.rewards.routing import score_some
from pipeline.rewards.segments import score_segments

if TYPE_CHECKING:
    import torch

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
RESERVED = ("mean", "std", "se")  # metrics of all rewards together: reward/mean, reward/std, heldout/mean, heldout/se


def check_reward_name(name: str) -> None:
    """Raises `ConfigError` for a name that cannot stand in metrics, tables and the names of actors."""
    if name in RESERVED:
        raise ConfigError(
            f"rewards.{name}: reward/{name} is a metric of all rewards together; use another name, such as {name}_score"
        )
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"rewards.{shown(name)}: cannot be a reward's name; use letters, digits, '_', '-' and '.' (at most 64)"
        )


def check_reward(name: str, cfg: RewardConfig) -> None:
    """Checks a config entry without loading a model. Raises `ConfigError` that begins with `rewards.<name>`."""
    if is_function_spec(cfg.scorer) and cfg.runtime_env:  # the function's imports work in its own environment only
        if not Path(cfg.scorer.rpartition(":")[0]).is_file():
            raise ConfigError(f"rewards.{name}: scorer {cfg.scorer!r}: no such file; write it as file.py:function")
        return
    with _named(name):
        check_options(cfg.scorer, cfg.args)


def build_reward(name: str, cfg: RewardConfig, patience_s: float = 0.0) -> RewardRunner:
    """Loads a config entry's scorer. Raises `ConfigError` (wrong name or options) or what its model raises.

    `patience_s`: seconds that a service which has answered before may be away; a call then waits for it.
    """
    with _named(name):
        return RewardRunner(name, cfg, create_scorer(cfg.scorer, cfg.args), patience_s)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """A `ConfigError` of the block says which reward of the config it is about."""
    try:
        yield
    except ConfigError as error:
        key = f"rewards.{name}." if str(error).startswith("args.") else f"rewards.{name}: "
        raise ConfigError(f"{key}{error}") from error.__cause__


class RewardRunner:
    """Runs one reward on media. Every failure is a `RewardError` naming it; there are no default scores."""

    def __init__(self, name: str, cfg: RewardConfig, scorer: Scorer, patience_s: float = 0.0) -> None:
        self.name, self.cfg, self.scorer = name, cfg, scorer
        self._patience = Patience(f"reward {name}", patience_s, "then its takes are not scored")
        self._has_answered = False

    def run(self, media: Media, prompts: Sequence[PromptItem], seed: int | None) -> RewardScores:
        """media [K, F, H, W, 3], K prompts. `seed`: draws the frames, once for all K takes; None: centres.

        Takes whose prompt the reward does not apply to have the value NaN and are not shown to the scorer.
        """
        takes, frames = media.frames.shape[:2]
        if takes == 0 or frames == 0:
            raise RewardError(f"reward {self.name}: got media of shape {list(media.frames.shape)}, nothing to score")
        if len(prompts) != takes:
            raise RewardError(f"reward {self.name}: got {len(prompts)} prompts for {takes} takes")
        return score_some(lambda m, p: self._run_repeatedly(m, p, seed), media, prompts, self.name)

    def _run_repeatedly(self, media: Media, prompts: Sequence[PromptItem], seed: int | None) -> RewardScores:
        return score_repeatedly(lambda m, s: self._run_once(m, prompts, s), media, seed, self.cfg.score_repeats)

    def _run_once(self, media: Media, prompts: Sequence[PromptItem], seed: int | None) -> RewardScores:
        start = time.perf_counter()
        if self.scorer.reads == "frame" and media.frames.shape[1] > 1:
            scores = score_segments(self.call, media, prompts, self.cfg.segments, seed)
        else:
            values, parts = self.call(media, prompts)
            scores = RewardScores(values=values, parts=parts)
        values, parts = self._finish(scores.values, scores.parts)
        return RewardScores(
            values=values,
            segment_values=scores.segment_values,
            segment_weights=scores.segment_weights,
            segment_frames=scores.segment_frames,
            parts=parts,
            seconds=time.perf_counter() - start,
        )

    def _finish(self, values: np.ndarray, parts: dict[str, np.ndarray]) -> Scored:
        finished, _ = check_output(self.name, self.scorer.finish(values), len(values))
        return finished, parts if np.array_equal(finished, values) else {**parts, "raw": values}

    def gradient(
        self,
        pixels: torch.Tensor,
        prompts: Sequence[PromptItem],
        seed: int | None,
        *,
        fps: float = 8.0,
        clip_frames: int | None = None,
    ) -> torch.Tensor:
        """pixels float [K, F, 3, H, W] from 0 to 1, K prompts -> the scores float32 [K] that `run` gives (up to the
        8 bits of its frames), with gradients to the pixels.

        `clip_frames`: the clip's length if `pixels` holds only the frames of `looks_at(clip_frames, seed, fps)`. NaN,
        and no gradient, where the reward does not apply to the prompt. Needs a scorer that `check_gradient` accepts;
        its model is frozen. Raises `RewardError`.
        """
        return gradient_scores(
            self.name, self.scorer, self.cfg.segments, pixels, prompts, seed, fps=fps, clip_frames=clip_frames
        )

    def looks_at(self, frames: int, seed: int | None, fps: float = 8.0) -> np.ndarray:
        """Ascending positions int64 [n] in a clip of `frames` that `run` and `gradient` score with this seed: the only
        frames that have to be decoded."""
        return frames_looked_at(self.scorer, self.cfg.segments, frames, seed, fps)

    def through(self, call: ScorerCall) -> RewardRunner:
        """The same reward, whose scorer is reached through `call` (how calls of several groups are joined)."""
        other = copy.copy(self)
        other.__dict__["call"] = call
        return other

    def call(self, media: Media, prompts: Sequence[PromptItem]) -> Scored:
        """One call of the scorer: (scores [N], parts [N]), checked. Raises `RewardError`.

        Other rewards read the same frames, so the scorer cannot write into them; a user's function gets a copy.
        """
        while True:
            try:
                output = self._call_once(media, prompts)
                break
            except RewardAway as error:
                pause_s = self._patience.pause_s(error) if self._has_answered else None
                if pause_s is None:
                    raise
                time.sleep(pause_s)
        self._has_answered = True
        self._patience.answered()
        return output

    def _call_once(self, media: Media, prompts: Sequence[PromptItem]) -> Scored:
        try:
            output = self.scorer.score(_read_only(media), prompts)
        except RewardError as error:
            text = one_line(error, 1000)  # may quote what a service or a user's function says
            raise type(error)(text if f"reward {self.name}" in text else f"reward {self.name}: {text}") from error
        except KeyboardInterrupt:
            raise
        except (ConnectionError, TimeoutError) as error:  # a user's function that calls a service
            raise RewardAway(
                f"reward {self.name}: {self.cfg.scorer} raised {type(error).__name__}: {one_line(error, 600)}"
                f"{_line_of(error)}"
            ) from error
        except BaseException as error:  # also SystemExit, CancelledError, GeneratorExit
            raise RewardError(
                f"reward {self.name}: {self.cfg.scorer} raised {type(error).__name__}: "
                f"{one_line(error, 600)}{_line_of(error)}"
            ) from error
        return check_output(self.name, output, len(prompts))


def _read_only(media: Media) -> Media:
    frames = media.frames.view()
    frames.flags.writeable = False
    return Media(frames=frames, fps=media.fps)


def _line_of(error: BaseException) -> str:
    """' (file.py, line 3)' of the deepest frame, so that a user's function can be found without a traceback."""
    trace = error.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f" ({Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno})"
