"""Other policies than the one in training: named sets of the trained weights, and modules that hold one for a pass.

The learner trains one set of weights. An objective may compare it with the policy it started from (`reference`), or
draw takes with a slow average of it (`old`), or pull it back to the weights it started from (`start`); evaluation uses
its EMA (`ema`). All but the reference are kept in checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor

from pipeline.learner.distributed import copy_into

REFERENCE, OLD, EMA, START = "reference", "old", "ema", "start"
Weights = dict[str, torch.Tensor]  # by the name of the trained parameter


class PolicyStore:
    """The sets, each a copy of the trained weights that starts equal to them."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], names: Iterable[str]) -> None:
        self.sets: dict[str, Weights] = {
            name: {key: tensor.detach().clone() for key, tensor in parameters.items()} for name in names
        }

    def __contains__(self, name: str) -> bool:
        return name in self.sets

    def __getitem__(self, name: str) -> Weights:
        return self.sets[name]

    @torch.no_grad()
    def follow(self, name: str, parameters: Mapping[str, torch.Tensor], decay: float) -> None:
        """The set := decay * set + (1 - decay) * parameters."""
        for key, parameter in parameters.items():
            self.sets[name][key].lerp_(parameter.detach(), 1.0 - decay)

    def tensors(self) -> Weights:
        """`<set>/<parameter>` -> tensor, for a checkpoint."""
        return {f"{name}/{key}": tensor for name, weights in self.sets.items() for key, tensor in weights.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restores what `tensors` gave; entries of other names are ignored."""
        for name, weights in self.sets.items():
            for key, tensor in weights.items():
                copy_into(tensor, tensors[f"{name}/{key}"])


@contextmanager
def worn(parameters: Mapping[str, torch.nn.Parameter], weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The parameters hold `weights` within the block. Without a copy, unless they are sharded."""
    before = {key: parameters[key].data for key in weights}
    if any(isinstance(tensor, DTensor) for tensor in before.values()):
        before = {key: tensor.clone() for key, tensor in before.items()}
    _wear(parameters, weights)
    try:
        yield
    finally:
        _wear(parameters, before)


@torch.no_grad()
def _wear(parameters: Mapping[str, torch.nn.Parameter], weights: Mapping[str, torch.Tensor]) -> None:
    for key, tensor in weights.items():
        if isinstance(parameters[key].data, DTensor):
            parameters[key].copy_(tensor)  # FSDP gathers from the memory that the parameter has
        else:
            parameters[key].data = tensor
