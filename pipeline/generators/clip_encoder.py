"""Clips of data as finished latents, and the noise that takes begin with: what rollout workers do for sources that read
files."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.core.captioned_clips import DataClips
from pipeline.core.errors import InputError, UnsupportedPolicyError
from pipeline.core.files import describe_os_error
from pipeline.core.types import Media, PromptItem
from pipeline.generators.latent_codec import LatentCodec
from pipeline.generators.latent_map import LatentMap
from pipeline.generators.policy_pipeline import cpu_generator
from pipeline.generators.spec import PolicySpec

log = logging.getLogger("rushes.clips")
KEPT_BYTES = 256 * 2**20  # of encodings; those used last stay


class ClipEncoder:
    """Encodes clips and keeps the encodings, by the file's content: of one worker, whose VAE does not change."""

    def __init__(self, vae: Any, spec: PolicySpec, device: torch.device, data: DataClips) -> None:
        """`vae`: the pipeline's own. Raises UnsupportedPolicyError where it cannot encode."""
        self.vae, self.spec, self.device, self.data = vae, spec, device, data
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._kept_bytes = 0
        if vae is None:
            raise UnsupportedPolicyError(f"{spec.pipeline} cannot use clips of data: it has no component called vae")
        with self._codec() as codec:
            if why_not := codec.why_no_encode:
                raise UnsupportedPolicyError(f"{spec.pipeline} cannot use clips of data: {why_not}")

    def encode(self, paths: Sequence[str]) -> torch.Tensor:
        """Float32 [K, ...] on the CPU, the samples x0 of the clips. Raises InputError."""
        return torch.stack([self._encoded(Path(path)) for path in paths])

    def read(self, paths: Sequence[str]) -> Media:
        """The clips' own frames, as the generator would make them. Raises InputError."""
        return Media(frames=np.stack([self.data.form.read(Path(path)) for path in paths]), fps=self.data.form.fps)

    def check(self, paths: Sequence[str]) -> float:
        """Mean difference between a clip, the first that can be read, and its decoded encoding, in grey levels. Raises
        UnsupportedPolicyError where it is above the largest that the config allows; InputError where none can be read.
        """
        for path in paths[:-1]:
            try:
                return self._check(path)
            except InputError as error:  # its own groups will fail
                log.warning("the VAE is checked with another clip: %s", error)
        return self._check(paths[-1])

    def _check(self, path: str) -> float:
        frames = self.data.form.read(Path(path))
        x0 = self.encode([path]).to(self.device)
        with self._codec() as codec, torch.no_grad():
            if why_not := codec.why_no_decode:
                raise UnsupportedPolicyError(f"{self.spec.pipeline}: encoded clips cannot be checked: {why_not}")
            decoded = codec.decode(x0)[0].permute(0, 2, 3, 1).float().cpu().numpy() * 255.0
        error = float(np.abs(decoded - frames).mean())
        if not error <= self.data.largest_error:
            raise UnsupportedPolicyError(
                f"{path}: encoded and decoded again, it differs by {error:.1f} grey levels on average; at most "
                f"{self.data.largest_error:g} are allowed (source.largest_error): the generator's VAE does not fit the "
                "clips"
            )
        return error

    def _encoded(self, path: Path) -> torch.Tensor:
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise InputError(f"cannot read {describe_os_error(error, path)}") from None
        if digest in self._kept:
            self._kept.move_to_end(digest)
            return self._kept[digest]
        with self._codec() as codec:
            x0 = codec.encode(self.read([str(path)]))[0].cpu()
        self._kept[digest] = x0
        self._kept_bytes += x0.nbytes
        while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        return x0

    @contextmanager
    def _codec(self) -> Iterator[LatentCodec]:
        """The codec on the pipeline's VAE, which then has its own dtype again: some are computed in float32."""
        dtype = self.vae.dtype
        try:
            yield LatentCodec(self.vae, self.spec, self.device)
        finally:
            if self.vae.dtype != dtype:
                self.vae.to(dtype)


def files_of(prompt: PromptItem) -> list[str]:
    """The clips that a row of data names."""
    return [*([prompt.clip] if prompt.clip is not None else []), *(take.path for take in prompt.takes)]


def begin_noise(shape: Sequence[int], seeds: Sequence[int], latents: LatentMap | None, offset: float) -> torch.Tensor:
    """Noise that clean samples begin with, float32 [K, *shape]: a take's depends on its own seed alone.

    `offset`: std of a further Gaussian for each frame and channel of the latents, the same at all their positions
    (InstructVideo's temporal offset noise, which is added to the plain noise); then `latents` has to be given.
    """
    noise = []
    for seed in seeds:
        source = cpu_generator(seed)
        eps = torch.randn(tuple(shape), generator=source)
        if offset > 0:
            assert latents is not None
            whole = latents.positions.shape
            level = torch.randn(*whole[:-2], 1, 1, generator=source).expand(whole)
            eps = eps + offset * latents.arrange(level[None].contiguous())[0]
        noise.append(eps)
    return torch.stack(noise)
