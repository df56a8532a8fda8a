"""Make the two shipped generators from nothing: draw scenes, train an autoencoder, then a flow model.

    python -m jobs.shapes.make image            # -> models/shapes-image
    python -m jobs.shapes.make video            # -> models/shapes-video

Deterministic for a seed, a thread count and a torch version.  Both captions and pictures come from
``pipeline.rewards.models.scene_world``; a share of the captions is wrong on purpose (see the model card this job
writes).
"""

from __future__ import annotations

import argparse
import copy
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from jobs.shapes.card import evaluate, write_card
from jobs.shapes.parts import RECIPES, TEXT_LENGTH, ImageParts, Recipe, VideoParts, build_tokenizer
from pipeline.generators.export_folder import check_replaceable
from pipeline.rewards.models import scene_world

CAPTION_VARIANTS = 4  # captions drawn per scene, each wrong or right by its own coin
DROPOUT = 0.1  # share of captions emptied, so that classifier-free guidance works too


def log(text: str) -> None:
    """One timestamped line."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


# ----------------------------------------------------------------------------------------------------- data


def draw_dataset(kind: str, recipe: Recipe, seed: int) -> tuple[np.ndarray, Tensor]:
    """Pictures uint8 [N, 48, 48, 3] or clips [N, 9, 48, 48, 3], and caption ids int64 [N, variants, 12]."""
    rng, liar = (np.random.default_rng([seed, kind == "video", use]) for use in range(2))
    video = kind == "video"
    drawn, texts = [], []
    for _ in range(recipe.samples):
        scene = scene_world.sample_scene(rng, video=video)
        drawn.append(scene_world.draw_video(scene, rng) if video else scene_world.draw_image(scene, rng))
        texts.append([scene_world.wrong_caption(scene, liar, recipe.wrong) for _ in range(CAPTION_VARIANTS)])
    tokenizer = build_tokenizer()
    caption_ids: dict[str, list[int]] = {}
    for text in {text for row in texts for text in row}:
        caption_ids[text] = tokenizer(text, padding="max_length", max_length=TEXT_LENGTH, truncation=True).input_ids
    return np.stack(drawn), torch.tensor([[caption_ids[text] for text in row] for row in texts])


def to_pixels(drawn: np.ndarray) -> Tensor:
    """uint8 [..., H, W, 3] to float [B, 3, (F,) H, W] in [-1, 1]."""
    pixels = torch.from_numpy(drawn).float() / 127.5 - 1.0
    return pixels.movedim(-1, 1)


# ----------------------------------------------------------------------------------------------- autoencoder


def object_weights(pixels: Tensor, extra: float) -> Tensor:
    """Loss weights float [B, 1, (F,) H, W], mean 1: pixels at and around coloured objects count ``extra`` more.

    Objects are a twentieth of the picture and all of the difficulty; backgrounds are almost neutral, so what is
    colourful is object.
    """
    colourful = (pixels.amax(1) - pixels.amin(1) > 0.25).float()
    flat = colourful.reshape(-1, 1, *pixels.shape[-2:])
    near = nn.functional.max_pool2d(flat, 5, stride=1, padding=2).reshape(colourful.shape)
    weights = 1 + extra * near[:, None]
    return weights / weights.mean()


def fit_autoencoder(
    parts: ImageParts | VideoParts, drawn: np.ndarray, recipe: Recipe, rng: np.random.Generator
) -> None:
    """Train ``parts.vae`` in place: L1 + MSE + a whisper of KL.

    The video autoencoder sees single frames and whole clips in turn: frames are cheap and teach what is spatial.
    bfloat16 autocast halves the time of the convolutions on CPUs that have it and costs nothing visible.
    """
    optimiser = torch.optim.AdamW(parts.vae.parameters(), lr=recipe.vae_lr, weight_decay=1e-4, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, cosine(recipe.vae_steps))
    for step in range(recipe.vae_steps):
        clips = recipe.clip_batch > 0 and step % 2 == 0
        index = rng.integers(len(drawn), size=recipe.clip_batch if clips else recipe.vae_batch)
        if drawn.ndim == 4 or clips:
            pixels = to_pixels(drawn[index])
        else:
            pixels = to_pixels(drawn[index, rng.integers(scene_world.FRAMES, size=len(index))][:, None])
        with torch.autocast("cpu", torch.bfloat16):
            raw, kl = parts.encode_pixels(pixels, sample=True)
            again = parts.decode_pixels(raw)
        error = again.float() - pixels
        weights = object_weights(pixels, recipe.object_weight)
        loss = (weights * (error.abs() + 2.0 * error.square())).mean() + recipe.kl * kl.float()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parts.vae.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == recipe.vae_steps - 1:
            l1 = error.detach().abs().mean().item()
            log(f"autoencoder {step} loss {loss.item():.4f} l1 {l1:.4f} kl {kl.item():.3f}")


def polish_decoder(parts: ImageParts | VideoParts, drawn: np.ndarray, recipe: Recipe, rng: np.random.Generator) -> None:
    """Train the decoder alone on jittered latents of whole clips: crisper edges, and off-manifold latents too.

    A generator's latents are never quite an encoder's; a decoder that has seen slightly wrong ones forgives them.
    """
    drawn = drawn[: max(1, len(drawn) // 4)]
    with torch.no_grad():
        chunks = np.array_split(drawn, -(-len(drawn) // 50))
        latents = torch.cat([parts.encode_pixels(to_pixels(chunk))[0] for chunk in chunks])
    spread = latents.std([0, *range(2, latents.ndim)], keepdim=True)
    weights = [*parts.vae.decoder.parameters(), *parts.vae.post_quant_conv.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=recipe.vae_lr, weight_decay=1e-4, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, cosine(recipe.polish_steps))
    for step in range(recipe.polish_steps):
        index = rng.integers(len(drawn), size=5)
        pixels, raw = to_pixels(drawn[index]), latents[index]
        with torch.autocast("cpu", torch.bfloat16):
            again = parts.decode_pixels(raw + 0.08 * spread * torch.randn_like(raw))
        error = again.float() - pixels
        loss = (object_weights(pixels, recipe.object_weight) * (error.abs() + 2.0 * error.square())).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == recipe.polish_steps - 1:
            log(f"decoder {step} loss {loss.item():.4f}")


@torch.no_grad()
def encode_all(parts: ImageParts | VideoParts, drawn: np.ndarray) -> Tensor:
    """Normalised latents of the whole data set; the statistics go into the VAE config on the way."""
    chunks = np.array_split(drawn, len(drawn) // 50)
    raw = torch.cat([parts.encode_pixels(to_pixels(chunk))[0] for chunk in chunks])
    parts.set_statistics(raw)
    return parts.normalise(raw)


# ---------------------------------------------------------------------------------------------- flow matching


def cosine(steps: int, warmup: int = 50, floor: float = 0.02):
    """Learning-rate factor: linear warm-up, then half a cosine down to ``floor``."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / (steps - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


