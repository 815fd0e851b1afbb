"""Scores of heads and neurons that any pruning method is compared with: magnitude, Wanda's, the loss's, chance."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from papertrial.lm.anatomy import anatomy, device_of
from papertrial.lm.generation import evaluating
from papertrial.lm.losses import causal_loss
from papertrial.lm.pruning.visiting import visit
from papertrial.lm.scoring.forward import forward_inputs


@dataclass(frozen=True)
class UnitScores:
    """How much each unit matters; higher is more, and only the order within a layer means anything.

    Attributes
    ----------
    heads : per layer (H,), query heads.
    neurons : per layer (F,).
    """

    heads: tuple[Tensor, ...]
    neurons: tuple[Tensor, ...]


def magnitude_scores(model: nn.Module) -> UnitScores:
    """Sum of absolute weights and biases of everything that goes with the unit; key/value heads are shared out evenly.

    The plainest criterion, as in Li et al. 2017 (1608.08710) for filters: no data.
    """
    heads, neurons = [], []
    for block in anatomy(model).blocks:
        with torch.no_grad():
            shares = block.heads // block.key_value_heads
            score = block.W_O.float().abs().sum((1, 2)) + _mass(block.W_Q, block.b_Q)
            for name in ("key", "value"):
                mass = _mass(block.head_weights(name), block.head_biases(name))  # type: ignore[arg-type]
                score = score + (mass / shares).repeat_interleave(shares)
            heads.append(score.cpu())
            mass = block.W_out.float().abs().sum(1) + _columns(block.W_in, block.b_in)
            if block.W_gate is not None:
                mass = mass + _columns(block.W_gate, block.b_gate)
            neurons.append(mass.cpu())
    return UnitScores(tuple(heads), tuple(neurons))


def _mass(weights: Tensor, biases: Tensor | None) -> Tensor:
    """(heads, D, d_h) and (heads, d_h) to (heads,)."""
    mass = weights.float().abs().sum((1, 2))
    return mass if biases is None else mass + biases.float().abs().sum(1)


def _columns(weights: Tensor, bias: Tensor | None) -> Tensor:
    """(D, F) and (F,) to (F,)."""
    mass = weights.float().abs().sum(0)
    return mass if bias is None else mass + bias.float().abs()


def random_scores(model: nn.Module, *, generator: torch.Generator) -> UnitScores:
    """Uniform noise: what any criterion has to beat. ``generator`` on the CPU."""
    blocks = anatomy(model).blocks
    return UnitScores(
        tuple(torch.rand(block.heads, generator=generator) for block in blocks),
        tuple(torch.rand(block.neurons, generator=generator) for block in blocks),
    )


def wanda_scores(model: PreTrainedModel, batches: Iterable[Tensor]) -> UnitScores:
    """Sum over output weights of ``|W_ij| ||x_j||``: Wanda's score (2306.11695, eq. 1), added up over each unit.

    ``||x_j||`` is the Euclidean norm over all tokens of input j of the attention output or last feed-forward
    projection. ``batches`` are ids (B, T) without padding, of a causal model.
    """
    blocks = anatomy(model).blocks
    squares = {
        "head_out": [torch.zeros(block.heads, block.head_size, dtype=torch.float64) for block in blocks],
        "mlp_act": [torch.zeros(block.neurons, dtype=torch.float64) for block in blocks],
    }

    def add(site: str, layer: int, values: Tensor) -> None:
        squares[site][layer] += values.float().square().sum((0, 1)).double().cpu()

    with torch.no_grad(), evaluating(model), visit(model, squares, add):
        for ids in batches:
            inputs, _, _ = forward_inputs(model, ids, None)
            model(**inputs)
        heads = [
            (squares["head_out"][block.index].sqrt() * block.W_O.abs().sum(2).double().cpu()).sum(1) for block in blocks
        ]
        neurons = [squares["mlp_act"][block.index].sqrt() * block.W_out.abs().sum(1).double().cpu() for block in blocks]
    return UnitScores(tuple(heads), tuple(neurons))


def loss_change_scores(model: PreTrainedModel, batches: Sequence[Tensor]) -> UnitScores:
    """Sum over a unit's output weights of ``|w dL/dw|``: the first-order change of the loss (2305.11627, eq. 4).

    L is the mean next-token loss over ``batches``, ids (B, T) without padding. Gradients that the parameters hold are
    left as they were.
    """
    projections = [module for block in anatomy(model).blocks for module in (block.output, block.down)]
    weights = [cast(nn.Parameter, module.weight) for module in projections]
    frozen = [weight for weight in weights if not weight.requires_grad]
    totals = [torch.zeros_like(weight) for weight in weights]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad(), evaluating(model):
            for ids in batches:
                loss = causal_loss(model, ids.to(device_of(model)))
                for total, gradient in zip(totals, torch.autograd.grad(loss.total / loss.weight, weights), strict=True):
                    total += gradient / len(batches)
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    changes = []
    for module, weight, total in zip(projections, weights, totals, strict=True):
        change = (weight.detach() * total).float().abs()
        changes.append(change.sum(1 if isinstance(module, Conv1D) else 0).cpu())  # by input
    size = anatomy(model).blocks[0].head_size
    return UnitScores(tuple(row.unflatten(0, (-1, size)).sum(1) for row in changes[::2]), tuple(changes[1::2]))
