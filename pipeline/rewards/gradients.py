"""Scores with gradients to the pixels: the same frames, routing, segment weights and last step as `RewardRunner.run`.

What weighs a frame is a constant to the gradient: the segments' weights, which segments are the worst or the best, and
whether a reward applies to a take. The learner holds such a reward itself, since gradients do not cross processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config.sections.rewards import RewardConfig, SegmentsConfig
from pipeline.core.errors import ConfigError, RewardError, one_line
from pipeline.core.types import PromptItem
from pipeline.rewards.base import Scorer
from pipeline.rewards.registry import gradient_note
from pipeline.rewards.routing import applies
from pipeline.rewards.segments import combine_tensors, pick_frames

if TYPE_CHECKING:
    import torch


def check_gradient(name: str, cfg: RewardConfig) -> None:
    """Raises `ConfigError`, which says what to use instead, if the reward cannot give gradients. Loads no model."""
    if cfg.runtime_env:
        raise ConfigError(
            f"rewards.{name}.runtime_env: found {sorted(cfg.runtime_env)}, but a reward with gradients runs in the "
            "learner's own environment; take it out"
        )
    if cfg.score_repeats > 1:
        raise ConfigError(
            f"rewards.{name}.score_repeats: found {cfg.score_repeats}, but a reward with gradients scores each take "
            "once; set 1"
        )
    note = gradient_note(cfg.scorer, cfg.args)
    if note:
        raise ConfigError(f"rewards.{name}.gradient: {cfg.scorer} has no gradient: {note}")


def frames_looked_at(scorer: Scorer, segments: SegmentsConfig, frames: int, seed: int | None, fps: float) -> np.ndarray:
    """Ascending positions int64 [n] of the frames of a clip of `frames` that decide its score, each once."""
    if scorer.reads == "video":
        return np.unique(np.asarray(scorer.looks_at(frames, fps), dtype=np.int64))
    if frames == 1:
        return np.zeros(1, np.int64)
    return pick_frames(frames, segments.count, segments.frames, seed).reshape(-1)


def gradient_scores(
    name: str,
    scorer: Scorer,
    segments: SegmentsConfig,
    pixels: torch.Tensor,
    prompts: Sequence[PromptItem],
    seed: int | None,
    fps: float,
    clip_frames: int | None,
) -> torch.Tensor:
    """What `RewardRunner.gradient` returns. Raises `RewardError`."""
    import torch

    if pixels.ndim != 5 or pixels.shape[2] != 3 or not pixels.is_floating_point():
        raise RewardError(
            f"reward {name}: got pixels {pixels.dtype} {list(pixels.shape)}; expected float [K, F, 3, H, W] from 0 to 1"
        )
    if len(prompts) != len(pixels) or not len(prompts):
        raise RewardError(f"reward {name}: got {len(prompts)} prompts for {len(pixels)} takes")
    frames = pixels.shape[1] if clip_frames is None else clip_frames
    positions = frames_looked_at(scorer, segments, frames, seed, fps)
    if clip_frames is not None and pixels.shape[1] != len(positions):
        raise RewardError(
            f"reward {name}: got {pixels.shape[1]} frames of a clip of {frames}; expected the {len(positions)} that "
            f"it looks at: {positions.tolist()}"
        )
    chosen = [k for k, prompt in enumerate(prompts) if applies(name, prompt)]
    whole = pixels.new_full((len(pixels),), torch.nan, dtype=torch.float32)
    if not chosen:
        return whole + 0.0 * pixels.sum()  # NaN, of which every gradient is 0
    if len(chosen) < len(pixels):
        pixels = pixels[chosen]
    if clip_frames is None:
        pixels = pixels[:, torch.as_tensor(positions, device=pixels.device)]
    with torch.autocast(pixels.device.type, enabled=False):  # the servers score without it
        prompts = [prompts[k] for k in chosen]
        values = _take_scores(name, scorer, segments, pixels.float(), prompts, frames, seed, fps)
        values = scorer.finish_tensor(values).to(whole)
    return values if len(chosen) == len(whole) else whole.index_copy(0, torch.tensor(chosen).to(whole.device), values)


def _take_scores(
    name: str,
    scorer: Scorer,
    segments: SegmentsConfig,
    pixels: torch.Tensor,
    prompts: Sequence[PromptItem],
    frames: int,
    seed: int | None,
    fps: float,
) -> torch.Tensor:
    """pixels [N, n, 3, H, W], the frames looked at -> [N]."""
    if scorer.reads == "video":
        order = np.asarray(scorer.looks_at(frames, fps), dtype=np.int64)
        return _checked(name, scorer, pixels[:, np.searchsorted(np.unique(order), order)], prompts)
    if frames == 1:
        return _checked(name, scorer, pixels, prompts)
    picks = pick_frames(frames, segments.count, segments.frames, seed)
    repeated = [prompt for prompt in prompts for _ in range(picks.size)]
    scores = _checked(name, scorer, pixels.flatten(0, 1)[:, None], repeated)
    return combine_tensors(scores.view(len(pixels), *picks.shape), picks, frames, segments)


def _checked(name: str, scorer: Scorer, pixels: torch.Tensor, prompts: Sequence[PromptItem]) -> torch.Tensor:
    """Scores float32 [N] of one call. Raises `RewardError` unless they are N finite numbers."""
    import torch

    try:
        scores = scorer.score_pixels(pixels, prompts)
    except RewardError as error:
        raise type(error)(f"reward {name}: {error}") from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise RewardError(f"reward {name}: raised {type(error).__name__}: {one_line(error, 600)}") from error
    if not isinstance(scores, torch.Tensor) or scores.shape != (len(pixels),):
        shape = list(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise RewardError(
            f"reward {name}: returned {shape} for {len(pixels)} pictures or clips; expected [{len(pixels)}]"
        )
    if not bool(torch.isfinite(scores.detach()).all()):
        raise RewardError(f"reward {name}: returned NaN or infinity for pixels with gradients")
    return scores.float()
