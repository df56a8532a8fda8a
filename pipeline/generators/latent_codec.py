"""Between the scheduler's samples and pictures: decoding, with gradients, and encoding, without code per model.

The map from a sample to what the VAE decodes was found when the pipeline was probed (`latent_map.py`), so that a VAE
alone is enough: the learner loads no pipeline for it. Where there is no such map, the pipeline's own tail decodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from pipeline.config.schema import GeneratorConfig
from pipeline.core.devices import resolve_dtype
from pipeline.core.errors import UnsupportedPolicyError
from pipeline.core.types import Media, PromptItem
from pipeline.generators.call.output import to_pictures, to_pixels
from pipeline.generators.load.pipeline import load_component
from pipeline.generators.policy_pipeline import CallPlan, PolicyPipeline
from pipeline.generators.spec import PolicySpec


class PipelineTail:
    """What a pipeline does with the result of its last step, run on a given one."""

    def __init__(self, pipeline: PolicyPipeline, plan: CallPlan) -> None:
        self.pipeline, self.plan = pipeline, plan

    def pictures(self, x0: torch.Tensor, prompts: Sequence[PromptItem], seeds: Sequence[int]) -> torch.Tensor:
        """Samples x0 [K, ...] -> float32 [K, F, 3, H, W] in 0..1; gradients as grad mode says.

        `prompts`: the takes', whose conditions a pipeline may put into the sample; K as many as its call takes.
        """
        return to_pixels(self.pipeline.run_tail(self.plan, x0, prompts, seeds, "pt"), len(prompts))


class LatentCodec:
    """See the module docstring. `vae`: None where the pipeline has none."""

    def __init__(
        self, vae: torch.nn.Module | None, spec: PolicySpec, device: torch.device, tail: PipelineTail | None = None
    ) -> None:
        self.vae: Any = vae  # a diffusers autoencoder, of any class
        self.spec, self.device, self.tail = spec, device, tail
        if vae is not None:
            _upcast(vae)

    @classmethod
    def load(cls, cfg: GeneratorConfig, spec: PolicySpec, device: torch.device) -> LatentCodec:
        """With the VAE of a checkpoint and nothing else of it. Raises InputError."""
        vae = load_component(cfg, "vae", resolve_dtype(cfg.dtype, device.type))
        if vae is not None:
            vae.eval().requires_grad_(False).to(device)
        return cls(vae, spec, device)

    @property
    def why_no_decode(self) -> str:
        """Why the VAE alone does not make the pictures, in one line; "": it does."""
        return self.spec.why_no_decode or ("the pipeline has no component called vae" if self.vae is None else "")

    @property
    def why_no_encode(self) -> str:
        """Why pictures cannot be encoded into samples, in one line; "": they can."""
        if self.vae is None or self.spec.latents is None:
            return self.spec.latents_note or "the pipeline has no component called vae"
        if not self.spec.latents.invertible:
            return "the latents do not decide all of the sample, which the prompt's own pictures are part of"
        return ""

    def decode(
        self,
        x0: torch.Tensor,
        frames: Sequence[int] | np.ndarray | None = None,
        prompts: Sequence[PromptItem] | None = None,
        seeds: Sequence[int] | None = None,
        together: bool = False,
    ) -> torch.Tensor:
        """Samples x0 [K, ...] -> pictures, float32 [K, F, 3, H, W] in 0..1; with gradients, each take's decoding is
        computed again in the backward pass. `together`: all takes in one call of the VAE, without gradients.

        `frames`: positions of those that are wanted; a VAE that decodes frame by frame decodes no others. `prompts`,
        `seeds`: of the takes, which the pipeline's tail needs. Raises UnsupportedPolicyError where neither can decode.
        """
        if self.why_no_decode:
            if self.tail is None or prompts is None:
                raise UnsupportedPolicyError(f"{self.spec.pipeline} cannot be decoded by its VAE: {self.why_no_decode}")
            pictures = self._by_tail(self.tail, x0, prompts, seeds or range(len(prompts)))
            return pictures if frames is None else pictures[:, list(frames)]
        latent_map = self.spec.latents
        assert latent_map is not None
        latents = latent_map.latents(x0)  # [K, r, ...]
        if latent_map.per_frame and frames is not None:
            latents, frames = latents[:, list(frames)], None
        if together:
            pictures = self._vae_pictures(latents.flatten(0, 1).to(self.vae.dtype), len(latents))
        else:
            pictures = torch.stack([self._decode_take(take.to(self.vae.dtype)) for take in latents])
        return pictures if frames is None else pictures[:, list(frames)]

    def _decode_take(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [r, ...] of one take -> [F, 3, H, W]."""
        if torch.is_grad_enabled() and latents.requires_grad:
            taken = checkpoint(self._vae_pictures, latents, use_reentrant=False, preserve_rng_state=False)
            assert isinstance(taken, torch.Tensor)
            return taken[0]
        return self._vae_pictures(latents)[0]

    def _vae_pictures(self, latents: torch.Tensor, takes: int = 1) -> torch.Tensor:
        latent_map = self.spec.latents
        assert latent_map is not None
        output = self.vae.decode(latents, **{**latent_map.arguments, "return_dict": False})[0]
        return to_pictures(output, takes)

    def _by_tail(
        self, tail: PipelineTail, x0: torch.Tensor, prompts: Sequence[PromptItem], seeds: Sequence[int]
    ) -> torch.Tensor:
        size = len(prompts) if tail.plan.mode.batched else 1
        calls = [slice(start, start + size) for start in range(0, len(prompts), size)]
        return torch.cat([tail.pictures(x0[takes], prompts[takes], list(seeds)[takes]) for takes in calls])

    @torch.no_grad()
    def encode(self, media: Media) -> torch.Tensor:
        """Clips or pictures -> samples x0, float32 [K, ...], as the mode of the VAE's distribution.

        Raises UnsupportedPolicyError where this pipeline's cannot be had, or the media's size or length is not its own.
        """
        if self.why_no_encode:
            raise UnsupportedPolicyError(f"{self.spec.pipeline} cannot encode pictures: {self.why_no_encode}")
        latent_map = self.spec.latents
        assert latent_map is not None
        encoded = []
        for take in media.frames:
            pixels = torch.from_numpy(take).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1.0  # [F, 3, H, W]
            if latent_map.positions.ndim == 5:  # a VAE of clips
                pixels = pixels.transpose(0, 1)[None]
            latents = _mode(self.vae.encode(pixels.to(self.vae.dtype)))
            if latents.shape != latent_map.positions.shape:
                raise UnsupportedPolicyError(
                    f"{self.spec.pipeline}: {take.shape[0]} frame(s) of {take.shape[2]}x{take.shape[1]} pixels encode "
                    f"to {list(latents.shape)}; the latents of a take are {list(latent_map.positions.shape)}"
                )
            encoded.append(latents)
        return latent_map.sample(torch.stack(encoded))


def _upcast(vae: Any) -> None:
    if getattr(vae.config, "force_upcast", False) and vae.dtype == torch.float16:
        vae.to(dtype=torch.float32)  # as its pipelines do: it overflows in float16


def _mode(output: Any) -> torch.Tensor:
    """What vae.encode returns -> latents. Raises UnsupportedPolicyError where it has none."""
    if hasattr(output, "latent_dist"):
        output = output.latent_dist.mode()
    for name in ("latent", "latents", "sample"):
        output = getattr(output, name, output)
    if not isinstance(output, torch.Tensor):
        raise UnsupportedPolicyError(f"the VAE encodes to {type(output).__name__}, which holds no latents")
    return output
