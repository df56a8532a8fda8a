"""Trains the two shipped generators from scratch: draws scenes, trains an autoencoder, then a flow model.

    python -m jobs.shapes.make image            # -> models/shapes-image
    python -m jobs.shapes.make video            # -> models/shapes-video

Deterministic for a seed, a thread count and a torch version. Captions and pictures come from
`pipeline.rewards.models.scene_world`; a share of the captions is wrong on purpose (see the model card).
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

CAPTION_VARIANTS = 4  # captions per scene, each wrong or right independently
DROPOUT = 0.1  # share of empty captions, for classifier-free guidance


def log(text: str) -> None:
    """Prints a line with the time."""
    print(time.strftime("%H:%M:%S"), text, flush=True)


# ----------------------------------------------------------------------------------------------------- data


def draw_dataset(kind: str, recipe: Recipe, seed: int) -> tuple[np.ndarray, Tensor]:
    """Pictures uint8 [N, 48, 48, 3] or clips [N, 9, 48, 48, 3], and caption ids int64 [N, variants, 12]."""
    rng, caption_rng = (np.random.default_rng([seed, kind == "video", use]) for use in range(2))
    video = kind == "video"
    drawn, texts = [], []
    for _ in range(recipe.samples):
        scene = scene_world.sample_scene(rng, video=video)
        drawn.append(scene_world.draw_video(scene, rng) if video else scene_world.draw_image(scene, rng))
        texts.append([scene_world.wrong_caption(scene, caption_rng, recipe.wrong) for _ in range(CAPTION_VARIANTS)])
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
    """Loss weights float [B, 1, (F,) H, W], mean 1: pixels at and around objects have `extra` more weight.

    Objects cover about a twentieth of a picture and are what is hard to reconstruct. Backgrounds are almost grey, so
    colourful pixels belong to objects.
    """
    colourful = (pixels.amax(1) - pixels.amin(1) > 0.25).float()
    flat = colourful.reshape(-1, 1, *pixels.shape[-2:])
    near = nn.functional.max_pool2d(flat, 5, stride=1, padding=2).reshape(colourful.shape)
    weights = 1 + extra * near[:, None]
    return weights / weights.mean()


def fit_autoencoder(
    parts: ImageParts | VideoParts, drawn: np.ndarray, recipe: Recipe, rng: np.random.Generator
) -> None:
    """Trains `parts.vae` in place: L1 + MSE + a small KL term.

    The video autoencoder alternates between single frames and whole clips: frames are cheap and teach spatial detail.
    bfloat16 autocast halves the time of the convolutions on CPUs that support it, without a visible loss of quality.
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
            decoded = parts.decode_pixels(raw)
        error = decoded.float() - pixels
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
    """Trains the decoder alone on perturbed latents of whole clips, for sharper edges.

    The latents that a generator draws differ slightly from an encoder's; the perturbation makes the decoder robust.
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
            decoded = parts.decode_pixels(raw + 0.08 * spread * torch.randn_like(raw))
        error = decoded.float() - pixels
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
    """Normalised latents of the whole data set; also writes their statistics into the VAE config."""
    chunks = np.array_split(drawn, len(drawn) // 50)
    raw = torch.cat([parts.encode_pixels(to_pixels(chunk))[0] for chunk in chunks])
    parts.set_statistics(raw)
    return parts.normalise(raw)


# ---------------------------------------------------------------------------------------------- flow matching


def cosine(steps: int, warmup: int = 50, floor: float = 0.02):
    """Learning-rate factor: linear warm-up, then half a cosine down to `floor`."""

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
    """Trains transformer and text encoders in place; at the end they get the averaged weights.

    `save_at(step, average)` is called after every step with a copy of `parts` that holds the averaged weights.
    """
    trained = [parts.transformer, *parts.encoders]
    average = copy.deepcopy(parts).eval()
    pairs = [
        (slow, fast)
        for averaged, module in zip([average.transformer, *average.encoders], trained, strict=True)
        for slow, fast in zip(averaged.parameters(), module.parameters(), strict=True)
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
    """Saves a diffusers folder with card and sample sheet; `out` is replaced only when it is complete."""
    parts.eval()
    pipeline = parts.pipeline(recipe.shift)
    partial, old = out.with_name(out.name + ".part"), out.with_name(out.name + ".old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    pipeline.save_pretrained(partial, safe_serialization=True)
    result = evaluate(kind, partial)
    write_card(kind, partial, parts, recipe, result, notes)
    if out.exists():
        out.rename(old)
    partial.rename(out)
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
    parser.add_argument("--threads", type=int, default=1, help="a second thread does not speed up models this small")
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
    vae_file = None if options.work is None else options.work / f"{options.kind}-vae.safetensors"
    if vae_file is not None and vae_file.exists():
        load_model(parts.vae, vae_file)
    else:
        fit_autoencoder(parts, drawn, recipe, np.random.default_rng(options.seed))
        if recipe.polish_steps:
            polish_decoder(parts, drawn, recipe, np.random.default_rng(options.seed + 1))
        if vae_file is not None:
            vae_file.parent.mkdir(parents=True, exist_ok=True)
            save_model(parts.vae, str(vae_file))
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
