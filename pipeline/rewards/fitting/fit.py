"""Fits a linear head to labelled pairs of embedded takes, and tests it on prompts that it was not fitted on.

The prompts are split into folds. One head for each fold is fitted on the others, and one on everything, side by side
from the base's own score: gradient steps on the likelihood of `likelihood.py`, until the mean loss of the folds on
their own prompts has not fallen for a while. How long to go on with a fold is read from the other folds, so that what
is reported of a fold's pairs has not seen their labels.

With M > 1 heads each rater mixes them with weights of their own that sum to 1 (PAL, arXiv 2406.08469, its second model:
scores linear in the picture, prototypes shared by all people).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.core.errors import InputError
from pipeline.core.preference_statistics import fit_slope, folds_of
from pipeline.rewards.fitting.likelihood import eta_of_tie_share, log_likelihood
from pipeline.rewards.models.fitted_head import features

if TYPE_CHECKING:
    import torch

LEARNING_RATE, MOMENTUM = 0.3, 0.9  # of standardised weights: the curvature of the loss is at most 3 / 4
MIXING_RATE = 0.05
PATIENCE = 40  # steps without a better held-out loss
MAX_STEPS = 2000


@dataclass(frozen=True, kw_only=True)
class EmbeddedPairs:
    """N labelled pairs of P embedded pictures or clips and Q prompts."""

    images: torch.Tensor  # float32 [P, D]: unit vectors, of a clip their weighted mean over its frames
    texts: torch.Tensor  # float32 [Q, D]: unit vectors
    a: np.ndarray  # int [N], into `images`
    b: np.ndarray  # int [N]
    prompt: np.ndarray  # int [N], into `texts`
    label: np.ndarray  # int [N]: +1 a is better, -1 b, 0 tie
    rater: np.ndarray  # int [N], into `raters`
    raters: tuple[str, ...]

    def differences(self) -> torch.Tensor:
        """features(a) - features(b), float32 [N, 1 + 2 D]."""
        texts = self.texts[self.prompt]
        return features(self.images[self.a], texts) - features(self.images[self.b], texts)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """`heads` [M, 1 + 2 D], `mixtures` [U, M] (U = 0 for M = 1) and `eta` of everything; of each pair the held-out
    difference of scores [N] and the tie threshold [N] that went with it, and the base's cosine difference [N]."""

    heads: torch.Tensor
    mixtures: torch.Tensor
    eta: float
    difference: np.ndarray
    thresholds: np.ndarray
    base: np.ndarray
    steps: int


def fit(pairs: EmbeddedPairs, heads: int = 1, seed: int = 0, known: torch.Tensor | None = None) -> Fit:
    """`heads`: M. `known`: heads [M, 1 + 2 D] that stay as they are, so that only the raters' mixtures are fitted: few
    answers of a new rater suffice. Raises `InputError` where nothing can be held out."""
    import torch

    if len(np.unique(pairs.prompt)) < 2:
        raise InputError("the pairs are all of one prompt, so none can be held out; label takes of several prompts")
    if not (pairs.label != 0).any():
        raise InputError("all labels are ties, which tell no direction; label more pairs")
    folds = torch.as_tensor(folds_of(pairs.prompt))
    parts = int(folds.max()) + 1
    x = pairs.differences()
    base = x[:, 0].double().numpy()
    scale = _block_scale(x)
    heads = heads if known is None else len(known)
    model = _Model(x / scale, pairs, folds, parts, heads, seed, None if known is None else known * scale)
    best = torch.full((parts,), torch.inf)  # mean loss of the other folds
    held_difference, held_eta = torch.zeros(len(x)), torch.zeros(len(x))
    best_mean, kept, steps, since = torch.inf, model.state(), 0, 0
    for step in range(MAX_STEPS):
        difference, eta = model.forward()
        losses = -log_likelihood(difference, model.label, eta)
        with torch.no_grad():
            own = torch.stack([losses[k, folds == k].mean() for k in range(parts)])
            others = (own.sum() - own) / (parts - 1)
            for k in torch.nonzero(others < best).flatten().tolist():
                held_difference[folds == k], held_eta[folds == k] = difference[k, folds == k], eta[k, 0]
            best = torch.minimum(best, others)
            if float(own.mean()) < best_mean:
                best_mean, kept, steps, since = float(own.mean()), model.state(), step, 0
        since += 1
        if since > PATIENCE:
            break
        model.update(losses)
    weights, mixtures, eta_of_all = kept
    return Fit(
        heads=weights / scale,
        mixtures=mixtures if heads > 1 else mixtures[:0],
        eta=eta_of_all,
        difference=held_difference.double().numpy(),
        thresholds=held_eta.double().numpy(),
        base=base,
        steps=steps,
    )


