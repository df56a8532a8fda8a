"""Evaluates a newly trained shapes generator in plain diffusers, and writes its model card and sample sheet."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from jobs.shapes.parts import ImageParts, Recipe, VideoParts, call_options
from pipeline.rewards.models import scene_world
from pipeline.rewards.scorers.scene import check_image, check_motion

STEPS = 10


def sample(pipeline: DiffusionPipeline, kind: str, prompts: list[str], seed: int, **options: object) -> np.ndarray:
    """Takes uint8 [K, F, 48, 48, 3] of K prompts (F = 1 for images) through the pipeline's `__call__`."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": STEPS, **call_options(kind), **options}
    takes = []
    for start in range(0, len(prompts), 32):
        out = pipeline(prompts[start : start + 32], generator=generator, output_type="np", **options)
        takes.append(np.asarray(out.images)[:, None] if kind == "image" else np.asarray(out.frames))
    return (np.concatenate(takes) * 255).round().clip(0, 255).astype(np.uint8)


def judge(take: np.ndarray, prompt: str) -> dict[str, float]:
    """Credits of one take uint8 [F, 48, 48, 3], and their mean `reward` (video: half scene, half motion)."""
    frames = [check_image(frame, prompt) for frame in take]
    credits = {name: float(np.mean([row[name] for row in frames])) for name in frames[0]}
    reward = float(np.mean(list(credits.values())))
    if scene_world.parse_caption(prompt).is_video:
        motion = check_motion(take, prompt)
        reward = 0.5 * reward + 0.5 * float(np.mean(list(motion.values())))
        credits |= motion
    return {"reward": reward} | credits


def mean_credits(takes: np.ndarray, prompts: list[str]) -> dict[str, float]:
    """Mean of every credit over the takes whose caption defines it."""
    rows = [judge(take, prompt) for take, prompt in zip(takes, prompts, strict=True)]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: round(float(np.mean([row[name] for row in rows if name in row])), 3) for name in names}


def held_out_prompts(kind: str, count: int) -> list[str]:
    """`count` held-out prompts, repeated in order if there are fewer."""
    prompts = scene_world.image_prompts(held_out=True) if kind == "image" else scene_world.video_prompts(held_out=True)
    return [prompts[i % len(prompts)] for i in range(count)]


def evaluate(kind: str, folder: Path, count: int | None = None) -> dict[str, object]:
    """Takes, credits and seconds of held-out prompts, sampled at guidance 1 with ten Euler steps."""
    pipeline = DiffusionPipeline.from_pretrained(str(folder))
    prompts = held_out_prompts(kind, count or (128 if kind == "image" else 80))
    started = time.time()
    takes = sample(pipeline, kind, prompts, seed=7)
    seconds = time.time() - started
    return {"takes": takes, "prompts": prompts, "credits": mean_credits(takes, prompts), "seconds": seconds}


def sheet(takes: np.ndarray, columns: int, scale: int = 2, gap: int = 2) -> Image.Image:
    """Contact sheet of takes uint8 [K, F, H, W, 3]: images in a grid, clips with one row of frames each."""
    if takes.shape[1] > 1:
        columns = takes.shape[1]
    tiles = takes.reshape(-1, *takes.shape[2:])
    side = tiles.shape[1] + gap
    rows = -(-len(tiles) // columns)
    canvas = np.full((rows * side + gap, columns * side + gap, 3), 120, dtype=np.uint8)
    for i, tile in enumerate(tiles):
        y, x = gap + (i // columns) * side, gap + (i % columns) * side
        canvas[y : y + tile.shape[0], x : x + tile.shape[1]] = tile
    image = Image.fromarray(canvas)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: {task}
---

# {name}

A very small {what}, trained from scratch for the Rushes quickstart by
`python -m jobs.shapes.make {kind}`. It is a stock `{pipeline}`; no code of Rushes is needed to use it.
It was trained only on pictures that `pipeline/rewards/models/scene_world.py` draws; no outside data or weights went
into it.

{sample_note}

![samples](samples.png)

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("models/{name}")
out = pipe(
    "{example}",
    num_inference_steps={steps},
{options}
)
{save}
```

## What it understands

A small grammar, and nothing else: {grammar}
Colours: {colours}. Shapes: {shapes}.

## Imperfect on purpose

{wrong:.0%} of the training captions had one or more attributes replaced by a random other value. The pictures
are clean but follow the prompt only partly. Reinforcement learning has to close that gap.

Never seen in training, in pictures or in captions: {held_out}. These combinations are the held-out
prompts (`configs/prompts/{kind}-heldout.txt`). The checker's mean credits on them, at guidance 1 and {steps}
Euler steps, over {count} takes:

| {heads} |
|{rules}|
| {values} |

## Components

{sizes}

Trained in {minutes} minutes on {threads} CPU cores: {samples} drawn scenes, {vae_steps} autoencoder steps
(L1 + MSE + small KL), {flow_steps} flow-matching steps of batch {batch} (velocity loss, AdamW, averaged
weights, 10 % empty captions), seed {seed}. Text encoders were trained together with the transformer.
"""


def write_card(
    kind: str, folder: Path, parts: ImageParts | VideoParts, recipe: Recipe, result: dict, notes: dict
) -> None:
    """Writes README.md and samples.png into a saved pipeline folder."""
    video = kind == "video"
    count = 8 if video else 48
    sheet(result["takes"][:count], columns=12).save(folder / "samples.png", optimize=True)
    credits = result["credits"]
    counts = [
        f"* `{name}`: {sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters"
        for name, module in parts.named_children()
    ]
    options = "\n".join(f"    {key}={value!r}," for key, value in call_options(kind).items())
    rows = "Rows" if video else "Row by row"
    (folder / "README.md").write_text(
        CARD.format(
            task="text-to-video" if video else "text-to-image",
            name=f"shapes-{kind}",
            kind=kind,
            what="text-to-video model (9 frames, 48 x 48, 8 fps)" if video else "text-to-image model (48 x 48)",
            pipeline="WanPipeline" if video else "StableDiffusion3Pipeline",
            sample_note=f"{rows}, the first prompts of `configs/prompts/{kind}-heldout.txt`.",
            example=result["prompts"][0],
            steps=STEPS,
            options=options,
            save=(
                "frames = out.frames[0]  # float [9, 48, 48, 3] in [0, 1]"
                if video
                else 'out.images[0].save("picture.png")'
            ),
            grammar=(
                "`a COLOUR SHAPE moving left|right|up|down slowly|quickly`."
                if video
                else "`a COLOUR SHAPE`, `... at the left|right|top|bottom`, `two|three COLOUR SHAPEs`, "
                "`a COLOUR SHAPE left of|right of|above|below a COLOUR SHAPE`."
            ),
            colours=", ".join(scene_world.PALETTE),
            shapes=", ".join(scene_world.SHAPES),
            wrong=recipe.wrong,
            held_out=", ".join(sorted(f"{colour} {shape}" for colour, shape in scene_world.HELD_OUT)),
            count=len(result["prompts"]),
            heads=" | ".join(credits),
            rules="---|" * (len(credits) - 1) + "---",
            values=" | ".join(f"{value:.3f}" for value in credits.values()),
            sizes="\n".join(counts),
            minutes=notes["minutes"],
            threads=notes["threads"],
            samples=recipe.samples,
            vae_steps=recipe.vae_steps,
            flow_steps=notes["flow steps done"],
            batch=recipe.batch,
            seed=notes["seed"],
        )
    )
