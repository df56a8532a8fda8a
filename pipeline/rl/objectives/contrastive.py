"""Contrastive denoising: of all prompts of a group, a take's own must denoise it best.

    SoftREPA (arXiv 2503.08250)   E_ij = mean |v - v(x_i, t, c_j)|^2 with one noise for all; logits
                                  scale exp(-E / temperature), cross-entropy with the own prompt as the label

Takes are captioned data (source clips with noise 0 and distinct), or the policy's own. It costs as many denoiser calls
as a group has takes, of all takes each.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from pipeline.config.sections.base import NonNegative, Positive
from pipeline.rl.objectives.base import Loss, Objective, Requirements, register
from pipeline.rl.objectives.micro_batch import MicroBatch


@register("contrastive")
class Contrastive(Objective):
    """Every take of a group is denoised under every prompt of the group, at one noise level and with the same noise;
    its own prompt must give the smallest error (SoftREPA). No reward teaches."""

    scale: Positive = Field(4.0, description="Of the logits (SoftREPA: 4 at first, then learned; fixed here).")
    temperature: Positive = Field(
        0.07, description="Of the error in the logits (SoftREPA: 0.07 at first, then learned; fixed here)."
    )
    denoising: NonNegative = Field(
        0.0, description="Weight of the denoising loss under the own prompt, which SoftREPA does without."
    )

    @property
    def requirements(self) -> Requirements:
        return Requirements(
            draws_noise=False,
            replay_metric="onpolicy/max_abs_gap",
            unit="tail",
            feedback="none",
            any_sample=True,
            given_takes=True,
            whole_group=True,
            several_prompts=True,
        )

    def tail_steps(self, steps: int, of_step: np.random.Generator, of_group: np.random.Generator) -> range:
        step = int(of_group.integers(steps))
        return range(step, step + 1)

    @property
    def terms(self) -> dict[str, float]:
        return {"contrastive": 1.0, "denoising": self.denoising}

    @property
    def logged(self) -> tuple[str, ...]:
        return (*self.terms, "accuracy")

    def loss(self, micro: MicroBatch) -> Loss:
        import torch

        x0 = micro.clean()
        takes, noise = x0.shape[0], micro.noise_of_takes()[:1].expand_as(x0)
        own = torch.arange(takes, device=x0.device)
        columns = [micro.denoise(0, x0, noise, [prompt] * takes).error for prompt in range(takes)]
        errors = torch.stack(columns, 1)  # [take, prompt]
        logits = self.scale * (-errors / self.temperature).exp()
        contrastive = torch.nn.functional.cross_entropy(logits, own, reduction="none")
        denoising = errors.diagonal()
        logs = {
            "contrastive": contrastive.detach(),
            "denoising": denoising.detach(),
            "accuracy": (errors.argmin(1) == own).float(),
        }
        return Loss(contrastive + self.denoising * denoising, logs)
