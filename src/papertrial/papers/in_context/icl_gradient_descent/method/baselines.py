"""What the trained layers are compared with: gradient descent and GD++, each with the best rates for the task law."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from papertrial.lm.icl import Rate, gdpp_weights, linear_prediction
from papertrial.lm.worlds.regression import PromptBatch, World
from papertrial.papers.in_context.icl_gradient_descent.method.attention import (
    LinearSelfAttentionStack,
    checked_lr,
    gd_attention_weights,
)

if TYPE_CHECKING:
    import numpy as np

PerStep = float | tuple[float, ...]

# The searches start from these, in units of the inputs: learning rates times the mean eigenvalue of the inputs'
# second-moment matrix, gammas times that and the number of examples. A step diverges from about 2 on.
LR_GRID = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0)
GAMMA_GRID = (-0.1, -0.05, 0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)


@dataclass(frozen=True)
class GDBaseline:
    """Gradient descent on ``L(W) = 1/(2n) sum_i |W x_i - y_i|^2``: a predictor ``(x, y, x_query) -> y_hat``.

    Parameters
    ----------
    lr : positive; one for all steps, or a tuple with one for each.
    steps : number of steps, K.
    start : W_0 (dim_y, dim_x); None is 0.
    """

    lr: PerStep
    steps: int = 1
    start: Tensor | None = None

    def __post_init__(self) -> None:
        for rate in _each("lr", self.lr, self.steps):
            checked_lr(rate)

    def weights(self, x: Tensor, y: Tensor) -> Tensor:
        """The weights (B, dim_y, dim_x) that the steps reach on the examples x (B, n, dim_x), y (B, n, dim_y)."""
        return _weights(x, y, self.lr, 0.0, self.steps, self.start)

    def predict(self, x: Tensor, y: Tensor, x_query: Tensor) -> Tensor:
        """Predictions (B, q, dim_y) at the queries (B, q, dim_x)."""
        return linear_prediction(self.weights(x, y), x_query)

    __call__ = predict

    def attention_stack(
        self, dim_x: int, dim_y: int, n_context: int, *, clip: float | None = None
    ) -> LinearSelfAttentionStack:
        """The constructed stack that computes these predictions, but for tokens that ``clip`` holds back."""
        return _attention_stack(self.lr, 0.0, self.steps, self.start, (dim_x, dim_y, n_context), clip)

    def fit(
        self, world: World, generator: torch.Generator, *, n_tasks: int = 10_000, per_step: bool = False
    ) -> "GDBaseline":
        """The same number of steps with the learning rate of least average test loss.

        Parameters
        ----------
        world : the task law; ``n_tasks`` prompts are drawn from it.
        per_step : tune a rate for every step instead of one for all.
        """
        prompts = _tuning_prompts(world, generator, n_tasks)
        unit = prompts.x.square().mean().item()
        first = min((lr / unit for lr in LR_GRID), key=lambda lr: _loss(replace(self, lr=lr), prompts))
        lrs, _ = _descended([first], None, self.steps, self.start, prompts)
        if per_step and self.steps > 1:
            lrs, _ = _descended(_spread(lrs[0], self.steps), None, self.steps, self.start, prompts)
        return replace(self, lr=lrs[0] if len(lrs) == 1 else tuple(lrs))


@dataclass(frozen=True)
class GDPlusPlusBaseline:
    """GD++: gradient descent while the inputs are preconditioned (see ``papertrial.lm.icl.gdpp_weights``).

    Parameters
    ----------
    lr : positive; one for all steps, or a tuple with one for each.
    gamma : strength of the transformation of the inputs; likewise. 0 is gradient descent.
    steps : number of steps, K.
    start : W_0 (dim_y, dim_x); None is 0.
    """

    lr: PerStep
    gamma: PerStep
    steps: int = 1
    start: Tensor | None = None

    def __post_init__(self) -> None:
        for rate in _each("lr", self.lr, self.steps):
            checked_lr(rate)
        for gamma in _each("gamma", self.gamma, self.steps):
            if not math.isfinite(gamma):
                raise ValueError(f"gamma must be finite, got {gamma}")

    def weights(self, x: Tensor, y: Tensor) -> Tensor:
        """The map (B, dim_y, dim_x) from a query to its prediction."""
        return _weights(x, y, self.lr, self.gamma, self.steps, self.start)

    def predict(self, x: Tensor, y: Tensor, x_query: Tensor) -> Tensor:
        """Predictions (B, q, dim_y) at the queries (B, q, dim_x)."""
        return linear_prediction(self.weights(x, y), x_query)

    __call__ = predict

    def attention_stack(
        self, dim_x: int, dim_y: int, n_context: int, *, clip: float | None = None
    ) -> LinearSelfAttentionStack:
        """The constructed stack that computes these predictions, but for tokens that ``clip`` holds back."""
        return _attention_stack(self.lr, self.gamma, self.steps, self.start, (dim_x, dim_y, n_context), clip)

    def fit(
        self, world: World, generator: torch.Generator, *, n_tasks: int = 10_000, per_step: bool = False
    ) -> "GDPlusPlusBaseline":
        """The same number of steps with the learning rate and gamma of least average test loss.

        The loss has several minima: a grid on a tenth of the tasks picks two basins, and both are descended on all.

        Parameters
        ----------
        world : the task law; ``n_tasks`` prompts are drawn from it.
        per_step : tune a pair for every step instead of one for all.
        """
        prompts = _tuning_prompts(world, generator, n_tasks)
        unit = prompts.x.square().mean().item()
        few = prompts.rows(slice(0, max(1, n_tasks // 10)))
        grid = [(lr / unit, gamma / (unit * prompts.n_context)) for lr in LR_GRID for gamma in GAMMA_GRID]
        grid.sort(key=lambda pair: _loss(replace(self, lr=pair[0], gamma=pair[1]), few))
        found = [_descended([lr], [gamma], self.steps, self.start, prompts) for lr, gamma in grid[:2]]
        lrs, gammas = min(found, key=lambda pair: _loss(replace(self, lr=pair[0][0], gamma=pair[1][0]), prompts))
        if per_step and self.steps > 1:
            spread = _spread(lrs[0], self.steps)
            lrs, gammas = _descended(spread, gammas * self.steps, self.steps, self.start, prompts)
            return replace(self, lr=tuple(lrs), gamma=tuple(gammas))
        return replace(self, lr=lrs[0], gamma=gammas[0])


def one_step_optimum(
    dim_x: int,
    n_context: int,
    second_moment: float,
    fourth_moment: float,
    *,
    dim_y: int = 1,
    weight_std: float = 1.0,
) -> tuple[float, float]:
    """Best learning rate and least expected test loss of one gradient step from 0, from moments alone.

    For inputs with independent, symmetric coordinates and W ~ N(0, weight_std^2): with A the context's second-moment
    matrix, the loss is ``second_moment * weight_std^2 * dim_y / 2 * E tr (I - lr A)^2``.

    Parameters
    ----------
    dim_x, dim_y, n_context : sizes of the prompts.
    second_moment, fourth_moment : E[x_1^2] and E[x_1^4] of one coordinate.

    Returns
    -------
    lr, loss

    Raises
    ------
    ValueError
        For moments that no law has.
    """
    if not (second_moment > 0 and fourth_moment >= second_moment**2):
        raise ValueError(f"moments need E x^2 > 0 and E x^4 >= (E x^2)^2, got {second_moment} and {fourth_moment}")
    norm4 = dim_x * fourth_moment + dim_x * (dim_x - 1) * second_moment**2  # E |x|^4
    trace = dim_x * second_moment  # E tr A
    trace2 = ((n_context - 1) * dim_x * second_moment**2 + norm4) / n_context  # E tr A^2
    loss = 0.5 * second_moment * weight_std**2 * dim_y * (dim_x - trace**2 / trace2)
    return trace / trace2, loss


def _each(name: str, value: PerStep, steps: int) -> tuple[float, ...]:
    """``value`` for every step."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    values = value if isinstance(value, tuple) else (value,) * steps
    if len(values) != steps:
        raise ValueError(f"{name} must be one number or one for each of {steps} steps, got {value}")
    return values


