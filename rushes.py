"""Rushes from Python: what the commands of the same names do, in a few lines.

    import rushes

    run = rushes.train("configs/quickstart.yaml", run={"steps": 5})
    takes = rushes.generate(run.config, ["a red circle moving left slowly"], checkpoint=run.path)
    scores = rushes.score(takes, ["scene"])

Errors are `rushes.RushesError`, with the one line that the command would print.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import RushesError

if TYPE_CHECKING:
    import numpy as np

    from pipeline.config.schema import Config

__all__ = ["Run", "RushesError", "Take", "generate", "load_config", "score", "train"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run. `config`: its config file, to sample with."""

    path: Path
    summary: dict[str, Any]  # summary.json

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def export(self) -> Path:
        return self.path / "export"


@dataclass(frozen=True, kw_only=True)
class Take:
    """One picture or clip. `frames`: uint8 [F, H, W, 3], RGB; F is 1 for pictures."""

    prompt: str
    seed: int
    frames: np.ndarray
    fps: float


def load_config(config: str | Path, **sections: Mapping[str, Any]) -> Config:
    """The checked config of a YAML file, with sections overridden: `step={"takes": 8}`. Raises RushesError."""
    from pipeline.config.load import load_config as load

    return load(Path(config), [f"{key}={json.dumps(value)}" for key, value in _dotted(sections)])


def _dotted(sections: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in sections.items():
        if isinstance(value, Mapping) and value:
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value) if isinstance(value, Path) else value


def train(config: str | Path, **sections: Mapping[str, Any]) -> Run:
    """A whole run, as `rushes train`; progress goes to the terminal. Raises RushesError, and RunInterrupted after
    Ctrl-C, with a checkpoint saved."""
    from jobs.launch.training import run_training
    from pipeline.runs.paths import default_name
    from pipeline.runs.records import read_summary

    cfg = load_config(config, **sections)
    name = cfg.run.name or default_name(Path(config), datetime.now(), cfg.run.dir)
    cfg = cfg.model_copy(update={"run": cfg.run.model_copy(update={"name": name})})
    run_training(cfg, Path(config))
    path = (cfg.run.dir / name).absolute()
    return Run(path=path, summary=read_summary(path / "summary.json"))


def generate(
    config: str | Path,
    prompts: Sequence[str],
    *,
    checkpoint: str | Path | None = None,
    takes: int = 1,
    seed: int = 0,
    steps: int | None = None,
    **sections: Mapping[str, Any],
) -> list[Take]:
    """`takes` takes of each prompt, by the deterministic sampler, as `rushes generate`.

    `checkpoint`: a run, one of its checkpoints or an export; None: untrained. `steps`: sampler steps; None:
    evaluation.steps. Raises RushesError.
    """
    from jobs.common.load_trained import find_trained, load_policy
    from pipeline.core.prompts import check_prompt_lengths
    from pipeline.core.types import PromptItem
    from pipeline.rl.group_plan import sample_works
    from pipeline.tools import preflight

    cfg = load_config(config, **sections)
    items = [PromptItem(index=index, text=text) for index, text in enumerate(prompts)]
    preflight.check_devices(cfg)
    preflight.check_generator(cfg, [], [])
    check_prompt_lengths(items, cfg.generator.pretrained, cfg.generator.call_kwargs, None)
    policy = load_policy(cfg, find_trained(Path(checkpoint)) if checkpoint else None)
    made = []
    for work in sample_works(cfg, items, takes, seed, steps):
        media, _, _ = policy.rollout(work)
        for prompt, take_seed, frames in zip(work.prompts, work.seeds, media.frames, strict=True):
            made.append(Take(prompt=prompt.text, seed=take_seed, frames=frames, fps=media.fps))
    return made


def score(takes: Sequence[Take], rewards: Sequence[str], options: Sequence[str] = ()) -> dict[str, list[float]]:
    """Reward -> a score of each take (NaN where it does not apply), as `rushes score`.

    `rewards`: scorers, or file.py:function; `options`: such as "clip_score.args.batch=8". The takes have one shape.
    Raises RushesError.
    """
    import numpy as np

    from jobs.common.reward_configs import build_reward_configs, refuse_duplicates
    from pipeline.core.types import Media, PromptItem
    from pipeline.rewards.runner import build_reward

    refuse_duplicates("score", list(rewards))
    shapes = {take.frames.shape for take in takes}
    if len(shapes) != 1:
        raise RushesError(f"score: the takes must have one shape, found {sorted(shapes)}; score those of a shape each")
    media = Media(frames=np.stack([take.frames for take in takes]), fps=takes[0].fps)
    items = [PromptItem(index=index, text=take.prompt) for index, take in enumerate(takes)]
    configs = build_reward_configs(list(rewards), list(options))
    runners = {name: build_reward(name, cfg) for name, cfg in zip(rewards, configs, strict=True)}
    return {name: runner.run(media, items, None).values.tolist() for name, runner in runners.items()}
