"""Draws captioned clips of the shapes' world: data for source clips (configs/prompts/video-clips).

    python -m jobs.shapes.clips FOLDER [--seed 0] [--per-caption 1]      # seconds; one clip for each training prompt

The scenes are those that shapes-video was trained on, no held-out ones, and every caption is right. The folder holds
mp4s and takes.parquet, as `rushes generate` writes them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from pipeline.core.errors import ConfigError
from pipeline.core.takes_table import TAKES_FILE, save_takes
from pipeline.core.types import Media, PromptItem
from pipeline.rewards.models import scene_world

_STREAM = 2  # of random numbers: 0 and 1 draw the generators' own data


def draw_clips(seed: int, per_caption: int) -> tuple[Media, list[PromptItem]]:
    """Clips uint8 [K, 9, 48, 48, 3] of the training prompts, in their order, and the prompt of each."""
    rng = np.random.default_rng([seed, _STREAM])
    prompts = [PromptItem(index=i, text=text) for i, text in enumerate(scene_world.video_prompts(held_out=False))]
    shown = [prompt for prompt in prompts for _ in range(per_caption)]
    drawn = [scene_world.draw_video(scene_world.parse_caption(prompt.text), rng) for prompt in shown]
    return Media(frames=np.stack(drawn), fps=scene_world.FPS), shown


def write_clips(folder: Path, seed: int = 0, per_caption: int = 1) -> int:
    """Returns how many. Raises `ConfigError` for a folder that already holds some."""
    if (folder / TAKES_FILE).exists():
        raise ConfigError(f"{folder}: already holds clips; choose another folder")
    media, prompts = draw_clips(seed, per_caption)
    save_takes(folder, media, prompts, range(len(prompts)), 0, {})
    return len(prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-caption", type=int, default=1)
    options = parser.parse_args()
    print(f"{write_clips(options.folder, options.seed, options.per_caption)} clips in {options.folder}")


if __name__ == "__main__":
    main()