def noise_levels(batch: int, shift: float, generator: torch.Generator) -> Tensor:
    """Sigma float [B] in (0, 1): half logit-normal, half uniform, then shifted as the scheduler shifts."""
    normal = torch.sigmoid(torch.randn(batch, generator=generator))
    uniform = torch.rand(batch, generator=generator)
    sigma = torch.where(torch.rand(batch, generator=generator) < 0.5, normal, uniform).clamp(1e-3, 1.0)
    return shift * sigma / (1 + (shift - 1) * sigma)


def fit_flow(
    parts: ImageParts | VideoParts,
    latents: Tensor,
    captions: Tensor,
    recipe: Recipe,
    seed: int,
    save_at: Callable[[int, nn.Module], None],
) -> None:
    """Train transformer and text encoders in place; the averaged weights are put back at the end.

    ``save_at(step, average)`` is called after every step with a copy of ``parts`` holding the averaged weights.
    """
    trained = [parts.transformer, *parts.encoders]
    average = copy.deepcopy(parts).eval()
    pairs = [
        (slow, fast)
        for mine, yours in zip([average.transformer, *average.encoders], trained, strict=True)
        for slow, fast in zip(mine.parameters(), yours.parameters(), strict=True)
    ]
    weights = [p for module in trained for p in module.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=recipe.lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, cosine(recipe.steps, warmup=200))
    generator = torch.Generator().manual_seed(seed)
    empty = build_tokenizer()("", padding="max_length", max_length=TEXT_LENGTH).input_ids
    running, shape = 0.0, (-1,) + (1,) * (latents.ndim - 1)
    for module in trained:
        module.train()
    for step in range(recipe.steps):
        index = torch.randint(len(latents), (recipe.batch,), generator=generator)
        clean = latents[index]
        ids = captions[index, torch.randint(captions.shape[1], (recipe.batch,), generator=generator)]
        dropped = torch.rand(recipe.batch, generator=generator) < DROPOUT
        ids = torch.where(dropped[:, None], torch.tensor(empty), ids)
        noise = torch.randn(clean.shape, generator=generator)
        sigma = noise_levels(recipe.batch, recipe.shift, generator)
        noisy = clean + sigma.view(shape) * (noise - clean)
        loss = (parts.velocity(noisy, sigma, ids) - (noise - clean)).square().mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        decay = min(0.998, (step + 1) / (step + 20))
        with torch.no_grad():
            torch._foreach_lerp_([slow for slow, _ in pairs], [fast for _, fast in pairs], 1 - decay)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0 or step == recipe.steps - 1:
            log(f"flow {step} loss {running:.4f}")
        save_at(step, average)
    with torch.no_grad():
        for slow, fast in pairs:
            fast.copy_(slow)


