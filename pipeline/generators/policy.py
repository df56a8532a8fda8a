"""A diffusers pipeline as an RL policy: what a rollout worker holds.

Loads any checkpoint, probes how it works, draws takes with their trajectory, and takes in new weights.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from pipeline import weights as weights_lib
from pipeline.config import Config
from pipeline.errors import RushesError, UnsupportedPolicyError
from pipeline.generators.loading import accepted, denoisers_of, first_order_scheduler, load_pipeline, resolve_device
from pipeline.generators.probe import RATIO_TOLERANCE, find_spec
from pipeline.generators.recorder import Recording, record
from pipeline.generators.replay import Replayer, to_part
from pipeline.generators.spec import PolicySpec
from pipeline.samplers import log_prob, transition
from pipeline.samplers.transition import DIFFUSION_KINDS, FLOW_KINDS
from pipeline.types import GroupWork, Media, PromptItem, SamplingSpec, Trajectory, TrajectoryPart, WeightSet

_POLICY_NOISE = 0x5DEECE66D  # separates the policy's noise stream from the initial noise of the same seed
_PROBE_STEPS = 3
_CACHED_PROMPTS = 256


class Policy:
    """See the module docstring. Not thread-safe: one call at a time."""

    def __init__(self, cfg: Config, pipe: Any, device: torch.device) -> None:
        self.cfg, self.pipe, self.device = cfg, pipe, device
        self.modules = denoisers_of(pipe)
        self.prediction = first_order_scheduler(pipe)
        kinds = FLOW_KINDS if self.prediction == "flow" else DIFFUSION_KINDS
        if cfg.sampler.kind not in kinds:
            raise UnsupportedPolicyError(
                f"sampler.kind: {cfg.sampler.kind} does not fit {type(pipe).__name__}, which predicts "
                f"{self.prediction}; use {' or '.join(kinds)}"
            )
        self.spec: PolicySpec | None = None
        self.version = 0
        self._merged: weights_lib.MergedLora | None = None
        self._keep_mean = cfg.algorithm.objective != "grpo"
        _cache_prompts(pipe)

    @classmethod
    def load(cls, cfg: Config, device: str = "auto", threads: int = 0) -> Policy:
        """Loads the checkpoint named in the config. `threads`: torch compute threads (0: leave as is)."""
        if threads:
            torch.set_num_threads(threads)
        where = resolve_device(device)
        return cls(cfg, load_pipeline(cfg.generator, where), where)

    # -- weights ------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Adds what is trained (LoRA layers, or nothing for full weights), so that weights can be loaded."""
        weights_lib.attach(self.modules, self.cfg.trainable, self.cfg.run.seed)
        if self.cfg.rollout.merge_lora and self.cfg.trainable.kind == "lora":
            self._merged = weights_lib.MergedLora(self.modules)

    def load_weights(self, weights: WeightSet) -> str:
        """Puts a version in place; returns the checksum of what this policy now holds."""
        found = weights_lib.apply(self.modules, weights)
        if self._merged is not None:
            self._merged.merge()
        return found

    # -- sampling -----------------------------------------------------------------------------------------------

    def rollout(self, work: GroupWork) -> tuple[Media, Trajectory | None, dict[str, float]]:
        """Draws the takes of one group.

        Returns uint8 media of all takes, the trajectory (None where `sampling.trained_steps` is empty), and seconds
        per phase. Raises RushesError when the pipeline's output is not finite.
        """
        started = time.perf_counter()
        batch = self.cfg.rollout.batch or work.takes
        frames: list[np.ndarray] = []
        parts: list[TrajectoryPart] = []
        seconds = {"encode": 0.0, "denoise": 0.0, "decode": 0.0}
        for start in range(0, work.takes, batch):
            stop = min(start + batch, work.takes)
            began = time.perf_counter()
            images, recording = self._sample(
                work.prompts[start:stop],
                work.seeds[start:stop],
                work.shared_noise_seed,
                work.sampling,
                keep_steps=set(work.sampling.trained_steps),
            )
            ended = time.perf_counter()
            seconds["encode"] += recording.denoise_started - began
            seconds["denoise"] += recording.denoise_ended - recording.denoise_started
            seconds["decode"] += ended - recording.denoise_ended
            frames.append(images)
            if work.sampling.trained_steps:
                parts.append(to_part(recording.steps, start, stop, self._keep_mean))
        trajectory = None
        if parts:
            if self.spec is None:
                raise RuntimeError("probe() must run before trajectories are recorded")
            trajectory = Trajectory(
                group=work.group,
                version=self.version,
                sampling=work.sampling,
                parts=tuple(parts),
                spec=self.spec.to_dict(),
            )
        seconds["total"] = time.perf_counter() - started
        return Media(frames=np.concatenate(frames), fps=self.cfg.generator.fps), trajectory, seconds

    @torch.no_grad()
    def _sample(
        self,
        prompts: tuple[PromptItem, ...],
        seeds: tuple[int, ...],
        shared_noise_seed: int | None,
        sampling: SamplingSpec,
        *,
        keep_steps: set[int],
        keep_outputs: bool = False,
    ) -> tuple[np.ndarray, Recording]:
        """One pipeline call. Returns uint8 [K, F, H, W, 3] and the recording."""
        noise = [_generator(seed ^ _POLICY_NOISE) for seed in seeds]
        kwargs = self._call_arguments(prompts, sampling)
        kwargs["generator"] = [_generator(seed if shared_noise_seed is None else shared_noise_seed) for seed in seeds]
        with record(
            self.pipe,
            self.modules,
            self.prediction,
            sampling,
            noise,
            keep_steps=keep_steps,
            keep_outputs=keep_outputs,
        ) as recording:
            output = self.pipe(**kwargs)
        if recording.num_steps != sampling.num_steps:
            raise UnsupportedPolicyError(
                f"{type(self.pipe).__name__} took {recording.num_steps} scheduler steps, "
                f"where {sampling.num_steps} were asked for"
            )
        return _to_frames(output), recording

    def _call_arguments(self, prompts: tuple[PromptItem, ...], sampling: SamplingSpec) -> dict[str, Any]:
        cfg = self.cfg.generator
        kwargs: dict[str, Any] = {
            "prompt": [prompt.text for prompt in prompts],
            "height": cfg.height,
            "width": cfg.width,
            "num_frames": cfg.num_frames,
            "num_inference_steps": sampling.num_steps,
            "guidance_scale": sampling.guidance_scale,
            "output_type": "np",
        }
        if any(prompt.negative for prompt in prompts):
            kwargs["negative_prompt"] = [prompt.negative or "" for prompt in prompts]
        if any(prompt.image for prompt in prompts):
            from PIL import Image

            kwargs["image"] = [Image.open(prompt.image).convert("RGB") for prompt in prompts if prompt.image]
        return {**accepted(self.pipe.__call__, kwargs), **cfg.call}

    # -- probing ------------------------------------------------------------------------------------------------

    def probe(self, prompts: list[PromptItem] | None = None) -> dict[str, Any]:
        """Finds the policy spec and checks that replay repeats the rollout. Call before weights are attached or after.

        `prompts`: three to probe with (different texts, so that takes differ). Returns a plain-data report.
        Raises UnsupportedPolicyError with the numbers.
        """
        texts = prompts or [PromptItem(index=i, text=text) for i, text in enumerate(("a", "b", "c"))]
        trio = tuple((texts * 3)[:3])
        sampling = SamplingSpec(
            kind=self.cfg.sampler.kind,
            noise_level=self.cfg.sampler.noise_level,
            num_steps=_PROBE_STEPS,
            stochastic_steps=(0, 1),
            trained_steps=(0, 1),
            guidance_scale=self.cfg.generator.guidance_scale,
        )
        runs = {
            n: self._sample(trio[:n], tuple(range(11, 11 + n)), None, sampling, keep_steps={0, 1}, keep_outputs=True)[1]
            for n in (2, 3)
        }
        name = type(self.pipe).__name__
        self.spec, report = find_spec(name, self.prediction, runs[2], runs[3], sampling.guidance_scale)
        report.update(self._check_replay(runs[3], sampling))
        return report

    @torch.no_grad()
    def _check_replay(self, recording: Recording, sampling: SamplingSpec) -> dict[str, float]:
        """Replays steps out of order, whole and take by take; the log-ratio must be 0 to rounding."""
        part = to_part(recording.steps, 0, 3, keep_mean=False)
        replayer = Replayer(part, self.spec, self.modules, self.device)
        worst = {"replay_whole": 0.0, "replay_single": 0.0}
        for j in (1, 0, 1):
            step = part.steps[j]
            for key, cuts in (("replay_whole", [slice(0, 3)]), ("replay_single", [slice(i, i + 1) for i in range(3)])):
                for takes in cuts:
                    sample, next_sample, old = replayer.step_tensors(j, takes)
                    out = replayer.model_output(j, takes, sample)
                    moved = transition(
                        sampling.kind,
                        sampling.noise_level,
                        self.prediction,
                        sample,
                        out,
                        step.sigma,
                        step.sigma_next,
                        step.sigma_cap,
                    )
                    gap = float((log_prob(next_sample, moved) - old).abs().max())
                    worst[key] = max(worst[key], gap)
        exact = all(p.dtype == torch.float32 for m in self.modules.values() for p in m.parameters())
        bound = RATIO_TOLERANCE if exact else 1e-2
        # Single takes run through other kernels; over few latent values their rounding shows more.
        if not (worst["replay_whole"] < bound and worst["replay_single"] < 10 * bound):
            raise UnsupportedPolicyError(
                f"{type(self.pipe).__name__}: replaying a rollout gives log-ratios of up to {max(worst.values()):.1e} "
                f"(allowed {bound:.0e}); does it keep state between calls (caching, a stateful guider, dropout)?"
            )
        return worst


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed % 2**63)


def _to_frames(output: Any) -> np.ndarray:
    """A pipeline's numpy output -> uint8 [K, F, H, W, 3]. Raises RushesError on NaN."""
    values = getattr(output, "frames", None)
    if values is None:
        values = output.images
    values = np.asarray(values, np.float32)
    if not np.isfinite(values).all():
        raise RushesError("the generator's output has NaN or infinity; a lower learning rate or float32 may help")
    if values.ndim == 4:  # images [K, H, W, 3]
        values = values[:, None]
    return np.rint(values.clip(0.0, 1.0) * 255.0).astype(np.uint8)


def _cache_prompts(pipe: Any) -> None:
    """Remembers `encode_prompt` results by argument, so that a prompt is encoded once and not once per group."""
    encode = getattr(pipe, "encode_prompt", None)
    if encode is None:
        return
    cache: dict[str, Any] = {}

    def cached(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(v, torch.Tensor) for v in (*args, *kwargs.values())):
            return encode(*args, **kwargs)
        key = repr((args, sorted(kwargs.items())))
        if key not in cache:
            if len(cache) >= _CACHED_PROMPTS:
                cache.pop(next(iter(cache)))
            cache[key] = encode(*args, **kwargs)
        return cache[key]

    pipe.encode_prompt = cached
