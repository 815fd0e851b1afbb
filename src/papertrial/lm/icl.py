"""In-context regression: the classical algorithms a model may be running, and how closely it agrees with them.

A *predictor* is any callable ``(x, y, x_query) -> y_hat`` with x (B, n, dim_x), y (B, n, dim_y), x_query (B, q, dim_x)
and y_hat (B, q, dim_y): a reference below, a trained network, or a Hugging Face decoder in an ``InContextModel``.
An empty context (n = 0) is allowed and gives the references' prior mean, 0.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from papertrial.lm.worlds.regression import PromptBatch

Predictor = Callable[[Tensor, Tensor, Tensor], Tensor]
Rate = float | Tensor | Sequence[float]

# -- reference predictors: each gives the implied weights (B, dim_y, dim_x) --------------------------------------------


def linear_prediction(weights: Tensor, x_query: Tensor) -> Tensor:
    """Predictions (B, q, dim_y) of linear maps (B, dim_y, dim_x) at queries (B, q, dim_x)."""
    return x_query @ weights.mT


def ols_weights(x: Tensor, y: Tensor) -> Tensor:
    """Least squares; of all solutions the one of smallest norm.

    Parameters
    ----------
    x, y : (B, n, dim_x) and (B, n, dim_y).

    Returns
    -------
    Tensor
        (B, dim_y, dim_x).
    """
    _check_examples(x, y)
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0], y.shape[2], x.shape[2])
    return (torch.linalg.pinv(x) @ y).mT


def ridge_weights(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """Minimiser of ``sum_i |W x_i - y_i|^2 + penalty |W|^2``: the posterior mean for prior variance t^2 and noise
    variance s^2 at penalty s^2 / t^2.

    Raises
    ------
    ValueError
        Unless the penalty is positive (``ols_weights`` is its limit at 0).
    """
    _check_examples(x, y)
    if not (math.isfinite(penalty) and penalty > 0):
        raise ValueError(f"penalty must be positive and finite, got {penalty}; use ols_weights for no penalty")
    identity = torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(x.mT @ x + penalty * identity, x.mT @ y).mT


def gd_weights(x: Tensor, y: Tensor, lr: Rate, steps: int = 1, start: Tensor | None = None) -> Tensor:
    """Gradient descent on ``L(W) = 1/(2n) sum_i |W x_i - y_i|^2``.

    One step from W = 0 predicts ``(lr/n) sum_i y_i <x_i, x_query>`` (2212.07677, section 2; no further factor of 2).

    Parameters
    ----------
    x, y : (B, n, dim_x) and (B, n, dim_y).
    lr : learning rate of all steps, or one for each.
    steps : number of steps.
    start : (dim_y, dim_x), the weights before the first step; None is 0.

    Returns
    -------
    Tensor
        (B, dim_y, dim_x).
    """
    return gdpp_weights(x, y, lr, 0.0, steps, start)


def gdpp_weights(x: Tensor, y: Tensor, lr: Rate, gamma: Rate, steps: int = 1, start: Tensor | None = None) -> Tensor:
    """GD++ (2212.07677, section 3): gradient descent while the inputs are being preconditioned.

    Step k takes a gradient step ``dW_k = -(lr/n) (W_0 X_k^T - Y_k^T) X_k`` on the current data, subtracts what it
    explains from the targets, ``Y_{k+1} = Y_k - X_k dW_k^T``, and transforms all inputs, the query's too, by
    ``x <- (I - gamma X_k^T X_k) x``. Step k therefore adds ``dW_k M_k`` to the weights, M_k being the product of the
    transformations so far. With gamma = 0 this is gradient descent.

    Parameters
    ----------
    x, y : (B, n, dim_x) and (B, n, dim_y).
    lr, gamma : of all steps, or one for each. The transformation after the last step has no effect.
    steps : number of steps.
    start : W_0 (dim_y, dim_x); None is 0.

    Returns
    -------
    Tensor
        (B, dim_y, dim_x): the map from the untransformed query to the prediction.
    """
    _check_examples(x, y)
    rates, gammas = _per_step("lr", lr, steps, x), _per_step("gamma", gamma, steps, x)
    batch, n, dim_x = x.shape
    first = x.new_zeros(y.shape[2], dim_x) if start is None else start
    if first.shape != (y.shape[2], dim_x):
        raise ValueError(f"start must have the shape {(y.shape[2], dim_x)}, got {tuple(first.shape)}")
    weights = first.expand(batch, -1, -1)
    if n == 0:
        return weights
    transform: Tensor | None = None  # M_k (B, dim_x, dim_x); None is the identity
    for step, (rate, mix) in enumerate(zip(rates, gammas, strict=True)):
        change = (rate / n) * (y - x @ first.mT).mT @ x  # (B, dim_y, dim_x)
        weights = weights + (change if transform is None else change @ transform)
        if step + 1 == steps:
            break
        y = y - x @ change.mT
        if isinstance(mix, Tensor) or mix != 0.0:
            gram = x.mT @ x
            x = x - mix * x @ gram
            if transform is None:
                transform = torch.eye(dim_x, dtype=x.dtype, device=x.device) - mix * gram
            else:
                transform = transform - mix * gram @ transform
    return weights


def _check_examples(x: Tensor, y: Tensor) -> None:
    if x.ndim != 3 or y.ndim != 3 or x.shape[:2] != y.shape[:2]:
        raise ValueError(
            f"x and y must have the shapes (B, n, dim_x) and (B, n, dim_y), got {tuple(x.shape)} and {tuple(y.shape)}"
        )


def _per_step(name: str, rate: Rate, steps: int, like: Tensor) -> list[Tensor | float]:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if isinstance(rate, Tensor):
        values: list[Tensor | float] = list(rate.to(like).expand(steps) if rate.ndim == 0 else rate.to(like))
    elif isinstance(rate, Sequence):
        values = list(rate)
    else:
        values = [rate] * steps
    if len(values) != steps:
        raise ValueError(f"{name} must be one number or one for each of {steps} steps; got {len(values)}")
    for value in values:
        number = value.item() if isinstance(value, Tensor) else value
        if not math.isfinite(number):
            raise ValueError(f"{name} must be finite, got {number}")
    return values


# -- how well, and how much alike ------------------------------------------------------------------------------------


def query_loss(predictor: Predictor, prompts: PromptBatch) -> float:
    """Half the squared error, summed over outputs, averaged over prompts and queries: the paper family's test loss."""
    with torch.no_grad():
        errors = predictor(prompts.x, prompts.y, prompts.x_query) - prompts.y_query
    return 0.5 * errors.double().square().sum(-1).mean().item()


