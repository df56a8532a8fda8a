"""Trains `models/shapes-clip`, a small CLIP of the captioned shapes, to be used as a reward with gradients.

    python -m jobs.shapes.clip                  # -> models/shapes-clip, about 20 minutes on one core

It learns from drawn pictures (`clip_pictures.py`) and from what the shipped generators make of them (`clip_takes.py`),
against captions and pictures that differ in one attribute. Deterministic for a seed, a thread count and a torch
version.
"""

from __future__ import annotations

import argparse
import copy
import math
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from jobs.shapes.clip_card import evaluate, write_card
from jobs.shapes.clip_pictures import CAPTIONS, DRAWS, SCENES, Pictures, caption_credits, draw_pictures, joined, kind_of
from jobs.shapes.clip_takes import MILD, STRONG, as_seen, redrawn_frames, redrawn_images
from jobs.shapes.make import cosine, log
from jobs.shapes.parts import BOS, EOS, PAD, SPECIALS, TEXT_LENGTH, build_tokenizer
from pipeline.generators.export_folder import check_replaceable
from pipeline.rewards.models import scene_world
from pipeline.rewards.models.images import CLIP_MEAN, CLIP_STD

PATCH = 8
CAPTION_INDEX = {text: i for i, text in enumerate(CAPTIONS)}
FAMILIES, FAMILY = 12, 8  # captions of a step: so many scenes, each with its variants of one or two attributes
BOTCH = 0.25  # how likely each property of an object in half of the drawn pictures is off
REDRAWN, REDRAWN_CLIPS = 2000, 100  # pictures and clips (of 9 frames) that the shipped generators draw again
SHARPNESS = 10.0  # of the targets: a caption that is true to 0.75 weighs exp(-2.5) times what a true one does
PATCH_WEIGHT = 5.0  # of the auxiliary loss that names the object at each patch; its head is thrown away


@dataclass(frozen=True)
class Stage:
    """One training, from its peak learning rate down to almost 0."""

    steps: int
    lr: float
    kinds: tuple[float, ...]  # how often a family is of each kind of DRAWS
    redrawn: float | None  # share of pictures by a generator, where a scene has some; None: as they come
    takes: int  # pictures by a generator beside those, of as many of a step's scenes


STAGES = (Stage(900, 2e-3, (0.25, 0.25, 0.2, 0.3), None, 0), Stage(1300, 1.5e-3, (0.2, 0.2, 0.15, 0.45), 0.5, 40))
_STEPS = [stage.steps for stage in STAGES]


def build_model() -> CLIPModel:
    """A small CLIP of 48 x 48 pictures, initialised at random."""
    tower = {"num_attention_heads": 4, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 128, "intermediate_size": 384}
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(SPECIALS) + len(scene_world.vocabulary()),
            "num_hidden_layers": 2,
            "max_position_embeddings": TEXT_LENGTH,
            "pad_token_id": PAD,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
        },
        vision_config={**tower, "num_hidden_layers": 4, "image_size": scene_world.SIZE, "patch_size": PATCH},
        projection_dim=128,
        logit_scale_init_value=math.log(10.0),
    )
    return CLIPModel._from_config(config, attn_implementation="eager")  # faster than sdpa for so few tokens


# ----------------------------------------------------------------------------------------------------- data


def drawn_pictures(models: Path, seed: int) -> Pictures:
    """Drawn pictures, half of them clean and half botched, and those that the generators in `models` make of some."""
    rng, generator = np.random.default_rng([seed, 0]), torch.Generator().manual_seed(seed)
    scenes = [i for i, scene in enumerate(SCENES) for _ in range(DRAWS[kind_of(scene)])]
    drawn = [draw_pictures(scenes[part::2], rng, botch) for part, botch in enumerate((0.0, BOTCH))]
    return joined([*drawn, *_redrawn(models, MILD, rng, generator)])


def checked_pictures(models: Path, drawn: Pictures, seed: int) -> Pictures:
    """The same and takes of the generators, these and what they have redrawn labelled by what the checker sees."""
    torch.manual_seed(seed + 9)
    takes = _redrawn(models, STRONG, np.random.default_rng([seed, 9]), torch.Generator().manual_seed(seed + 9))
    mild = drawn.take(np.flatnonzero(drawn.redrawn))
    return joined([drawn.take(np.flatnonzero(~drawn.redrawn)), *(as_seen(each) for each in (mild, *takes))])


def _redrawn(
    models: Path, levels: tuple[float, ...], rng: np.random.Generator, generator: torch.Generator
) -> list[Pictures]:
    images = redrawn_images(models, REDRAWN, levels, rng, generator)
    return [images, redrawn_frames(models, REDRAWN_CLIPS, levels, rng, generator)]


