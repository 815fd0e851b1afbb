"""What comparisons of optimisers share: baselines, parameter roles, and tuning on equal terms.

AdamW is torch's own (``papertrial.lm.training.adamw``); here are the baselines that torch lacks.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# -- parameter roles -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParameterRoles:
    """Trainable parameters of a model by what they do, each exactly once (a tied matrix is an embedding).

    Attributes
    ----------
    hidden : 2-D weights of linear maps inside the network, by name; ``nn.Linear`` stores them (out, in), GPT-2's
        ``Conv1D`` (in, out).
    embedding : token and position tables, and the output head.
    other : norm gains, biases and whatever has another number of dimensions.
    """

    hidden: Mapping[str, nn.Parameter]
    embedding: Mapping[str, nn.Parameter]
    other: Mapping[str, nn.Parameter]


def parameter_roles(model: nn.Module) -> ParameterRoles:
    """Sort the trainable parameters of a transformers model by role.

    Raises
    ------
    ValueError
        If no parameter is trainable.
    """
    linear, tables = set(), set()
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D):
            linear.add(module.weight)
        elif isinstance(module, nn.Embedding):
            tables.add(module.weight)
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if head is not None:
        tables.add(head.weight)
    roles: tuple[dict[str, nn.Parameter], ...] = ({}, {}, {})
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            role = 1 if parameter in tables else 0 if parameter in linear and parameter.ndim == 2 else 2
            roles[role][name] = parameter
    if not any(roles):
        raise ValueError("model has no trainable parameter")
    return ParameterRoles(*roles)


# -- baselines that torch does not have ------------------------------------------------------------------------------


def _check(group: Mapping[str, Any], *shares: str) -> None:
    for name in ("lr", "weight_decay"):
        if not 0.0 <= group[name] < math.inf:
            raise ValueError(f"{name} must be >= 0, got {group[name]}")
    for name in shares:
        for value in group[name] if isinstance(group[name], tuple | list) else (group[name],):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must lie in [0, 1), got {value}")


def _with_gradients(params: Sequence[Tensor]) -> list[Tensor]:
    present = [p for p in params if p.grad is not None]
    if any(p.grad is not None and p.grad.is_sparse for p in present):
        raise RuntimeError("sparse gradients are not supported")
    return present


class SignSGD(Optimizer):
    r"""Sign descent with momentum ("signum", arXiv 1802.04434, algorithm 3) and decoupled weight decay.

    .. math::
        m \leftarrow \beta m + (1-\beta) g, \qquad \theta \leftarrow (1 - \eta\lambda)\theta - \eta\,\mathrm{sign}(m)

    Parameters
    ----------
    params : parameters or groups.
    lr : size of every coordinate's step, >= 0.
    momentum : in [0, 1); 0 is plain sign descent.
    weight_decay : >= 0.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-4, momentum: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        _check(self.param_groups[-1], "momentum")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta, lr = group["momentum"], group["lr"]
            for p in _with_gradients(group["params"]):
                direction: Any = p.grad
                if beta:
                    state = self.state[p]
                    if not state:
                        state["exp_avg"] = torch.zeros_like(p)
                    direction = state["exp_avg"].mul_(beta).add_(p.grad, alpha=1 - beta)
                p.mul_(1 - lr * group["weight_decay"]).add_(direction.sign(), alpha=-lr)
        return loss


class Lion(Optimizer):
    r"""Lion (arXiv 2302.06675, algorithm 2): the sign of an interpolation, with decoupled weight decay.

    .. math::
        \theta \leftarrow (1 - \eta\lambda)\theta - \eta\,\mathrm{sign}(\beta_1 m + (1-\beta_1) g), \qquad
        m \leftarrow \beta_2 m + (1-\beta_2) g

    Parameters
    ----------
    params : parameters or groups.
    lr : size of every coordinate's step, >= 0; usually 3 to 10 times smaller than AdamW's.
    betas : each in [0, 1).
    weight_decay : >= 0.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        _check(self.param_groups[-1], "betas")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for p in _with_gradients(group["params"]):
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                m = state["exp_avg"]
                direction = (m * beta1).add_(p.grad, alpha=1 - beta1).sign_()
                p.mul_(1 - lr * group["weight_decay"]).add_(direction, alpha=-lr)
                m.mul_(beta2).add_(p.grad, alpha=1 - beta2)
        return loss


# -- tuning on equal terms -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuning:
    """Outcome of a grid search.

    Attributes
    ----------
    best : the setting with the lowest score.
    scores : every setting with its score, ``inf`` where the run diverged, in the order tried.
    edges : names whose best value is the smallest or largest that was tried (of three or more): the grid may be too
        narrow there.
    """

    best: Mapping[str, Any]
    scores: Sequence[tuple[Mapping[str, Any], float]]
    edges: tuple[str, ...]

    @property
    def best_score(self) -> float:
        return min(score for _, score in self.scores)


def grid_settings(grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every combination of a grid ``{name: values}``, the last name varying fastest."""
    for name, values in grid.items():
        if not values:
            raise ValueError(f"grid has no value for {name!r}")
    for combination in product(*grid.values()):
        yield dict(zip(grid, combination, strict=True))


def tune(score: Callable[..., float], grid: Mapping[str, Sequence[Any]]) -> Tuning:
    """Try every combination of ``grid`` and keep the lowest score.

    Parameters
    ----------
    score : called with one keyword per name of the grid; returns what to minimise, such as a *validation* loss. A
        result that is not finite, or an ArithmeticError, counts as diverged.
    grid : values to try, by name.

    Raises
    ------
    ValueError
        If a name has no value, or every setting diverged.
    """
    scores: list[tuple[Mapping[str, Any], float]] = []
    for setting in grid_settings(grid):
        try:
            value = float(score(**setting))
        except ArithmeticError:
            value = math.inf
        scores.append((setting, value if math.isfinite(value) else math.inf))
    best, lowest = min(scores, key=lambda entry: entry[1])
    if lowest == math.inf:
        raise ValueError(f"every one of {len(scores)} settings diverged; widen the grid {dict(grid)}")
    edges = tuple(name for name, values in grid.items() if len(values) > 2 and best[name] in (min(values), max(values)))
    return Tuning(best, scores, edges)


def first_crossing(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Where a loss curve first reaches ``target``, interpolated linearly between its points.

    Parameters
    ----------
    curve : (x, loss) in increasing x.
    target : loss to reach.

    Returns
    -------
    float or None
        x of the first crossing (the first x if the curve starts at or below the target), or None if there is none.

    Raises
    ------
    ValueError
        If the curve is empty or x does not increase.
    """
    if not curve:
        raise ValueError("curve is empty")
    if any(b[0] <= a[0] for a, b in pairwise(curve)):
        raise ValueError("x must increase along the curve")
    if curve[0][1] <= target:
        return curve[0][0]
    for (x0, y0), (x1, y1) in pairwise(curve):
        if y1 <= target:
            return x0 + (x1 - x0) * (y0 - target) / (y0 - y1)
    return None
