"""Evaluates `shapes-clip` against the scene checker on takes of the shipped generators, and writes its model card.

python -m jobs.shapes.clip_card pairs.parquet       # held-out pairs of takes, labelled by the checker, for
rushes agree pairs.parquet -r clip_score --set clip_score.args.model=models/shapes-clip
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import CLIPModel

from jobs.shapes.card import sample
from jobs.shapes.clip_pictures import CAPTIONS, SCENES, draw_pictures
from pipeline.rewards.models import scene_world
from pipeline.rewards.models.clip import ClipEmbedder
from pipeline.rewards.models.images import CLIP_MEAN, CLIP_STD
from pipeline.rewards.scorers.scene import check_image

TAKES = {"image": 5, "video": 5}  # of each held-out prompt
ASCENT_TAKES, ASCENT_STEPS, ASCENT_RATE = 100, 50, 0.01


def credit(frame: np.ndarray, prompt: str) -> float:
    """The scene checker's score of one frame uint8 [H, W, 3]."""
    return float(np.mean(list(check_image(frame, prompt).values())))


def held_out_takes(kind: str, models: Path) -> tuple[np.ndarray, list[str], np.ndarray]:
    """(takes uint8 [K, F, 48, 48, 3], their prompts, the checker's credit of each frame [K, F])."""
    video = kind == "video"
    prompts = scene_world.video_prompts(held_out=True) if video else scene_world.image_prompts(held_out=True)
    rows = [prompt for prompt in prompts for _ in range(TAKES[kind])]
    with torch.inference_mode():
        takes = sample(DiffusionPipeline.from_pretrained(str(models / f"shapes-{kind}")), kind, rows, seed=1234)
    credits = [[credit(frame, prompt) for frame in take] for take, prompt in zip(takes, rows, strict=True)]
    return takes, rows, np.array(credits)


def pairs_of(prompts: list[str], credits: np.ndarray) -> list[tuple[int, int]]:
    """(better, worse) take of each pair of one prompt whose credits [K] differ."""
    rows = np.array(prompts)
    pairs = [pair for prompt in dict.fromkeys(prompts) for pair in combinations(np.flatnonzero(rows == prompt), 2)]
    different = [(int(a), int(b)) for a, b in pairs if abs(credits[a] - credits[b]) > 1e-6]
    return [(a, b) if credits[a] > credits[b] else (b, a) for a, b in different]


def write_pairs(path: Path, models: Path) -> None:
    """The table that `rushes agree` reads: pairs of pictures, and of the last frames of clips."""
    table: dict[str, list] = {"prompt": [], "bytes_a": [], "bytes_b": [], "label": [], "kind": []}
    for kind in TAKES:
        takes, prompts, credits = held_out_takes(kind, models)
        for number, pair in enumerate(pairs_of(prompts, credits[:, -1])):
            a, b = pair[:: 1 if number % 2 else -1]
            row = {"prompt": prompts[a], "bytes_a": _png(takes[a, -1]), "bytes_b": _png(takes[b, -1])}
            for key, value in (row | {"label": "a" if a == pair[0] else "b", "kind": kind}).items():
                table[key].append(value)
    pq.write_table(pa.table(table), path)


