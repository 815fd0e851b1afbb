"""Sophia (arXiv 2305.14342): clipped momentum over a lazily refreshed diagonal-curvature estimate."""

from papertrial.papers.optimization.sophia.method.curvature import (
    GNBLoss,
    all_reduce_mean,
    gnb_loss,
    hutchinson_diagonal,
)
from papertrial.papers.optimization.sophia.method.optimizer import Sophia, SophiaG, SophiaH
from papertrial.papers.optimization.sophia.method.training import StepOutcome, refresh_hessian, train_step

__all__ = [
    "GNBLoss",
    "Sophia",
    "SophiaG",
    "SophiaH",
    "StepOutcome",
    "all_reduce_mean",
    "gnb_loss",
    "hutchinson_diagonal",
    "refresh_hessian",
    "train_step",
]