class Sampler:
    """Draws the captions and pictures of a step."""

    def __init__(self, pictures: Pictures, stage: Stage, rng: np.random.Generator) -> None:
        self.pictures, self.stage, self.rng = pictures, stage, rng
        self.rows = [np.flatnonzero(pictures.scenes == i) for i in range(len(SCENES))]
        self.redrawn = [rows[pictures.redrawn[rows]] for rows in self.rows]
        self.kinds = {kind: [i for i, s in enumerate(SCENES) if kind_of(s) == kind] for kind in DRAWS}

    def family(self) -> list[int]:
        """A scene, others with one attribute changed, and two with two changed or naming things the other way round."""
        rng = self.rng
        kind = str(rng.choice(list(DRAWS), p=self.stage.kinds))
        scene = SCENES[int(rng.choice(self.kinds[kind]))]
        names = scene_world.stated_attributes(scene)
        chosen = [scene]
        for name in rng.permutation(names * 5)[: FAMILY - 3]:
            chosen.append(scene_world.changed(scene, str(name), rng))
        if scene.relation is not None:
            a, b = scene.pairs
            chosen.append(scene_world.Scene(*a[:1], b[1], 1, None, scene.relation, b[0], a[1]))  # shapes swapped
            chosen.append(scene_world.Scene(*b, 1, None, scene.relation, *a))  # objects swapped
        else:
            chosen += [scene_world.changed(scene_world.changed(scene, "colour", rng), "shape", rng) for _ in range(2)]
        return [CAPTION_INDEX[scene_world.caption(each)] for each in chosen]

    def step(self) -> tuple[list[str], Pictures, Tensor]:
        """Captions [T], pictures [B], and how far each caption is true of each picture [B, T]."""
        scenes = np.unique([i for _ in range(FAMILIES) for i in self.family()])
        rows = [self._row(i) for i in scenes]
        if self.stage.takes:
            known = [i for i in scenes if len(self.redrawn[i])]
            rows += [int(self.rng.choice(self.redrawn[self.rng.choice(known)])) for _ in range(self.stage.takes)]
        shown = self.pictures.take(np.array(rows))
        return [self._worded(i) for i in scenes], shown, torch.from_numpy(caption_credits(shown, scenes))

    def _row(self, scene: int) -> int:
        """A picture of the scene."""
        rows, share = self.redrawn[scene], self.stage.redrawn
        if share is None or not len(rows) or self.rng.random() >= share:
            rows = self.rows[scene]
        return int(self.rng.choice(rows))

    def _worded(self, index: int) -> str:
        """The caption; of a single object often that of a clip, whose motion no frame shows."""
        text = CAPTIONS[index]
        if kind_of(SCENES[index]) == "single" and self.rng.random() < 0.5:
            text += f" moving {self.rng.choice(scene_world.DIRECTIONS)} {self.rng.choice(scene_world.SPEEDS)}"
        return text