def _weights(x: Tensor, y: Tensor, lr: Rate, gamma: Rate, steps: int, start: Tensor | None) -> Tensor:
    return gdpp_weights(x, y, lr, gamma, steps, None if start is None else start.to(x))


def _attention_stack(
    lr: PerStep,
    gamma: PerStep,
    steps: int,
    start: Tensor | None,
    sizes: tuple[int, int, int],
    clip: float | None,
) -> LinearSelfAttentionStack:
    dim_x, dim_y, n_context = sizes
    pairs = list(zip(_each("lr", lr, steps), _each("gamma", gamma, steps), strict=True))
    each = [gd_attention_weights(dim_x, dim_y, lr, n_context, start, gamma) for lr, gamma in pairs]
    weights = each[0] if len(set(pairs)) == 1 else each
    return LinearSelfAttentionStack.from_weights(dim_x, dim_y, weights, n_layers=steps, start=start, clip=clip)


def _tuning_prompts(world: World, generator: torch.Generator, n_tasks: int) -> PromptBatch:
    if n_tasks < 1:
        raise ValueError(f"n_tasks must be at least 1, got {n_tasks}")
    return world.sample(n_tasks, generator).to(dtype=torch.float64)


def _loss(baseline: GDBaseline | GDPlusPlusBaseline, prompts: PromptBatch) -> float:
    error = baseline(prompts.x, prompts.y, prompts.x_query) - prompts.y_query
    return 0.5 * error.square().sum(-1).mean().item()


