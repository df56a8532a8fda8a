"""From a config entry to something that scores: looks scorers up by name, imports only the one asked for, and turns
whatever goes wrong while scoring into a `RewardError` that names the reward.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.config.schema import RewardConfig
from pipeline.core.errors import ConfigError, RewardError
from pipeline.core.files import did_you_mean
from pipeline.core.types import Media, PromptItem, RewardScores
from pipeline.rewards.base import REGISTRY, Scorer, check_output
from pipeline.rewards.batching import ScorerCall
from pipeline.rewards.function import FunctionScorer, is_function_spec
from pipeline.rewards.repeats import score_repeatedly
from pipeline.rewards.routing import score_some
from pipeline.rewards.segments import score_segments


@functools.cache
def _modules() -> dict[str, str]:
    """Scorer name -> module, read from the sources so that nothing heavy is imported to list names."""
    found = {}
    for file in sorted((Path(__file__).parent / "scorers").glob("*.py")):
        for name in re.findall(r'^@register\(\s*"([^"]+)"', file.read_text(encoding="utf-8"), flags=re.MULTILINE):
            found[name] = f"pipeline.rewards.scorers.{file.stem}"
    return found


def scorer_names() -> list[str]:
    return sorted(set(_modules()) | set(REGISTRY))


def list_scorers() -> list[tuple[str, str, str]]:
    """(name, 'frame' or 'video', first line of its docstring) of every registered scorer."""
    rows: list[tuple[str, str, str]] = []
    for name in scorer_names():
        cls = scorer_class(name)
        rows.append((name, cls.reads, (inspect.getdoc(cls) or "").split("\n")[0]))
    return rows


def scorer_class(scorer: str) -> type[Scorer]:
    """Raises `ConfigError` with the nearest name."""
    if scorer not in REGISTRY and scorer in _modules():
        importlib.import_module(_modules()[scorer])
    if scorer not in REGISTRY:
        hint = did_you_mean(scorer, scorer_names())
        raise ConfigError(
            f"unknown scorer {scorer!r}{hint or '; there are: ' + ', '.join(scorer_names())} (or your "
            "own file.py:function)"
        )
    return REGISTRY[scorer]


def check_scorer(name: str, cfg: RewardConfig) -> None:
    """What can be checked without loading a model: the scorer exists and takes the options. Raises `ConfigError`."""
    if is_function_spec(cfg.scorer):
        if not cfg.runtime_env:  # else its imports work in its own environment only
            _prefixed(name, lambda: FunctionScorer(cfg.scorer, cfg.args))
        elif not Path(cfg.scorer.rpartition(":")[0]).is_file():
            raise ConfigError(f"rewards.{name}: scorer {cfg.scorer!r}: no such file; write it as file.py:function")
        return
    cls = _prefixed(name, lambda: scorer_class(cfg.scorer))
    parameters = [p for p in inspect.signature(cls.__init__).parameters.values() if p.name != "self"]
    if any(p.kind == p.VAR_KEYWORD for p in parameters):
        return
    options = [p.name for p in parameters if p.kind != p.VAR_POSITIONAL]
    if cls.__init__ is object.__init__:
        options = []
    for key in cfg.args:
        if key not in options:
            hint = did_you_mean(key, options) or f"; its options are: {', '.join(options) or 'none'}"
            raise ConfigError(f"rewards.{name}.args.{key}: {cfg.scorer} has no such option{hint}")
    required = [p.name for p in parameters if p.default is p.empty and p.kind != p.VAR_POSITIONAL and p.name in options]
    for key in required:
        if key not in cfg.args:
            raise ConfigError(f"rewards.{name}.args.{key}: {cfg.scorer} needs this option; set it")
    _prefixed(name, lambda: cls.check_args(cfg.args))


def _prefixed(name: str, build):
    try:
        return build()
    except ConfigError as error:
        raise ConfigError(f"rewards.{name}: {error}") from error.__cause__


def build_scorer(name: str, cfg: RewardConfig) -> RewardRunner:
    """Loads the scorer. Raises `ConfigError` (wrong name or options) or whatever `RushesError` its model raises."""
    check_scorer(name, cfg)
    if is_function_spec(cfg.scorer):
        return RewardRunner(name, cfg, _prefixed(name, lambda: FunctionScorer(cfg.scorer, cfg.args)))
    return RewardRunner(name, cfg, _prefixed(name, lambda: scorer_class(cfg.scorer)(**cfg.args)))


class RewardRunner:
    """Runs one reward on media. Every failure is a `RewardError` naming it; there are no default scores."""

    def __init__(self, name: str, cfg: RewardConfig, scorer: Scorer) -> None:
        self.name, self.cfg, self.scorer = name, cfg, scorer

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
        return score_repeatedly(lambda m, s: self._run_once(m, prompts, s), media, seed, self.cfg.repeats)

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

    def _finish(self, values: np.ndarray, parts: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        finished, _ = check_output(self.name, self.scorer.finish(values), len(values))
        return finished, parts if np.array_equal(finished, values) else {**parts, "raw": values}

    def through(self, call: ScorerCall) -> RewardRunner:
        """The same reward, whose scorer is reached through `call` (how calls of several groups are joined)."""
        other = copy.copy(self)
        other.__dict__["call"] = call
        return other

    def call(self, media: Media, prompts: Sequence[PromptItem]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """One call of the scorer: (scores [N], parts [N]), checked. Raises `RewardError`."""
        try:
            output = self.scorer.score(media, prompts)
        except RewardError as error:
            text = str(error)
            raise type(error)(text if f"reward {self.name}" in text else f"reward {self.name}: {text}") from error
        except Exception as error:
            where = _where(error)
            raise RewardError(
                f"reward {self.name}: {self.cfg.scorer} raised {type(error).__name__}: "
                f"{' '.join(str(error).split())}{where}"
            ) from error
        return check_output(self.name, output, len(prompts))


def _where(error: BaseException) -> str:
    """' (file.py, line 3)' of the deepest frame, so that a user's function can be found without a traceback."""
    step = error.__traceback__
    if step is None:
        return ""
    while step.tb_next is not None:
        step = step.tb_next
    return f" ({Path(step.tb_frame.f_code.co_filename).name}, line {step.tb_lineno})"
