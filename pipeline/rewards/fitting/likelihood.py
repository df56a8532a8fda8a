"""P(label | difference of scores): the Bradley-Terry model with ties of Rao and Kupper (1967).

With d = score(a) - score(b) in log-odds and a threshold eta >= 0,

    P(a) = s(d - eta),   P(b) = s(-d - eta),   P(tie) = (exp(2 eta) - 1) P(a) P(b),   s the logistic function,

which sum to 1. eta = 0 is Bradley and Terry's model, without ties.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def log_likelihood(difference: torch.Tensor, label: torch.Tensor, eta: torch.Tensor) -> torch.Tensor:
    """Of each label (+1: a is better, -1: b, 0: tie), float [..., N] like `difference`. `eta`: broadcasts with it;
    a tie has likelihood 0 where it is 0."""
    import torch

    better = torch.nn.functional.logsigmoid(difference - eta)
    worse = torch.nn.functional.logsigmoid(-difference - eta)
    tie = better + worse + torch.log(torch.expm1(2 * eta))
    return torch.where(label > 0, better, torch.where(label < 0, worse, tie))


def eta_of_tie_share(share: float) -> float:
    """The threshold at which equal scores give a tie with this probability below 1: 2 artanh(share)."""
    import math

    return 2 * math.atanh(share)
