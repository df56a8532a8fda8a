"""Draws captioned clips or pictures of the shapes' world: data for source clips (configs/prompts/video-clips and
image-pictures).

    python -m jobs.shapes.clips FOLDER [--pictures] [--seed 0] [--per-caption 1]    # seconds; one a training prompt

The scenes are those that the shipped generators were trained on, no held-out ones, and every caption is right. The
folder holds mp4s or pngs and takes.parquet, as `rushes generate` writes them.
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


def draw_clips(seed: int, per_caption: int, pictures: bool = False) -> tuple[Media, list[PromptItem]]:
    """Clips uint8 [K, 9, 48, 48, 3] of the training prompts, in their order, and the prompt of each; pictures: of the
    image generator's, [K, 1, 48, 48, 3]."""
    rng = np.random.default_rng([seed, _STREAM])
    texts = (scene_world.image_prompts if pictures else scene_world.video_prompts)(held_out=False)
    shown = [PromptItem(index=i, text=text) for i, text in enumerate(texts) for _ in range(per_caption)]
    scenes = [scene_world.parse_caption(prompt.text) for prompt in shown]
    if pictures:
        frames = [scene_world.draw_image(scene, rng)[None] for scene in scenes]
    else:
        frames = [scene_world.draw_video(scene, rng) for scene in scenes]
    return Media(frames=np.stack(frames), fps=scene_world.FPS), shown


def write_clips(folder: Path, seed: int = 0, per_caption: int = 1, pictures: bool = False) -> int:
    """Returns how many. Raises `ConfigError` for a folder that already holds some."""
    if (folder / TAKES_FILE).exists():
        raise ConfigError(f"{folder}: already holds clips; choose another folder")
    media, prompts = draw_clips(seed, per_caption, pictures)
    save_takes(folder, media, prompts, range(len(prompts)), 0, {})
    return len(prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", action="store_true", help="single pictures, of the image generator's prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-caption", type=int, default=1)
    options = parser.parse_args()
    written = write_clips(options.folder, options.seed, options.per_caption, options.pictures)
    print(f"{written} clips in {options.folder}")


if __name__ == "__main__":
    main()
