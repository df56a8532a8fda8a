"""Finds the map from the scheduler's sample to what the VAE decodes, by value, and checks the pictures made with it.

The pipeline's own tail is run on samples given as the last step's result, with stand-ins for denoisers and decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.generators.call.output import to_pictures
from pipeline.generators.latent_map import LatentMap
from pipeline.generators.record.outputs import first_tensor
from pipeline.generators.record.stand_ins import StandIns

_TOLERANCE, _LOW_PRECISION_TOLERANCE = 1e-5, 2e-2  # relative to the largest latent value
_UNUSED = ("return_dict", "generator")  # arguments of vae.decode that do not matter to the pictures
_PROBE_VALUE = 64.0  # a sample value from which the scale is read


@dataclass(frozen=True, slots=True)
class DecoderCall:
    """One call of vae.decode."""

    latents: torch.Tensor  # [b, ...]
    output: torch.Tensor
    arguments: dict[str, Any]  # the further ones, by name


@dataclass(frozen=True, slots=True)
class Tail:
    """What a pipeline did with a finished sample."""

    calls: list[DecoderCall]
    pictures: np.ndarray  # float32 [K, F, H, W, 3] in 0..1


@contextmanager
def watched_decoder(vae: Any, stand_ins: StandIns) -> Iterator[list[DecoderCall]]:
    """Within the context, vae.decode is stood in for, and its calls are added to the list."""
    calls: list[DecoderCall] = []
    with stand_ins.in_place_of({"vae": vae}, "decode"):
        stand_in = vae.__dict__["decode"]

        def watch(*args: Any, **kwargs: Any) -> Any:
            output = stand_in(*args, **kwargs)
            rest = {**kwargs, **{str(place): value for place, value in enumerate(args[1:], 1)}}
            latents = args[0] if args else rest.pop("z")
            arguments = {name: value for name, value in rest.items() if name not in _UNUSED and value is not None}
            calls.append(DecoderCall(latents.detach().clone(), first_tensor(output), arguments))
            return output

        vae.__dict__["decode"] = watch
        yield calls


RunTail = Callable[[torch.Tensor], Tail]  # the last step's result [takes, ...] -> the tail


def find_latent_map(run: RunTail, shape: torch.Size, dtype: torch.dtype) -> tuple[LatentMap | None, str, str]:
    """(the map, why there is none, why the VAE alone does not make the pictures).

    `shape`, `dtype`: of the samples [takes, ...].
    """
    try:
        return _find(run, shape, dtype)
    except _NoMap as reason:
        return None, str(reason), str(reason)


class _NoMap(Exception):
    """Why there is none."""


def _find(run: RunTail, shape: torch.Size, dtype: torch.dtype) -> tuple[LatentMap, str, str]:
    takes, size = shape[0], shape[1:].numel()
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    tail = run(torch.zeros(shape, dtype=dtype))
    if not tail.calls:
        raise _NoMap("its pictures are not decoded by a VAE")
    exact = torch.finfo(tail.calls[0].latents.dtype).bits > 16 and torch.finfo(dtype).bits > 16
    bound = _TOLERANCE if exact else _LOW_PRECISION_TOLERANCE
    base = 64 if exact else 16
    zero, full = _latents(tail, takes), _latents(run(torch.full(shape, _PROBE_VALUE, dtype=dtype)), takes)
    scale = (full - zero) / _PROBE_VALUE
    held = scale[0] != 0
    if not bool(held.any()):
        raise _NoMap("what the VAE decodes does not depend on the last step")
    positions, digit = torch.zeros(held.shape, dtype=torch.long), 0
    while digit == 0 or base**digit < size:
        numbers = (torch.arange(size) // base**digit % base + 1).reshape(shape[1:]).expand(shape).to(dtype)
        received = _latents(run(numbers), takes)
        exact_digits = ((received - zero)[0] / torch.where(held, scale[0], 1.0))[held]
        whole = exact_digits.round()
        if float((exact_digits - whole).abs().max()) > 0.25 or float(whole.min()) < 1 or float(whole.max()) > base:
            raise _NoMap("what the VAE decodes is computed from the sample otherwise than by scale and shift")
        positions[held] += (whole.long() - 1) * base**digit
        digit += 1
    positions[~held] = -1
    if int(positions.max()) >= size:
        raise _NoMap("what the VAE decodes could not be traced back to the sample")
    found = LatentMap(
        positions=positions.numpy().astype(np.int32),
        scale=_compressed(torch.where(held, scale[0], 1.0)),
        shift=_compressed(torch.where(held, zero[0], 0.0)),
        sample_shape=tuple(shape[1:]),
        arguments=tail.calls[0].arguments,
    )
    tail = run(values)
    received = _latents(tail, takes)
    picked = values.double().flatten(1)[:, positions.clamp(min=0).flatten()].reshape(takes, *positions.shape)
    expected = picked * torch.from_numpy(found.scale).double() + torch.from_numpy(found.shift).double()
    if float(((expected - received)[:, held]).abs().max()) > bound * float(received.abs().max()):
        raise _NoMap("what the VAE decodes is computed from the sample otherwise than by scale and shift")
    return found, "", _picture_note(tail, takes)


def _picture_note(tail: Tail, takes: int) -> str:
    """Why the pictures are not just what the VAE gives; "" where they are."""
    if not all(_plain(call.arguments) and call.arguments == tail.calls[0].arguments for call in tail.calls):
        return "the VAE is given more than latents"
    try:
        decoded = to_pictures(torch.cat([call.output for call in tail.calls]), takes)
    except (RuntimeError, ValueError) as error:
        return f"the VAE's output is no picture ({error})"
    pictures = decoded.permute(0, 1, 3, 4, 2).cpu().numpy()
    if pictures.shape != tail.pictures.shape:
        return f"the pictures are {list(tail.pictures.shape[1:])}, the VAE's are {list(pictures.shape[1:])}"
    gap = float(np.abs(pictures - tail.pictures).max())
    return "" if gap <= 1e-4 else f"the pictures differ from the VAE's by {gap:.1e}"


def _plain(arguments: dict[str, Any]) -> bool:
    return all(isinstance(v, (str, int, float, bool, type(None))) and not k.isdigit() for k, v in arguments.items())


def _latents(tail: Tail, takes: int) -> torch.Tensor:
    """Float64 [takes, r, ...]."""
    latents = [call.latents for call in tail.calls]
    if any(z.shape[1:] != latents[0].shape[1:] for z in latents) or sum(z.shape[0] for z in latents) % takes:
        raise _NoMap("the VAE's batch does not hold the takes one after another")
    return torch.cat(latents).double().cpu().unflatten(0, (takes, -1))


def _compressed(tensor: torch.Tensor) -> np.ndarray:
    """Without the axes along which nothing changes."""
    array = tensor.numpy().astype(np.float32)
    for axis in range(array.ndim):
        first = array.take([0], axis)
        if np.array_equal(np.broadcast_to(first, array.shape), array):
            array = first
    return array