def _spread(lr: float, steps: int) -> list[float]:
    """Different rates around one: gradient descent's loss is symmetric in them, so that equal ones are stationary."""
    return [lr * 1.5 ** (2 * step / (steps - 1) - 1) for step in range(steps)]


def _descended(
    lrs: Sequence[float], gammas: Sequence[float] | None, steps: int, start: Tensor | None, prompts: PromptBatch
) -> tuple[list[float], list[float]]:
    """The nearest minimum of the loss over rates (one, or one for each step), by bounded BFGS; gammas None stay 0.

    Works on log(lr), on gamma in units of the inputs and on the log of the loss: a diverging step would otherwise
    throw the line search far off. The bounds keep the products of many steps finite.
    """
    from scipy.optimize import minimize

    size = len(lrs)
    unit = prompts.x.square().mean().item()
    gamma_unit = 1 / (unit * prompts.n_context)

    def split(point: Tensor) -> tuple[Tensor, Tensor | float]:
        lr = point[:size].exp() / unit
        return lr.expand(steps), 0.0 if gammas is None else (point[size:] * gamma_unit).expand(steps)

    def objective(values: "np.ndarray") -> tuple[float, "np.ndarray"]:
        point = prompts.x.new_tensor(values).requires_grad_()
        lr, gamma = split(point)
        weights = _weights(prompts.x, prompts.y, lr, gamma, steps, start)
        error = linear_prediction(weights, prompts.x_query) - prompts.y_query
        loss = (0.5 * error.square().sum(-1).mean()).log()
        (slope,) = torch.autograd.grad(loss, point)
        return loss.item(), slope.cpu().numpy()

    first = [math.log(lr * unit) for lr in lrs] + [gamma / gamma_unit for gamma in gammas or []]
    bounds = [(-7.0, 7.0)] * size + [(-0.3, 0.8)] * len(gammas or [])
    options = {"maxiter": 200, "ftol": 1e-14, "gtol": 1e-8}
    best = minimize(objective, first, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    lr, gamma = split(prompts.x.new_tensor(best.x))
    return lr[:size].tolist(), ([] if gammas is None or isinstance(gamma, float) else gamma[:size].tolist())
