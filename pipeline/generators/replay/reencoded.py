"""The text inputs that a trained text encoder computed again for a replay, and the way of their gradients back."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pipeline.generators.spec import StepInputKey

TextInputs = dict[StepInputKey, torch.Tensor]


class ReencodedInputs:
    """Text inputs of one trajectory part: leaves for the replay, and the graph they were detached from.

    Many micro-batches accumulate gradients in the leaves; `backward` sends them through the text encoders once.
    """

    def __init__(self, inputs: TextInputs, reencode: Callable[[], TextInputs]) -> None:
        """`inputs`: with gradients; `reencode`: computes them again, without."""
        self._reencode = reencode
        self._reference: TextInputs | None = None
        self._roots: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # one leaf for an input met at several steps
        self.tensors: TextInputs = {}
        for key, root in inputs.items():
            if id(root) not in self._roots:
                self._roots[id(root)] = (root, root.detach().requires_grad_())
            self.tensors[key] = self._roots[id(root)][1]

    def backward(self) -> None:
        """Adds the encoders' gradients; call once, after the last replay."""
        pairs = [(root, leaf.grad) for root, leaf in self._roots.values() if leaf.grad is not None]
        if pairs:
            torch.autograd.backward([root for root, _ in pairs], [grad for _, grad in pairs])

    def reference(self) -> TextInputs:
        """The same inputs of the starting policy. Call with the adapters off; computed once."""
        if self._reference is None:
            inputs = self._reencode()
            self._reference = {key: inputs[key] for key in self.tensors}
        return self._reference