def normalised(pixels: Tensor) -> Tensor:
    """Pixels float [B, 3, H, W] in 0..1 -> as CLIP is given them."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def disturbed(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Noise, blur, another exposure and tint: pictures [B, 3, H, W] in 0..1 that still show the same."""

    def amount(low: float, high: float, channels: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(len(pixels), channels, 1, 1, generator=generator)

    blurred = nn.functional.avg_pool2d(nn.functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pixels = pixels + amount(-0.5, 1.0).clamp(min=0) * (blurred - pixels)
    pixels = pixels * amount(0.92, 1.06) * amount(0.97, 1.03, 3)
    noise = torch.randn(pixels.shape, generator=generator) * amount(-0.04, 0.06).clamp(min=0)
    return (pixels + noise).clamp(0, 1)


def patch_targets(pictures: Pictures) -> Tensor:
    """Colours and shapes of the object that covers each patch's centre, float [B, patches, 10]; 0 for background."""
    side = scene_world.SIZE // PATCH
    centres = (np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 1, 2) + 0.5) * PATCH
    places = pictures.places[:, None]  # [B, 1, slots, 4]
    distance = np.linalg.norm(centres - places[..., :2], axis=-1)
    covered = (distance < 1.15 * places[..., 2]) & (places[..., 3] > 0)
    nearest = np.where(covered, distance, np.inf).argmin(-1)  # [B, patches]
    labels = np.concatenate([pictures.colours, pictures.shapes], axis=-1)
    chosen = np.take_along_axis(labels[:, None], nearest[..., None, None], axis=2)[:, :, 0]
    return torch.from_numpy(chosen * covered.any(-1, keepdims=True)).float()


# ----------------------------------------------------------------------------------------------------- loss


def contrastive_loss(logits: Tensor, credits: Tensor) -> Tensor:
    """Cross-entropy of pictures over captions and of captions over pictures, logits and credits [B, T].

    The targets are softmax(SHARPNESS * credits), as CLIP's own where one caption alone is true and the rest are wholly
    false; here wrong captions are wrong by degrees, and several may be true.
    """
    targets = SHARPNESS * credits
    captions = -(targets.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    pictures = -(targets.softmax(0) * logits.log_softmax(0)).sum(0).mean()
    return 0.5 * (captions + pictures)


def fit(model: CLIPModel, pictures: Pictures, stage: Stage, seed: int, number: int) -> CLIPModel:
    """Trains `model` in stage `number`, from 0; returns a copy with averaged weights."""
    sampler, tokenizer = Sampler(pictures, stage, np.random.default_rng([seed, 1 + number])), build_tokenizer()
    patches = nn.Linear(model.config.vision_config.hidden_size, pictures.colours.shape[-1] + pictures.shapes.shape[-1])
    average = copy.deepcopy(model).eval().requires_grad_(False)
    weights = [*model.parameters(), *patches.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=stage.lr, weight_decay=0.05, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, cosine(stage.steps, warmup=100))
    generator = torch.Generator().manual_seed(seed + number)
    running = np.zeros(2)
    model.train()
    for step in range(stage.steps):
        texts, shown, credits = sampler.step()
        pixels = torch.from_numpy(shown.pixels).permute(0, 3, 1, 2).float() / 255
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            seen = model.vision_model(pixel_values=normalised(disturbed(pixels, generator)))
            images = nn.functional.normalize(model.visual_projection(seen.pooler_output).float(), dim=-1)
            read = model.text_model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
            captions = nn.functional.normalize(model.text_projection(read.pooler_output).float(), dim=-1)
            guesses = patches(seen.last_hidden_state[:, 1:]).float()
        contrast = contrastive_loss(model.logit_scale.exp() * images @ captions.T, credits)
        contrast = contrast - 0.5 * sum(  # the targets' own entropy, which no model can go below
            torch.special.entr((SHARPNESS * credits).softmax(d)).sum(d).mean() for d in (0, 1)
        )
        local = nn.functional.binary_cross_entropy_with_logits(guesses, patch_targets(shown))
        loss = contrast + PATCH_WEIGHT * local
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        decay = min(0.995, (step + 1) / (step + 20))
        with torch.no_grad():
            torch._foreach_lerp_([*average.parameters()], [*model.parameters()], 1 - decay)
        values = np.array([contrast.item(), local.item()])
        running = values if step == 0 else 0.95 * running + 0.05 * values
        if step % 50 == 0 or step == stage.steps - 1:
            log(f"step {step} contrast {running[0]:.4f} patches {running[1]:.4f} scale {model.logit_scale.exp():.1f}")
    return average


# ------------------------------------------------------------------------------------------------------ job


def save(model: CLIPModel, folder: Path) -> None:
    """A transformers folder: model, tokenizer, image processor."""
    size, crop = {"shortest_edge": scene_world.SIZE}, {"height": scene_world.SIZE, "width": scene_world.SIZE}
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(size=size, crop_size=crop).save_pretrained(folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/shapes-clip"), help="folder to write")
    parser.add_argument("--models", type=Path, default=Path("models"), help="where the two generators lie")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=len(STAGES), help="of each stage", metavar="N")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.out.exists():
        check_replaceable(options.out, "--out", [])
    started, cpu = time.time(), time.process_time()
    torch.manual_seed(options.seed)
    pictures = drawn_pictures(options.models, options.seed)
    log(f"made {len(pictures)} pictures in {time.time() - started:.0f} s")
    torch.manual_seed(options.seed)
    model = build_model()
    stages = [replace(stage, steps=steps) for stage, steps in zip(STAGES, options.steps or _STEPS, strict=True)]
    for number, stage in enumerate(stages):
        if number:
            pictures = checked_pictures(options.models, pictures, options.seed)
            torch.manual_seed(options.seed + number)
        model = fit(model.requires_grad_(True), pictures, stage, options.seed, number)
    notes = {
        "pictures": len(pictures),
        "takes": STAGES[-1].takes,
        "steps": sum(stage.steps for stage in stages),
        "seed": options.seed,
        "threads": options.threads,
    }
    notes |= {"seconds": round(time.time() - started), "cpu seconds": round(time.process_time() - cpu)}
    partial = options.out.with_name(options.out.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    save(model, partial)
    result = evaluate(partial, options.models)
    write_card(partial, model, result, notes, FAMILIES * FAMILY)
    shutil.rmtree(options.out, ignore_errors=True)
    partial.rename(options.out)
    log(f"shipped {options.out}: {result}")


if __name__ == "__main__":
    main()