def _png(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return file.getvalue()


def caption_accuracy(clip: ClipEmbedder, count: int, seed: int) -> float:
    """How often the caption of a newly drawn scene scores above one with another value of one attribute."""
    rng = np.random.default_rng(seed)
    scenes = [int(rng.integers(len(SCENES))) for _ in range(count)]
    images = clip.images(draw_pictures(scenes, rng, botch=0.0).pixels)
    wrong = []
    for i in scenes:
        names = scene_world.stated_attributes(SCENES[i])
        wrong.append(scene_world.caption(scene_world.changed(SCENES[i], names[int(rng.integers(len(names)))], rng)))
    right, other = clip.texts([CAPTIONS[i] for i in scenes])[0], clip.texts(wrong)[0]
    return float(((images * right).sum(1) > (images * other).sum(1)).float().mean())


def ascend(clip: ClipEmbedder, frames: np.ndarray, prompts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(frames uint8 after ASCENT_STEPS Adam steps on their pixels [N, 48, 48, 3], scores before and after [N])."""
    texts = clip.texts(prompts)[0].clone()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    pixels = (torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255).requires_grad_()
    optimiser = torch.optim.Adam([pixels], lr=ASCENT_RATE)
    scores = []
    for _ in range(ASCENT_STEPS + 1):
        score = (clip.embed_pixels((pixels - mean) / std) * texts).sum(1)
        scores.append(score.detach().numpy())
        optimiser.zero_grad()
        (-score.sum()).backward()
        optimiser.step()
        pixels.data.clamp_(0, 1)
    after = (pixels.detach() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return after, scores[0], scores[-1]


def evaluate(folder: Path, models: Path) -> dict[str, float]:
    """Numbers of the card."""
    clip = ClipEmbedder(str(folder), device="cpu", batch=64)
    result: dict[str, float] = {"caption accuracy": caption_accuracy(clip, 500, seed=99)}
    for kind in TAKES:
        takes, prompts, credits = held_out_takes(kind, models)
        texts = clip.texts(prompts)[0]
        images = clip.images(takes.reshape(-1, *takes.shape[2:])).reshape(*takes.shape[:2], -1)
        scores = (images * texts[:, None]).sum(-1).numpy()
        for name, (score, true) in {
            kind: (scores[:, -1], credits[:, -1]),
            f"{kind} mean": (scores.mean(1), credits.mean(1)),
        }.items():
            pairs = pairs_of(prompts, true)
            result |= {f"{name} pairs": len(pairs), f"{name} agrees": _share(score[a] > score[b] for a, b in pairs)}
            result[f"{name} correlation"] = float(np.corrcoef(score, true)[0, 1])
        wrong = np.flatnonzero(credits[:, -1] < 1)[:ASCENT_TAKES]
        chosen = [prompts[i] for i in wrong]
        frames, before, after = ascend(clip, takes[wrong, -1], chosen)
        result |= {
            f"{kind} ascent takes": len(wrong),
            f"{kind} ascent score before": float(before.mean()),
            f"{kind} ascent score": float(after.mean()),
            f"{kind} ascent credit before": float(credits[wrong, -1].mean()),
            f"{kind} ascent credit": float(np.mean([credit(f, p) for f, p in zip(frames, chosen, strict=True)])),
        }
    return {name: round(value, 3) for name, value in result.items()}


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: zero-shot-image-classification
---

# shapes-clip

A very small CLIP (48 x 48 pixels, {size:.2f} M parameters) of the captioned shapes that `shapes-image` and
`shapes-video` draw, trained from scratch by `python -m jobs.shapes.clip`. It is a stock transformers `CLIPModel`; no
code of Rushes is needed to use it. It is a reward with gradients for the two generators, where nothing can be
downloaded:

```yaml
rewards:
  clip: {{scorer: clip_score, gradient: true, args: {{model: models/shapes-clip}}}}
```

## Data

{pictures} pictures with captions of the grammar in `pipeline/rewards/models/scene_world.py`; no outside data.

* Drawn scenes, half of them clean, half of them botched: objects between two shapes or colours, stretched, dented,
  two-toned, faded. All combinations of colour and shape occur, also those that the generators never saw.
* What the two shipped generators make of drawn scenes and clips: encoded, noised to levels from 0 (the autoencoder
  alone) to 0.75, denoised in five steps under the scene's caption, decoded. Only scenes and captions of the training
  side.
* Noise, blur, exposure and tint at random in every step.

How far a caption is true of a picture follows from the objects in it: the mean over the attributes that it states. In
the first stage these are the objects that were drawn. In the second stage the generators' pictures, and further
ones noised to 0.75 and 1 (takes of training captions), are labelled by **the objects that the scene checker sees**. So
the checker judges what it has taught here, on pictures and captions that were not in training. The first stage alone,
which never met the checker, reaches an accuracy of 0.81 on pictures and 0.84 on frames. 1,000 further steps of that
kind do not raise it, and neither do 700 further ones of the second.

## Training

{steps} steps in two stages, each of about {batch} captions and pictures in families: a scene, others that differ in
one attribute, and two that differ in two or name the same things the other way round; in the second stage with more
relations and {takes} further pictures by the generators. The loss is CLIP's, in both directions, with
softmax(10 x truth) as targets, because wrong captions are wrong by degrees; beside it every patch names the object that
covers it (a linear head that is thrown away). AdamW, bfloat16 autocast, averaged weights, seed {seed}, {threads}
thread, {seconds} s on a machine shared with other work ({cpu} s of CPU).

## How far it agrees with the scene checker

On takes of the shipped generators for the held-out prompts (ten steps, guidance 1; {image_takes} takes a prompt for
images, {video_takes} for clips): pairs of takes of one prompt whose checker scores differ, and how often this model
prefers the one that the checker prefers.

| | pairs | accuracy | correlation with the checker |
|---|---|---|---|
| pictures | {r[image pairs]} | {r[image agrees]:.3f} | {r[image correlation]:.3f} |
| last frames of clips | {r[video pairs]} | {r[video agrees]:.3f} | {r[video correlation]:.3f} |
| clips, mean over all frames | {r[video mean pairs]} | {r[video mean agrees]:.3f} | {r[video mean correlation]:.3f} |

The same pairs as a table for `rushes agree`: `python -m jobs.shapes.clip_card pairs.parquet`.
Of newly drawn scenes the right caption scores above one with one wrong attribute in {r[caption accuracy]:.1%}.

## How easily it is misled

{ascent} Adam steps of {rate} on the pixels of takes that the checker finds wanting (means; the checker's shows how much
of the rise is real):

| | takes | score | checker |
|---|---|---|---|
| pictures | {r[image ascent takes]} | {r[image ascent score before]:.3f} to {r[image ascent score]:.3f} | \
{r[image ascent credit before]:.3f} to {r[image ascent credit]:.3f} |
| frames | {r[video ascent takes]} | {r[video ascent score before]:.3f} to {r[video ascent score]:.3f} | \
{r[video ascent credit before]:.3f} to {r[video ascent credit]:.3f} |

## What it is not

It knows this grammar and these pictures alone. It sees single frames: direction and speed of a moving object's caption
are ignored. Its score is a cosine, not a probability, and free pixels can raise it without showing what the caption
says; watch the checker (`scorer: scene`, weight 0) beside it.
"""


def write_card(folder: Path, model: CLIPModel, result: dict[str, float], notes: dict[str, int], batch: int) -> None:
    """Writes README.md into a saved folder."""
    size = sum(weight.numel() for weight in model.parameters()) / 1e6
    fields = {name.replace(" ", "_"): value for name, value in notes.items()} | {"cpu": notes["cpu seconds"]}
    text = CARD.format(
        size=size,
        batch=batch,
        r=result,
        image_takes=TAKES["image"],
        video_takes=TAKES["video"],
        ascent=ASCENT_STEPS,
        rate=ASCENT_RATE,
        **fields,
    )
    (folder / "README.md").write_text(text)


def _share(values: Iterable[bool]) -> float:
    return float(np.mean(list(values)))


if __name__ == "__main__":
    write_pairs(Path(sys.argv[1]), Path("models"))