def _block_scale(x: torch.Tensor) -> torch.Tensor:
    """[1 + 2 D]: the root mean square length of each of the three blocks, so that each weighs the same at the start."""
    import torch

    width = (x.shape[1] - 1) // 2
    blocks = x.split([1, width, width], dim=1)
    return torch.cat([part.square().sum(dim=1).mean().sqrt().clamp_min(1e-8).expand(part.shape[1]) for part in blocks])


class _Model:
    """parts + 1 independent models: one without each fold, the last with everything."""

    def __init__(
        self, x: torch.Tensor, pairs: EmbeddedPairs, folds: torch.Tensor, parts: int, heads: int, seed: int,
        known: torch.Tensor | None,
    ) -> None:  # fmt: skip
        import torch

        self.x, self.label, self.rater = x, torch.as_tensor(pairs.label), torch.as_tensor(pairs.rater)
        inside = torch.stack([folds != k for k in range(parts)] + [torch.ones(len(x), dtype=torch.bool)])
        self.share = inside.float() / inside.sum(dim=1, keepdim=True)  # of a pair in a model's mean loss
        generator = torch.Generator().manual_seed(seed)
        start = torch.zeros(parts + 1, heads, x.shape[1])
        mixing = torch.zeros(parts + 1, len(pairs.raters), heads)
        if known is not None:
            start += known
        else:
            for k, mask in enumerate(inside.numpy()):
                decided = mask & (pairs.label != 0)
                if decided.any():
                    start[k, :, 0] = fit_slope(x[decided, 0].double().numpy(), pairs.label[decided])
            if heads > 1:
                mixing += torch.randn(mixing.shape[1:], generator=generator)
        self.heads, self.mixing = start.requires_grad_(known is None), mixing.requires_grad_()
        ties = float((self.label == 0).float().mean())
        self.ties = ties > 0
        raw = np.log(np.expm1(eta_of_tie_share(min(max(ties, 1e-3), 0.99))))
        self.raw_eta = torch.full((parts + 1, 1), float(raw)).requires_grad_()
        trained = [each for each in (self.heads, self.raw_eta) if each.requires_grad]
        self.optimizers = [
            torch.optim.SGD(trained, lr=LEARNING_RATE, momentum=MOMENTUM, nesterov=True),
            torch.optim.Adam([self.mixing], lr=MIXING_RATE),  # a rater's gradient shrinks with the number of raters
        ]

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(differences of scores [parts + 1, N], eta [parts + 1, 1])."""
        import torch

        per_head = torch.einsum("np,kmp->knm", self.x, self.heads)
        difference = (per_head * self.mixing.softmax(dim=-1)[:, self.rater]).sum(dim=-1)
        return difference, self._eta()

    def _eta(self) -> torch.Tensor:
        import torch

        return torch.nn.functional.softplus(self.raw_eta) if self.ties else torch.zeros_like(self.raw_eta)

    def update(self, losses: torch.Tensor) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        (losses * self.share).sum().backward()
        for optimizer in self.optimizers:
            optimizer.step()

    def state(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(heads [M, ...], mixtures [U, M], eta) of the model with everything."""
        return (
            self.heads[-1].detach().clone(),
            self.mixing[-1].detach().softmax(dim=-1),
            float(self._eta()[-1].detach()),
        )
