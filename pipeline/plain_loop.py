"""The algorithm in one process and one file: the first thing to read, and the baseline that runs are compared with.

Online RL on a text-to-image or text-to-video flow model, as both quickstarts do it. For every optimisation step:

  1. rollout     K takes of each of G prompts, drawn with the current policy (ODE sampler)
  2. score       every reward judges every take
  3. advantages  a take's reward relative to the other takes of its group (GRPO)
  4. learn       one AdamW update of the advantage-weighted matching loss (AWM, arXiv 2509.25050) with a KL term

It is written against plain diffusers: it knows the denoiser calls of the two shipped generators, so nothing has to be
recorded and replayed. It draws the takes that `rushes train` draws and trains with the same noise, so its metrics equal
a run's to rounding (`tests/benchmarks/test_benchmarks.py`).

    python -m pipeline.plain_loop configs/quickstart.yaml --steps 2
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.core.prompts import PromptCursor, load_prompts
from pipeline.core.types import Feedback, GroupWork, Media
from pipeline.generators.load.compiling import compile_blocks
from pipeline.generators.load.pipeline import channels_last
from pipeline.learner.replica import matching_noise
from pipeline.rewards.runner import build_reward
from pipeline.rl.group_plan import scoring_seed, train_work
from pipeline.rl.objectives import objective_of
from pipeline.rl.objectives.awm import AdvantageWeightedMatching
from pipeline.rl.signals import signal_of
from pipeline.rl.sources import source_of


@dataclass(frozen=True)
class Rollout:
    """One group: K takes of one prompt."""

    work: GroupWork  # the prompt, K seeds, and which sampler steps are trained
    latents: torch.Tensor  # x0 [K, ...]
    media: Media  # decoded


class PlainLoop:
    """Policy (all weights of the denoiser), reference, optimiser, EMA and rewards of one config."""

    def __init__(self, cfg: Config, threads: int = 1, fast: bool = False) -> None:
        """`threads`: compute threads. `fast`: compiled blocks and a VAE laid out for the CPU, as a run has them."""
        objective = self.objective = self.checked_objective(cfg)
        torch.set_num_threads(threads)
        self.cfg = cfg
        self.is_video = cfg.generator.num_frames > 1

        # The generator. Its denoiser is the policy; a frozen copy of the start is the reference of the KL term.
        self.pipe: Any = DiffusionPipeline.from_pretrained(cfg.generator.pretrained, use_safetensors=True)
        self.pipe.set_progress_bar_config(disable=True)
        for component in self.pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval().requires_grad_(False)
        self.denoiser = self.pipe.transformer
        self.reference = copy.deepcopy(self.denoiser) if objective.kl_beta > 0 else None
        self.denoiser.requires_grad_(True)
        if fast:
            channels_last(self.pipe.vae)
            for denoiser in filter(None, (self.denoiser, self.reference)):
                compile_blocks({"transformer": denoiser}, torch.device("cpu"))

        # The optimiser, and the average of the weights that is evaluated and exported in the end.
        opt = cfg.optimizer
        self.parameters = list(self.denoiser.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=opt.lr, betas=(opt.betas[0], opt.betas[1]), eps=opt.eps, weight_decay=opt.weight_decay
        )
        self.ema = [p.detach().clone() for p in self.parameters] if opt.ema_decay > 0 else []

        # Prompts in, rewards out.
        self.cursor = PromptCursor(load_prompts(cfg.prompts.train), cfg.run.seed)
        self.rewards = {
            name: build_reward(name, reward, cfg.faults.call_timeout_s) for name, reward in cfg.rewards.items()
        }
        self.signal = signal_of(cfg).begin(cfg.rewards)
        self.embeddings: dict[str, dict[str, torch.Tensor]] = {}  # prompt -> its text embeddings
        self.group = self.step = 0

    def checked_objective(self, cfg: Config) -> Any:
        """Raises ValueError for a recipe that is not the one above."""
        objective = objective_of(cfg)
        full = cfg.trainable.kind == "full" and source_of(cfg).data_clips(cfg) is None
        if not isinstance(objective, AdvantageWeightedMatching) or not full or cfg.generator.guidance_scale != 1.0:
            raise ValueError("the plain loop knows objective awm on full weights without guidance or clips only")
        return objective

    def train_step(self) -> dict[str, float]:
        """One optimisation step. Returns its metrics, and seconds per phase under `time/`."""
        started = time.perf_counter()

        # 1. Rollout: K takes of each of G prompts. Seeds depend on (run seed, group) alone.
        groups = []
        for _ in range(self.cfg.step.groups):
            groups.append(self.rollout(train_work(self.cfg, self.group, self.step, self.cursor.next())))
            self.group += 1
        rolled_out = time.perf_counter()

        # 2. Score: every reward judges every take of a group, on the same frames for all its takes.
        scores = []
        for group in groups:
            seed = scoring_seed(self.cfg, group.work.group)
            scores.append({name: r.run(group.media, group.work.prompts, seed) for name, r in self.rewards.items()})
        scored = time.perf_counter()

        # 3. Advantages: weighted sum of the rewards, minus the group's mean, divided by its std.
        result = self.signal.step(scores)
        self.signal.commit()

        # 4. Learn: one update of the policy.
        metrics = {**result.metrics, **self.learn(groups, result.feedback)}
        self.step += 1
        ended = time.perf_counter()
        return metrics | {
            "time/step": ended - started,
            "time/rollout": rolled_out - started,
            "time/score": scored - rolled_out,
            "time/learn": ended - scored,
        }

    # ------------------------------------------------------------------------------------------- 1. rollout

    @torch.no_grad()
    def rollout(self, work: GroupWork) -> Rollout:
        """Draws one group with the pipeline's own sampler: Euler steps of the flow ODE, noise only at the start."""
        cfg, latents = self.cfg.generator, {}

        def keep(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            latents["x0"] = tensors["latents"]  # those of the last step remain
            return tensors

        output = self.pipe(
            **self.encode_prompt(work.prompts[0].text, work.takes),
            generator=[torch.Generator().manual_seed(seed % 2**63) for seed in work.seeds],
            num_inference_steps=work.sampling.num_steps,
            guidance_scale=1.0,
            height=cfg.height,
            width=cfg.width,
            **({"num_frames": cfg.num_frames} if self.is_video else {}),
            output_type="np",
            callback_on_step_end=keep,
        )
        pixels = np.asarray(output.frames if self.is_video else output.images[:, None])  # [K, F, H, W, 3] in [0, 1]
        frames = np.rint(pixels.clip(0.0, 1.0) * 255.0).astype(np.uint8)
        return Rollout(work, latents["x0"], Media(frames=frames, fps=cfg.fps))

    @torch.no_grad()
    def encode_prompt(self, text: str, takes: int) -> dict[str, torch.Tensor]:
        """The prompt's embeddings for `takes` takes, as the pipeline's call takes them. Encoded once per prompt."""
        if text not in self.embeddings:
            options = {
                "do_classifier_free_guidance": False,
                "max_sequence_length": self.cfg.generator.call_kwargs["max_sequence_length"],
            }
            if self.is_video:
                embeds, _ = self.pipe.encode_prompt(text, **options)
                self.embeddings[text] = {"prompt_embeds": embeds}
            else:
                embeds, _, pooled, _ = self.pipe.encode_prompt(text, None, None, **options)
                self.embeddings[text] = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        return {name: tensor.repeat_interleave(takes, 0) for name, tensor in self.embeddings[text].items()}

    # ------------------------------------------------------------------------------------------- 4. learn

    def learn(self, groups: list[Rollout], feedback: list[Feedback]) -> dict[str, float]:
        """One update. The loss is the mean over all pairs (take, trained noise level) of

            -A exp(log p - log p_old) + kl_beta |v - v_ref|^2,   log p := -|v(x_t, t) - (eps - x0)|^2

        where x_t = (1 - t) x0 + t eps is the finished take, noised again. On-policy log p = log p_old, so the ratio is
        1 and its gradient raises the flow-matching likelihood of good takes and lowers that of bad ones.
        """
        objective, sigmas = self.objective, self.pipe.scheduler.sigmas
        pairs = sum(group.work.takes * len(group.work.sampling.trained_steps) for group in groups)
        policy_loss = kl = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for group, taught in zip(groups, feedback, strict=True):
            x0, text = group.latents, group.work.prompts[0].text
            advantage = torch.from_numpy(np.array(taught.advantages, np.float32))  # [K]
            for number, step in enumerate(group.work.sampling.trained_steps):
                t = float(sigmas[step])
                eps = matching_noise(self.cfg.run.seed, group.work.group, step, x0[0])  # the same for all takes
                x_t = (1.0 - t) * x0 + t * eps
                velocity = self.velocity(self.denoiser, x_t, t, text)
                error = (velocity - (eps - x0)).pow(2).flatten(1).mean(1)  # -log p [K]
                loss = -(advantage * torch.exp(error.detach() - error)).sum()
                policy_loss += float(loss.detach()) / pairs
                # At every kl_every-th noise level only, and that many times as heavy: the same on average.
                if self.reference is not None and (number + group.work.group) % objective.kl_every == 0:
                    with torch.no_grad():
                        reference = self.velocity(self.reference, x_t, t, text)
                    distance = objective.kl_every * (velocity - reference).pow(2).flatten(1).mean(1).sum()
                    kl += float(distance.detach()) / pairs
                    loss = loss + objective.kl_beta * distance
                (loss / pairs).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.cfg.optimizer.max_grad_norm)
        self.optimizer.step()
        if self.ema:
            decay = min(self.cfg.optimizer.ema_decay, (2.0 + self.step) / (11.0 + self.step))  # ramped up
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1.0 - decay)
        return {"policy_loss": policy_loss, "kl": kl, "grad_norm": float(norm)}

    def velocity(self, denoiser: Any, x_t: torch.Tensor, t: float, text: str) -> torch.Tensor:
        """v(x_t, t) [b, ...] for samples [b, ...] of one prompt; t in [0, 1]."""
        condition = self.encode_prompt(text, x_t.shape[0])
        pooled = {} if self.is_video else {"pooled_projections": condition["pooled_prompt_embeds"]}
        timestep = torch.full((x_t.shape[0],), t * 1000.0)
        embeds = condition["prompt_embeds"]
        return denoiser(x_t, timestep=timestep, encoder_hidden_states=embeds, return_dict=False, **pooled)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="The algorithm in one process; prints the metrics of every step.")
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=5, help="0: one step for each line read from stdin")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fast", action="store_true", help="compiled blocks, as in a run")
    args = parser.parse_args()
    loop = PlainLoop(load_config(args.config, args.overrides), args.threads, args.fast)
    for _ in range(args.steps) if args.steps else sys.stdin:
        print(json.dumps(loop.train_step()), flush=True)


if __name__ == "__main__":
    main()
