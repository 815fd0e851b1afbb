"""Sophia's mechanism on losses with known curvature: every optimiser at its best learning rate, exact derivatives.

Learning rates, condition numbers and starts run as one batch: each learning rate is a parameter group of the real
optimiser, whose one tensor holds all problems, and every coordinate of every problem is independent of the others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from papertrial.lm.optim import SignSGD
from papertrial.lm.toy_losses import LogCosh, TwoCoordinates
from papertrial.papers.optimization.sophia.method import Sophia

Problem = LogCosh | TwoCoordinates


class NewtonDiagonal(Optimizer):
    """Newton's method with an exact Hessian diagonal: ``x <- x - lr g / h``. The unclipped, unguarded ancestor."""

    def __init__(self, params: list[dict[str, object]]) -> None:
        super().__init__(params, {"lr": 1.0})
        self.curvature: Mapping[Tensor, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.addcdiv_(p.grad, self.curvature[p], value=-group["lr"])


def _sophia(groups: list[dict[str, object]], damping: float) -> Sophia:
    # rho = lr / damping: where nothing is clipped the step is `damping` times Newton's, for every learning rate; lr is
    # then the size of the trust box alone, as in the paper's analysis (section 4), where damping is 1/2
    return Sophia(
        [{**group, "rho": group["lr"] / damping} for group in groups],  # type: ignore[operator]
        betas=(0.0, 0.0), weight_decay=0.0,
    )  # fmt: skip


OPTIMIZERS: dict[str, Callable[[list[dict[str, object]]], Optimizer]] = {
    "gradient_descent": lambda groups: SGD(groups, lr=1.0),
    "sign_descent": lambda groups: SignSGD(groups),
    "adam": lambda groups: Adam(groups, betas=(0.9, 0.95)),
    "newton": NewtonDiagonal,
    "sophia_exact": lambda groups: _sophia(groups, damping=0.5),
}
"""Arms of this part; all of them get exact gradients, and newton and sophia_exact the exact Hessian diagonal."""


@dataclass(frozen=True)
class Descent:
    """Where a batch of runs got to.

    Attributes
    ----------
    steps : (L, P) steps until the loss was at or below the target, ``inf`` where it never was.
    points : (L, P, d) the last iterates.
    taken : steps that were run.
    """

    steps: Tensor
    points: Tensor
    taken: int


def descend(
    arm: str,
    problem: Problem,
    start: Tensor,
    rates: Sequence[float],
    *,
    steps: int,
    target: float,
    stop_early: bool = True,
) -> Descent:
    """Run one optimiser from ``start`` at every learning rate.

    Parameters
    ----------
    arm : a key of ``OPTIMIZERS``.
    problem : takes points (..., P, d).
    start : (P, d) float64 starts, one per problem.
    rates : L learning rates.
    steps : most steps.
    target : loss that counts as solved.
    stop_early : end as soon as every problem is solved at one learning rate at least: the best one is known then.
    """
    leaves = [nn.Parameter(start.clone()) for _ in rates]
    groups: list[dict[str, object]] = [{"params": [x], "lr": lr} for x, lr in zip(leaves, rates, strict=True)]
    optimizer = OPTIMIZERS[arm](groups)
    reached = torch.full((len(rates), len(start)), torch.inf, dtype=torch.float64)
    taken = 0
    for taken in range(steps + 1):
        points = torch.stack([x.detach() for x in leaves])  # (L, P, d)
        solved = problem.value(points) <= target
        reached = torch.where(solved & reached.isinf(), float(taken), reached)
        if taken == steps or (stop_early and bool((reached < torch.inf).any(0).all())):
            break
        gradient = problem.gradient(points)
        for x, g in zip(leaves, gradient, strict=True):
            x.grad = g
        if isinstance(optimizer, NewtonDiagonal):
            optimizer.curvature = dict(zip(leaves, problem.hessian_diagonal(points), strict=True))
        elif isinstance(optimizer, Sophia):
            optimizer.fold_in(list(problem.hessian_diagonal(points)))
        optimizer.step()
    return Descent(reached, torch.stack([x.detach() for x in leaves]), taken)


def at_a_minimum(problem: Problem, points: Tensor, tolerance: float) -> Tensor:
    """Whether points (..., d) are stationary within ``tolerance`` with positive curvature in every coordinate."""
    flat = (problem.gradient(points).abs() <= tolerance).all(-1)
    return flat & (problem.hessian_diagonal(points) > 0).all(-1)
