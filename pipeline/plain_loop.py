"""The baseline: the same recipe in one plain process, rollout, score, train in turn, with one copy of the weights.

Written against diffusers: it knows the two shipped generators' denoiser calls and records and sends nothing.
It draws the takes that a run draws and trains with the same noise, so its metrics are a run's to rounding
(`tests/benchmarks/test_benchmarks.py`), and the two may be compared by the clock.

    python -m pipeline.plain_loop configs/quickstart.yaml --steps 5 --threads 1
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.core.prompts import PromptCursor, load_prompts
from pipeline.core.types import GroupWork, Media
from pipeline.generators.load.compiling import compile_blocks
from pipeline.generators.load.pipeline import channels_last
from pipeline.learner.replica import matching_noise
from pipeline.rewards.runner import build_reward
from pipeline.rl.group_plan import scoring_seed, train_work
from pipeline.rl.reward_combiner import Combiner


class PlainLoop:
    """Full weights, objective awm: the recipe of both quickstarts."""

    def __init__(self, cfg: Config, threads: int = 1, fast: bool = False) -> None:
        """`fast`: see `speed_up`."""
        if cfg.algorithm.objective != "awm" or cfg.trainable.kind != "full" or cfg.generator.guidance_scale != 1.0:
            raise ValueError("the plain loop knows objective awm on full weights without guidance only")
        torch.set_num_threads(threads)
        self.cfg = cfg
        self.pipe: Any = DiffusionPipeline.from_pretrained(cfg.generator.pretrained, use_safetensors=True)
        self.pipe.set_progress_bar_config(disable=True)
        for part in self.pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(False)
        self.denoiser = self.pipe.transformer
        self.reference = copy.deepcopy(self.denoiser) if cfg.algorithm.kl_beta > 0 else None
        self.denoiser.requires_grad_(True)
        if fast:
            self.speed_up()
        opt = cfg.optimizer
        self.parameters = list(self.denoiser.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=opt.lr, betas=(opt.betas[0], opt.betas[1]), eps=opt.eps, weight_decay=opt.weight_decay
        )
        self.ema = [p.detach().clone() for p in self.parameters] if opt.ema_decay > 0 else []
        self.scorers = {name: build_reward(name, reward) for name, reward in cfg.rewards.items()}
        self.prompts = load_prompts(cfg.prompts.train)
        self.cursor = PromptCursor(self.prompts, cfg.run.seed)
        self.combiner = Combiner(cfg.rewards, cfg.algorithm.advantage)
        self.texts: dict[str, dict[str, torch.Tensor]] = {}
        self.group = self.step = 0

    def speed_up(self) -> None:
        """Compiled blocks, and convolutions laid out for the CPU, as a run has them."""
        channels_last(self.pipe.vae)
        for denoiser in filter(None, (self.denoiser, self.reference)):
            compile_blocks({"transformer": denoiser}, torch.device("cpu"))

    def train_step(self) -> dict[str, float]:
        """One optimisation step. Returns its metrics, and seconds per phase under `time/`."""
        cfg, began = self.cfg, time.perf_counter()
        works, latents, scores = [], [], []
        score_s = 0.0
        for _ in range(cfg.algorithm.groups_per_step):
            work = train_work(cfg, self.group, self.step, self.cursor.next())
            final, media = self.rollout(work)
            started = time.perf_counter()
            seed = scoring_seed(cfg, work.group)
            scores.append({name: scorer.run(media, work.prompts, seed) for name, scorer in self.scorers.items()})
            score_s += time.perf_counter() - started
            works.append(work)
            latents.append(final)
            self.group += 1
        rolled = time.perf_counter()
        advantages = self.combiner.step(scores)
        self.combiner.commit()
        metrics = {**advantages.metrics, **self.learn(works, latents, advantages.advantages)}
        ended = time.perf_counter()
        self.step += 1
        times = {"step": ended - began, "rollout": rolled - began - score_s, "score": score_s, "learn": ended - rolled}
        return metrics | {f"time/{name}": seconds for name, seconds in times.items()}

    @torch.no_grad()
    def rollout(self, work: GroupWork) -> tuple[torch.Tensor, Media]:
        """The finished latents [K, ...] and the media of one group."""
        cfg, kept = self.cfg.generator, {}

        def keep(_pipe: Any, index: int, _timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            kept["latents"] = tensors["latents"]
            return tensors

        output = self.pipe(
            **self.encoded(work.prompts[0].text, work.takes),
            generator=[torch.Generator().manual_seed(seed % 2**63) for seed in work.seeds],
            num_inference_steps=work.sampling.num_steps,
            guidance_scale=1.0,
            height=cfg.height,
            width=cfg.width,
            **({"num_frames": cfg.num_frames} if self.is_video else {}),
            output_type="np",
            callback_on_step_end=keep,
        )
        values = np.asarray(output.frames if self.is_video else output.images[:, None])
        return kept["latents"], Media(frames=np.rint(values.clip(0.0, 1.0) * 255.0).astype(np.uint8), fps=cfg.fps)

    @property
    def is_video(self) -> bool:
        return self.cfg.generator.num_frames > 1

    @torch.no_grad()
    def encoded(self, text: str, takes: int) -> dict[str, torch.Tensor]:
        """The prompt's embeddings as the pipeline takes them, encoded once."""
        if text not in self.texts:
            length = self.cfg.generator.call_kwargs["max_sequence_length"]
            if self.is_video:
                found = self.pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=length)
                self.texts[text] = {"prompt_embeds": found[0]}
            else:
                found = self.pipe.encode_prompt(
                    text, None, None, do_classifier_free_guidance=False, max_sequence_length=length
                )
                self.texts[text] = {"prompt_embeds": found[0], "pooled_prompt_embeds": found[2]}
        return {name: tensor.repeat_interleave(takes, 0) for name, tensor in self.texts[text].items()}

    def velocity(self, denoiser: Any, x: torch.Tensor, sigma: float, text: str) -> torch.Tensor:
        """The denoiser's output for samples x [b, ...] of one prompt at noise level `sigma`."""
        inputs = self.encoded(text, x.shape[0])
        more = {} if self.is_video else {"pooled_projections": inputs["pooled_prompt_embeds"]}
        timestep = torch.full((x.shape[0],), sigma * 1000.0)
        embeds = inputs["prompt_embeds"]
        return denoiser(x, timestep=timestep, encoder_hidden_states=embeds, return_dict=False, **more)[0]

    def learn(
        self, works: list[GroupWork], latents: list[torch.Tensor], advantages: np.ndarray | list[np.ndarray]
    ) -> dict[str, float]:
        """One update: advantage-weighted matching with the KL term, over all (take, trained sigma) pairs."""
        cfg = self.cfg
        sigmas = self.pipe.scheduler.sigmas
        pairs = sum(work.takes * len(work.sampling.trained_steps) for work in works)
        self.optimizer.zero_grad(set_to_none=True)
        policy_loss = kl = 0.0
        for work, x0, weights in zip(works, latents, advantages, strict=True):
            signal = torch.from_numpy(np.array(weights, np.float32))
            for number, index in enumerate(work.sampling.trained_steps):
                sigma, text = float(sigmas[index]), work.prompts[0].text
                eps = matching_noise(cfg.run.seed, work.group, index, x0[0])
                noised = (1.0 - sigma) * x0 + sigma * eps
                velocity = self.velocity(self.denoiser, noised, sigma, text)
                error = (velocity - (eps - x0)).pow(2).flatten(1).mean(1)
                loss = -(signal * torch.exp(error.detach() - error)).sum()
                policy_loss += float(loss.detach()) / pairs
                if self.reference is not None and (number + work.group) % cfg.algorithm.kl_every == 0:
                    with torch.no_grad():
                        anchor = self.velocity(self.reference, noised, sigma, text)
                    distance = cfg.algorithm.kl_every * (velocity - anchor).pow(2).flatten(1).mean(1).sum()
                    kl += float(distance.detach()) / pairs
                    loss = loss + cfg.algorithm.kl_beta * distance
                (loss / pairs).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, cfg.optimizer.max_grad_norm)
        self.optimizer.step()
        if self.ema:
            decay = min(cfg.optimizer.ema_decay, (2.0 + self.step) / (11.0 + self.step))
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1.0 - decay)
        return {"policy_loss": policy_loss, "kl": kl, "grad_norm": float(norm)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=5, help="0: one for each line that is read")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fast", action="store_true")
    args = parser.parse_args()
    loop = PlainLoop(load_config(args.config, args.overrides), args.threads, args.fast)
    for _ in range(args.steps) if args.steps else sys.stdin:
        print(json.dumps(loop.train_step()), flush=True)


if __name__ == "__main__":
    main()
