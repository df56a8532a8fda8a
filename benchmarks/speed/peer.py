"""The baseline that runs are compared with: a data-parallel trainer as strong as others' on the same machine.

Two processes of one thread, or as many as are started, each with a copy of the model. A process draws its share of a
step's groups in one batch, scores it, and trains on batches of the same size, of one noise level per group; gradients
are averaged with gloo, once per update. Prompts are encoded once. Objectives: `awm`, and `grpo` on Flow-SDE. It is
written against plain diffusers and knows the denoiser calls of the two shipped generators: nothing is recorded or
replayed. It draws the takes of a run and trains the same steps of them, with the same options.

Each process takes one step for every line that it reads, and answers with a line of JSON:

    for rank in 0 1; do
      yes '' | head -3 | python -m benchmarks.speed.peer configs/quickstart-image.yaml --rank $rank --meet /tmp/meet &
    done; wait
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.core.types import GroupWork, Media
from pipeline.learner.replica import matching_noise
from pipeline.plain_loop import PlainLoop
from pipeline.rl.group_plan import scoring_seed, train_work
from pipeline.rl.objectives import objective_of
from pipeline.rl.objectives.awm import AdvantageWeightedMatching
from pipeline.rl.objectives.grpo import GRPO
from pipeline.rl.samplers import log_prob, transition


@dataclass(frozen=True)
class Drawn:
    """The groups of one process, drawn in one batch of B takes; trained step -> (x_t, x_next [B, ...], log-prob [B])
    where noise was drawn."""

    works: list[GroupWork]
    latents: torch.Tensor  # x0 [B, ...]
    frames: np.ndarray  # uint8 [B, F, H, W, 3]
    transitions: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

    def rows(self, group: int) -> slice:
        takes = self.works[0].takes
        return slice(group * takes, (group + 1) * takes)


class Peer(PlainLoop):
    """One process of the trainer. `rank` of `world` takes every `world`-th group of a step."""

    def __init__(self, cfg: Config, rank: int, world: int, fast: bool = False) -> None:
        """`fast`: compiled blocks and a VAE laid out for the CPU, as a run has them."""
        super().__init__(cfg, threads=1, fast=fast)
        self.rank, self.world = rank, world

    def checked_objective(self, cfg: Config) -> Any:
        objective = objective_of(cfg)
        if not isinstance(objective, AdvantageWeightedMatching) and (
            not isinstance(objective, GRPO) or objective.kl_beta or cfg.sampler.kind != "flow_sde"
        ):
            raise ValueError("the baseline knows objective awm, and grpo with sampler flow_sde and kl_beta 0, only")
        return objective

    def train_step(self) -> dict[str, float]:
        """One optimisation step of all processes. Returns seconds per phase under `time/`, and metrics of this
        process's groups."""
        started = time.perf_counter()
        works = []
        for number in range(self.cfg.step.groups):
            work = train_work(self.cfg, self.group + number, self.step, self.cursor.next())
            if number % self.world == self.rank:
                works.append(work)
        self.group += self.cfg.step.groups
        drawn = self.draw(works)
        rolled_out = time.perf_counter()
        scores = []
        for group, work in enumerate(works):
            media, seed = Media(frames=drawn.frames[drawn.rows(group)], fps=self.cfg.generator.fps), work.group
            scores.append(
                {n: r.run(media, work.prompts, scoring_seed(self.cfg, seed)) for n, r in self.rewards.items()}
            )
        scored = time.perf_counter()
        result = self.signal.step(scores)
        self.signal.commit()
        advantages = [np.array(each.advantages, np.float32) for each in result.feedback]
        metrics = {"reward/mean": result.metrics["reward/mean"], **self.update(drawn, advantages)}
        self.step += 1
        ended = time.perf_counter()
        return metrics | {
            "time/step": ended - started,
            "time/rollout": rolled_out - started,
            "time/score": scored - rolled_out,
            "time/learn": ended - scored,
        }

    # ------------------------------------------------------------------------------------------- rollout

    @torch.no_grad()
    def draw(self, works: list[GroupWork]) -> Drawn:
        """All takes of the groups in one batch: as the pipeline's call, but for the noise that GRPO's steps draw."""
        sampling, texts = works[0].sampling, [prompt.text for work in works for prompt in work.prompts]
        generators = [torch.Generator().manual_seed(seed % 2**63) for work in works for seed in work.seeds]
        shape = self.latent_shape()
        x = torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators])
        scheduler = self.pipe.scheduler
        scheduler.set_timesteps(sampling.num_steps)
        sigmas = [float(sigma) for sigma in scheduler.sigmas]
        kept = {step for work in works for step in work.sampling.trained_steps}
        transitions = {}
        for step, (t, t_next) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
            velocity = self.velocities(self.denoiser, x, [t] * len(texts), texts)
            if step not in sampling.stochastic_steps:
                x = x + (t_next - t) * velocity
                continue
            moved = transition(sampling.kind, sampling.noise_level, "flow", x, velocity, t, t_next, sigmas[1])
            noise = torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators])
            x_next = moved.mean + moved.std * noise
            if step in kept:
                transitions[step] = x, x_next, log_prob(x_next, moved)
            x = x_next
        return Drawn(works, x, self.decode(x), transitions)

    def latent_shape(self) -> tuple[int, ...]:
        cfg, channels = self.cfg.generator, self.denoiser.config.in_channels
        if not self.is_video:
            return channels, cfg.height // self.pipe.vae_scale_factor, cfg.width // self.pipe.vae_scale_factor
        frames = (cfg.num_frames - 1) // self.pipe.vae_scale_factor_temporal + 1
        spatial = self.pipe.vae_scale_factor_spatial
        return channels, frames, cfg.height // spatial, cfg.width // spatial

    def decode(self, latents: torch.Tensor) -> np.ndarray:
        """uint8 [B, F, H, W, 3], as the pipelines decode."""
        vae = self.pipe.vae
        if self.is_video:
            shape = (1, -1, 1, 1, 1)
            mean = torch.tensor(vae.config.latents_mean).view(shape)
            std = torch.tensor(vae.config.latents_std).view(shape)
            decoded = vae.decode(latents * std + mean, return_dict=False)[0].movedim(1, -1)
        else:
            scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
            decoded = vae.decode(scaled, return_dict=False)[0].movedim(1, -1)[:, None]
        pixels = (decoded / 2 + 0.5).clamp(0, 1).numpy()
        return np.rint(pixels * 255.0).astype(np.uint8)

    def velocities(self, denoiser: Any, x: torch.Tensor, times: Sequence[float], texts: Sequence[str]) -> torch.Tensor:
        """v [b, ...] for samples [b, ...], each at its time in [0, 1] and for its prompt."""
        conditions = [self.encode_prompt(text, 1) for text in texts]
        joined = {name: torch.cat([each[name] for each in conditions]) for name in conditions[0]}
        pooled = {} if self.is_video else {"pooled_projections": joined["pooled_prompt_embeds"]}
        timestep = torch.tensor(times, dtype=torch.float32) * 1000.0
        embeds = joined["prompt_embeds"]
        return denoiser(x, timestep=timestep, encoder_hidden_states=embeds, return_dict=False, **pooled)[0]

    # ------------------------------------------------------------------------------------------- learning

    def update(self, drawn: Drawn, advantages: list[np.ndarray]) -> dict[str, float]:
        """One update with the gradients of all processes, averaged. Batches are as large as the rollout's."""
        pairs = sum(work.takes * len(work.sampling.trained_steps) for work in drawn.works)
        self.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for batch in self.batches(drawn):
            loss = self.loss(drawn, batch, advantages).sum() / pairs
            loss.backward()
            total += float(loss.detach())
        gradients = torch.cat([parameter.grad.flatten() for parameter in self.parameters])
        dist.all_reduce(gradients)
        gradients /= self.world
        for parameter, gradient in zip(
            self.parameters, gradients.split([p.numel() for p in self.parameters]), strict=True
        ):
            parameter.grad.copy_(gradient.view_as(parameter))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.cfg.optimizer.max_grad_norm)
        self.optimizer.step()
        if self.ema:
            decay = min(self.cfg.optimizer.ema_decay, (2.0 + self.step) / (11.0 + self.step))
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1.0 - decay)
        return {"loss": total, "grad_norm": float(norm)}

    def batches(self, drawn: Drawn) -> Iterator[tuple[tuple[int, int, int], ...]]:
        """Batches of (group, trained step, its number in the group), with as many takes as the rollout's."""
        pairs = [
            (group, step, number)
            for group, work in enumerate(drawn.works)
            for number, step in enumerate(work.sampling.trained_steps)
        ]
        pairs.sort(key=lambda pair: (pair[1], pair[0]))  # of one noise level, where the groups train the same ones
        for start in range(0, len(pairs), len(drawn.works)):
            yield tuple(pairs[start : start + len(drawn.works)])

    def loss(self, drawn: Drawn, batch: tuple[tuple[int, int, int], ...], advantages: list[np.ndarray]) -> torch.Tensor:
        """[b], of all takes of these groups at these trained steps."""
        takes = drawn.works[0].takes
        texts = [drawn.works[group].prompts[0].text for group, _, _ in batch for _ in range(takes)]
        sigmas = self.pipe.scheduler.sigmas.tolist()
        times = [sigmas[step] for _, step, _ in batch for _ in range(takes)]
        advantage = torch.from_numpy(np.concatenate([advantages[group] for group, _, _ in batch]))
        if drawn.transitions:
            return self._clipped_loss(drawn, batch, advantage, times, texts)
        return self._matching_loss(drawn, batch, advantage, times, texts)

    def _clipped_loss(self, drawn: Drawn, batch: Any, advantage: Any, times: Any, texts: Any) -> torch.Tensor:
        rows, sigmas = [drawn.rows(group) for group, _, _ in batch], self.pipe.scheduler.sigmas.tolist()
        old = [tuple(part[r] for part in drawn.transitions[step]) for r, (_, step, _) in zip(rows, batch, strict=True)]
        x = torch.cat([x for x, _, _ in old])
        velocity = self.velocities(self.denoiser, x, times, texts)
        ratios = []
        for (x_t, x_next, old_log_prob), v, (_, step, _) in zip(
            old, velocity.split(len(old[0][0])), batch, strict=True
        ):
            sampling = drawn.works[0].sampling
            moved = transition(
                sampling.kind, sampling.noise_level, "flow", x_t, v, sigmas[step], sigmas[step + 1], sigmas[1]
            )
            ratios.append((log_prob(x_next, moved) - old_log_prob).exp())
        ratio, objective = torch.cat(ratios), self.objective
        clipped = ratio.clamp(1.0 - objective.clip_low, 1.0 + objective.clip_high)
        return torch.maximum(-advantage * ratio, -advantage * clipped)

    def _matching_loss(self, drawn: Drawn, batch: Any, advantage: Any, times: Any, texts: Any) -> torch.Tensor:
        takes = drawn.works[0].takes
        x0 = torch.cat([drawn.latents[drawn.rows(group)] for group, _, _ in batch])
        noise = [
            matching_noise(self.cfg.run.seed, drawn.works[group].group, step, x0[0]).expand(takes, *x0.shape[1:])
            for group, step, _ in batch
        ]
        eps = torch.cat(noise)
        t = torch.tensor(times).view(-1, *[1] * (x0.ndim - 1))
        x_t = (1.0 - t) * x0 + t * eps
        velocity = self.velocities(self.denoiser, x_t, times, texts)
        error = (velocity - (eps - x0)).pow(2).flatten(1).mean(1)
        loss = -advantage * torch.exp(error.detach() - error)
        every = self.objective.kl_every
        chosen = [(number + drawn.works[group].group) % every == 0 for group, _, number in batch for _ in range(takes)]
        if self.reference is not None and any(chosen):
            with torch.no_grad():
                kept = [i for i, wanted in enumerate(chosen) if wanted]
                reference = self.velocities(
                    self.reference, x_t[kept], [times[i] for i in kept], [texts[i] for i in kept]
                )
            distance = (velocity[kept] - reference).pow(2).flatten(1).mean(1)
            loss = loss.index_add(0, torch.tensor(kept), self.objective.kl_beta * every * distance)
        return loss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--meet", required=True, help="a file that is not there yet, the same for all processes")
    parser.add_argument("--fast", action="store_true", help="compiled blocks, as in a run")
    args = parser.parse_args()
    dist.init_process_group("gloo", init_method=f"file://{args.meet}", rank=args.rank, world_size=args.world)
    peer = Peer(load_config(args.config, args.overrides), args.rank, args.world, args.fast)
    for _ in sys.stdin:
        print(json.dumps(peer.train_step()), flush=True)


if __name__ == "__main__":
    main()
