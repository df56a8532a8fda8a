"""Which sizes `rushes inspect` probes a checkpoint with: small ones, from the configs of its networks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch

from pipeline.generators.call.signature import FRAMES, parameters_of

_LARGEST = 256  # pixels; a probe needs no more
_LARGEST_LATENT = 64  # latent positions a side: beyond it a VAE's attention takes gigabytes


class ProbeSize(NamedTuple):
    height: int  # pixels
    width: int
    num_frames: int


def probe_sizes(
    pipe: Any, modules: dict[str, torch.nn.Module], height: int | None, width: int | None, num_frames: int | None
) -> Iterator[ProbeSize]:
    """Sizes to try, the likeliest first. `height`, `width`, `num_frames`: fixed by the user; None: chosen here."""
    configs = [module.config for module in modules.values()]
    sides = _sides(pipe, configs)
    lengths = [num_frames] if num_frames else _lengths(pipe, configs)
    order = [(sides[0], length) for length in lengths[:2]] if sides else []
    order += [(side, lengths[0]) for side in sides[:5]]
    order += [(side, length) for length in lengths[1:] for side in sides[:3]]
    order += [(side, lengths[0]) for side in sides[5:]]
    for side, length in dict.fromkeys(order):
        yield ProbeSize(height or side, width or side, length)


def _sides(pipe: Any, configs: list[Any]) -> list[int]:
    """Pixels a side of square pictures."""
    names = ("vae_scale_factor_spatial", "vae_scale_factor", "vae_spatial_compression_ratio", "movq_scale_factor")
    scale = _first(getattr(pipe, name, None) for name in names)
    scale = int(scale) if isinstance(scale, (int, float)) else 8
    if not any("vae" in name or "movq" in name or "vqgan" in name for name in pipe.components):
        scale = 1  # the denoiser works on pixels
    sample = _first(c.get(key) for c in configs for key in ("sample_size", "sample_height", "input_size"))
    sample = max(sample) if isinstance(sample, (list, tuple)) else sample
    trained_side = int(sample) * scale if isinstance(sample, int) else 0
    sides = [trained_side] if 16 <= trained_side <= _LARGEST else []
    sides += [max(16, 8 * scale), 32, 64, 128, _LARGEST, trained_side, 512]
    return [side for side in dict.fromkeys(sides) if 8 <= side <= min(1024, _LARGEST_LATENT * scale)]


def _lengths(pipe: Any, configs: list[Any]) -> list[int]:
    """Frames of a clip; [1] for pipelines that make pictures."""
    parameters = parameters_of(pipe)
    if not any(name in parameters for name in (*FRAMES, "video")):
        return [1]
    names = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "temporal_vae_scale_factor")
    ratio = _first(getattr(pipe, name, None) for name in names)
    step = int(ratio) if isinstance(ratio, (int, float)) and ratio > 1 else 0
    trained = [c.get(key) for c in configs for key in ("video_length", "sample_frames", "num_frames")]
    lengths = [n for n in trained if isinstance(n, int) and n <= 17]
    lengths += [2 * step + 1, 4 * step + 1] if step else [4, 8]
    default = next((parameters[name].default for name in FRAMES if name in parameters), None)
    lengths += [default] if isinstance(default, int) and default <= 33 else []
    return list(dict.fromkeys(lengths))


def _first(values: Iterable[Any]) -> Any:
    return next((value for value in values if value), None)