def prediction_distance(first: Predictor, second: Predictor, prompts: PromptBatch) -> float:
    """Mean Euclidean distance between two predictors' answers to the same queries."""
    with torch.no_grad():
        difference = first(prompts.x, prompts.y, prompts.x_query) - second(prompts.x, prompts.y, prompts.x_query)
    return difference.double().norm(dim=-1).mean().item()


def squared_prediction_difference(first: Predictor, second: Predictor, prompts: PromptBatch) -> float:
    """Mean squared distance between two predictors' answers to the same queries (SPD of 2211.15661)."""
    with torch.no_grad():
        difference = first(prompts.x, prompts.y, prompts.x_query) - second(prompts.x, prompts.y, prompts.x_query)
    return difference.double().square().sum(-1).mean().item()


def sensitivities(predictor: Predictor, prompts: PromptBatch) -> Tensor:
    """Derivatives of the answers by the queries (B, q, dim_y, dim_x): for a linear learner its implicit weights.

    Each query is asked on its own, so that a predictor whose queries see each other is measured correctly as well.
    """
    b, q = prompts.x_query.shape[:2]
    x, y = prompts.x.repeat_interleave(q, 0), prompts.y.repeat_interleave(q, 0)
    x_query = prompts.x_query.reshape(b * q, 1, -1).detach().clone().requires_grad_()
    with torch.enable_grad():
        answers = predictor(x, y, x_query)
        if answers.shape != (b * q, 1, prompts.dim_y):
            raise ValueError(f"predictor must answer with the shape (B, q, dim_y), got {tuple(answers.shape)}")
        if not answers.requires_grad:
            raise ValueError("predictor's answers do not depend differentiably on x_query")
        rows = [
            torch.autograd.grad(answers[..., j].sum(), x_query, retain_graph=j + 1 < prompts.dim_y)[0]
            for j in range(prompts.dim_y)
        ]
    return torch.cat(rows, 1).reshape(b, q, prompts.dim_y, -1)


def prompt_loss(model: Predictor, prompts: PromptBatch) -> Tensor:
    """``query_loss`` as a differentiable scalar: the ``loss`` to hand to ``papertrial.lm.training.train``."""
    return 0.5 * (model(prompts.x, prompts.y, prompts.x_query) - prompts.y_query).square().sum(-1).mean()


def mean_cosine(first: Tensor, second: Tensor) -> float:
    """Mean cosine between the rows of two tensors (..., d); a row of zeros has cosine 0 with everything."""
    first, second = first.double(), second.double()
    norms = first.norm(dim=-1) * second.norm(dim=-1)
    return ((first * second).sum(-1) / norms.clamp_min(1e-300)).mean().item()


def implicit_weights(predictor: Predictor, x: Tensor, y: Tensor, probes: Tensor) -> tuple[Tensor, Tensor]:
    """The linear map that fits a predictor's answers to many queries after one context best.

    Parameters
    ----------
    x, y : contexts (B, n, dim_x), (B, n, dim_y).
    probes : queries (B, m, dim_x) with m > dim_x, each asked on its own.

    Returns
    -------
    weights : (B, dim_y, dim_x).
    r2 : (B,) share of the answers' second moment that the map explains; 1 for a linear predictor.

    Raises
    ------
    ValueError
        With too few probes to determine the map.
    """
    b, m, dim_x = probes.shape
    if m <= dim_x:
        raise ValueError(f"probes must be more than dim_x = {dim_x} per context to test linearity, got {m}")
    with torch.no_grad():
        repeated = (x.repeat_interleave(m, 0), y.repeat_interleave(m, 0))
        answers = predictor(*repeated, probes.reshape(b * m, 1, dim_x)).reshape(b, m, -1)
    weights = ols_weights(probes, answers)
    residual = (answers - linear_prediction(weights, probes)).square().sum((1, 2))
    total = answers.square().sum((1, 2))
    return weights, torch.where(total > 0, 1 - residual / total, torch.ones_like(total))
