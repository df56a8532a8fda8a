"""Rewards that are computed in the learner, with gradients: decoded samples, judged by `rewards.*` with `gradient`.

Each learner rank holds the VAE and the scorers whole: they are small beside the denoiser, and gradients must not cross
a process. The same rewards may sit on servers, where evaluations are scored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.config.schema import Config
from pipeline.core.devices import resolve_dtype
from pipeline.core.types import PromptItem
from pipeline.generators.latent_codec import LatentCodec
from pipeline.generators.load.pipeline import load_component
from pipeline.generators.spec import PolicySpec
from pipeline.rewards.runner import build_reward


class GradientRewards:
    """Raises what loading the VAE or a scorer does."""

    def __init__(self, cfg: Config, device: torch.device) -> None:
        self._device, self._fps = device, cfg.generator.fps
        self.weights = {name: cfg.rewards[name].weight for name in cfg.gradient_rewards}
        self._runners = {name: build_reward(name, cfg.rewards[name]) for name in self.weights}
        vae = load_component(cfg.generator, "vae", resolve_dtype(cfg.generator.dtype, device.type))
        if vae is not None:
            vae.eval().requires_grad_(False).to(device)
        self._vae = vae

    def pixels(self, x0: torch.Tensor, spec: PolicySpec, seed: int) -> torch.Tensor:
        """Samples x0 [b, ...] -> float32 [b, F, 3, H, W] in 0..1, with gradients; black where the VAE decodes frame by
        frame and no reward looks at the frame. `seed`: of the frame picks. Raises UnsupportedPolicyError."""
        codec = LatentCodec(self._vae, spec, self._device)
        if spec.latents is None or not spec.latents.per_frame:
            return codec.decode(x0)
        frames = spec.latents.positions.shape[0]
        seen = sorted({int(i) for runner in self._runners.values() for i in runner.looks_at(frames, seed, self._fps)})
        decoded = codec.decode(x0, frames=seen)
        black = decoded.new_zeros(decoded.shape[0], frames, *decoded.shape[2:])
        return black.index_copy(1, torch.tensor(seen, device=decoded.device), decoded)

    def values(self, pixels: torch.Tensor, prompts: Sequence[PromptItem], seed: int) -> dict[str, torch.Tensor]:
        """Pictures [b, F, 3, H, W] and their prompts -> each reward [b], with gradients to the pictures."""
        return {name: runner.gradient(pixels, prompts, seed, fps=self._fps) for name, runner in self._runners.items()}