# ------------------------------------------------------------------------------------------------------ job


def ship(kind: str, parts: ImageParts | VideoParts, recipe: Recipe, out: Path, notes: dict[str, object]) -> None:
    """Save as a diffusers folder with card and sample sheet; the folder appears all at once or not at all."""
    parts.eval()
    pipeline = parts.pipeline(recipe.shift)
    part, old = out.with_name(out.name + ".part"), out.with_name(out.name + ".old")
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    pipeline.save_pretrained(part, safe_serialization=True)
    result = evaluate(kind, part)
    write_card(kind, part, parts, recipe, result, notes)
    if out.exists():
        out.rename(old)
    part.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    log(f"shipped {out}: {result['credits']}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["image", "video"])
    parser.add_argument("--out", type=Path, help="folder to write (default models/shapes-KIND)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="optimisation steps of the transformer")
    parser.add_argument("--wrong", type=float, help="share of wrong training captions")
    parser.add_argument("--threads", type=int, default=1, help="small models gain nothing from a second")
    parser.add_argument("--work", type=Path, help="keep and reuse the trained autoencoder in this folder")
    parser.add_argument("--ship-every", type=int, default=0, help="also ship the half-trained model this often")
    parser.add_argument("--resume", type=Path, help="start from this saved pipeline's weights")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    recipe = RECIPES[options.kind]
    recipe = replace(recipe, steps=options.steps or recipe.steps)
    recipe = replace(recipe, wrong=recipe.wrong if options.wrong is None else options.wrong)
    out = options.out or Path("models") / f"shapes-{options.kind}"
    if out.exists():
        check_replaceable(out, "--out", [])
    out.parent.mkdir(parents=True, exist_ok=True)

    started = time.time()
    torch.manual_seed(options.seed)
    parts = ImageParts() if options.kind == "image" else VideoParts()
    drawn, captions = draw_dataset(options.kind, recipe, options.seed)
    log(f"drew {len(drawn)} scenes in {time.time() - started:.0f} s")
    kept = None if options.work is None else options.work / f"{options.kind}-vae.safetensors"
    if kept is not None and kept.exists():
        load_model(parts.vae, kept)
    else:
        fit_autoencoder(parts, drawn, recipe, np.random.default_rng(options.seed))
        if recipe.polish_steps:
            polish_decoder(parts, drawn, recipe, np.random.default_rng(options.seed + 1))
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            save_model(parts.vae, str(kept))
    parts.vae.requires_grad_(False).eval()
    vae_seconds = time.time() - started
    latents = encode_all(parts, drawn)
    log(f"autoencoder done after {vae_seconds:.0f} s; latents {tuple(latents.shape)} std {latents.std():.3f}")

    if options.resume is not None:
        saved = DiffusionPipeline.from_pretrained(str(options.resume))
        for name, module in parts.named_children():
            if name != "vae":
                module.load_state_dict(saved.components[name].state_dict())

    def notes(step: int) -> dict[str, object]:
        minutes = round((time.time() - started) / 60, 1)
        return {
            "seed": options.seed,
            "threads": options.threads,
            "flow steps done": step + 1,
            "minutes": minutes,
        }

    def save_at(step: int, average: nn.Module) -> None:
        if options.ship_every and step and step % options.ship_every == 0:
            ship(options.kind, copy.deepcopy(average), recipe, out, notes(step))

    fit_flow(parts, latents, captions, recipe, options.seed, save_at)
    ship(options.kind, parts, recipe, out, notes(recipe.steps - 1))


if __name__ == "__main__":
    main()
