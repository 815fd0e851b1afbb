"""Preference objectives: the contract, and DPO, the baseline of them all."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch.nn.functional as F
from torch import Tensor

from papertrial.lm.preferences.stats import TokenStats


class PreferenceLoss(NamedTuple):
    """Per pair, all (B,): the loss with its gradient, and the implicit rewards of both answers without."""

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor


class Objective(Protocol):
    """A preference objective: a function of what policy and reference say about both answers.

    An objective with parameters of its own is an ``nn.Module``; see ``PreferenceTrainer.fit``.
    """

    @property
    def wants(self) -> Collection[str]:
        """What :func:`token_stats` must compute beside the log-probabilities."""
        ...

    def __call__(self, chosen: TokenStats, rejected: TokenStats) -> PreferenceLoss: ...


def check_beta(beta: float) -> None:
    """ValueError unless beta is a positive, finite number."""
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be positive and finite, got {beta}")


def check_totals(**totals: Tensor) -> None:
    """ValueError unless all are sums over answers of one shape (B,), without NaN."""
    shapes = {name: tuple(values.shape) for name, values in totals.items()}
    if len(set(shapes.values())) != 1 or any(len(shape) != 1 for shape in shapes.values()):
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"expected one sum per answer, all of one shape (B,), got {listed}")
    for name, values in totals.items():
        if bool(values.detach().isnan().any()):
            raise ValueError(f"{name} holds NaN")


def dpo_loss(chosen_logratio: Tensor, rejected_logratio: Tensor, *, beta: float = 0.1) -> PreferenceLoss:
    """Direct preference optimisation: ``-log sigmoid(beta * (R_w - R_l))``.

    Parameters
    ----------
    chosen_logratio, rejected_logratio
        (B,): R(y), the log-ratio of policy to reference *summed* over the answer's tokens.
    beta
        Positive: how strongly the reference holds. 0.1 is the authors' choice for dialogue and summaries.

    Returns
    -------
    PreferenceLoss
        Rewards are beta * R(y).

    References
    ----------
    arXiv 2305.18290, equation 7.
    """
    check_beta(beta)
    check_totals(chosen_logratio=chosen_logratio, rejected_logratio=rejected_logratio)
    loss = F.softplus(-beta * (chosen_logratio - rejected_logratio))
    return PreferenceLoss(loss, beta * chosen_logratio.detach(), beta * rejected_logratio.detach())


@dataclass(frozen=True)
class DPO:
    """:func:`dpo_loss` as an objective for :class:`PreferenceTrainer`."""

    beta: float = 0.1

    def __post_init__(self) -> None:
        check_beta(self.beta)

    @property
    def wants(self) -> tuple[str, ...]:
        return ()

    def __call__(self, chosen: TokenStats, rejected: TokenStats) -> PreferenceLoss:
        return dpo_loss(chosen.total("logratio"), rejected.total("logratio"), beta=self.beta)
