"""How many heads and neurons go from every layer, and which."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from papertrial.lm.anatomy import anatomy
from papertrial.lm.pruning import LayerSizes, Plan, UnitScores, parameter_counts, sizes, unit_costs
from papertrial.papers.compression.amp_pruning.method.options import Compensation, Grouping, Parts, one_of


@dataclass(frozen=True)
class Amounts:
    """How much is taken out of every layer.

    Attributes
    ----------
    heads : query heads.
    groups : key/value heads; 0 where all stay and lose the same number of query heads.
    neurons : MLP neurons.
    """

    heads: int
    groups: int
    neurons: int


def amp_amounts(
    model: PreTrainedModel,
    ratio: float,
    *,
    compensate: Compensation = "code",
    groups: Grouping = "auto",
    parts: Parts = "both",
) -> Amounts:
    """Heads and neurons to take out of each layer, so that ``ratio`` of the whole model's parameters go.

    Embeddings, norms and the unembedding stay, so attention and MLP give the share ``r = ratio P_total / P_blocks``:
    ``round(r H)`` heads, at most all but one, and ``round(r F)`` neurons corrected for the rounding of the heads.

    Parameters
    ----------
    ratio
        Share of all parameters, in [0, 1).
    compensate
        What the fraction of a head that rounding left over is worth in neurons. ``code``, as the authors' program has
        it: one head for one neuron, ``round(F ((H / F)(r - n / H) + r))``. ``params``: as many neurons as have the
        parameters that are missing, which meets the ratio more closely.
    groups
        Where query heads share keys and values: ``whole`` takes out groups with their keys and values, ``within`` the
        same number of query heads of each group. ``auto`` is the one with the finer steps, and ``whole`` where both are
        equal: with 2 groups of 6 heads ``whole`` could only halve the heads. The paper has multi-head attention only,
        where every head is a group and ``auto`` its rule.
    parts
        ``both``, or ``mlp``: neurons only, for families whose checkpoints cannot have fewer heads. Not in the paper.

    Raises
    ------
    ValueError
        For a ratio that would leave nothing of a layer, naming the largest possible, or layers of different widths.
    """
    for name, value, kind in (
        ("compensate", compensate, Compensation),
        ("groups", groups, Grouping),
        ("parts", parts, Parts),
    ):
        one_of(name, value, kind)
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must lie in [0, 1), got {ratio}")
    if len(set(sizes(model))) > 1:
        raise ValueError("layers have different widths already: AMP takes the same amount out of every layer")
    counts, layers, size = parameter_counts(model), len(sizes(model)), sizes(model)[0]
    reachable = counts.blocks if parts == "both" else counts.mlp
    r = ratio * counts.total / reachable
    if r >= 1:
        raise ValueError(
            f"ratio {ratio} of all parameters would empty the layers: attention and MLP hold "
            f"{reachable / counts.total:.3f} of them"
            if parts == "both"
            else f"ratio {ratio} of all parameters is more than the MLPs hold ({reachable / counts.total:.3f})"
        )
    costs = unit_costs(anatomy(model).blocks[0])
    if parts == "mlp":
        return Amounts(0, 0, min(round(ratio * counts.total / layers / costs.neuron), size.neurons - 1))
    heads, cut = _heads_to_remove(size, r, groups)
    if compensate == "code":
        neurons = round(size.neurons * ((size.heads / size.neurons) * (r - heads / size.heads) + r))
    else:
        missing = r * counts.blocks / layers - heads * costs.query_head - cut * costs.key_value_head
        neurons = round(missing / costs.neuron)
    return Amounts(heads, cut, max(0, min(neurons, size.neurons - 1)))


def _heads_to_remove(size: LayerSizes, r: float, groups: Grouping) -> tuple[int, int]:
    """Query heads and key/value heads."""
    per_group = size.heads // size.key_value_heads
    if groups == "whole" or (groups == "auto" and size.key_value_heads >= per_group):
        cut = min(round(r * size.key_value_heads), size.key_value_heads - 1)
        return cut * per_group, cut
    return min(round(r * per_group), per_group - 1) * size.key_value_heads, 0


def amp_plan(
    model: PreTrainedModel,
    importance: UnitScores,
    ratio: float,
    *,
    remove: Literal["lowest", "highest"] = "lowest",
    compensate: Compensation = "code",
    groups: Grouping = "auto",
    parts: Parts = "both",
) -> Plan:
    """Which heads and neurons stay when the same number goes from every layer.

    Parameters
    ----------
    importance
        :func:`amp_importance`, or scores of another criterion (:mod:`papertrial.lm.pruning`) to compare with.
    ratio, compensate, groups, parts
        As in :func:`amp_amounts`.
    remove
        ``lowest``, or ``highest``: the authors' reversed control.

    Raises
    ------
    ValueError
        As :func:`amp_amounts`, and for scores of another shape than the model's.
    """
    one_of("remove", remove, Literal["lowest", "highest"])
    amounts = amp_amounts(model, ratio, compensate=compensate, groups=groups, parts=parts)
    sign = 1.0 if remove == "lowest" else -1.0
    found = [(len(h), len(n)) for h, n in zip(importance.heads, importance.neurons, strict=True)]
    wanted = [(size.heads, size.neurons) for size in sizes(model)]
    if found != wanted:
        raise ValueError(f"importance is of layers (heads, neurons) {found[:3]}..., the model has {wanted[:3]}...")
    shared = sizes(model)[0].key_value_heads
    heads = []
    for scores in importance.heads:
        by_group = (sign * scores).unflatten(0, (shared, -1))  # (G, H / G)
        if amounts.groups:
            lost = _lowest(by_group.sum(1), amounts.groups)
            gone = {group * by_group.shape[1] + head for group in lost for head in range(by_group.shape[1])}
        else:
            each = amounts.heads // shared
            rows = enumerate(by_group)
            gone = {group * len(row) + head for group, row in rows for head in _lowest(row, each)}
        heads.append([head for head in range(len(scores)) if head not in gone])
    neurons = []
    for scores in importance.neurons:
        lost = _lowest(sign * scores, amounts.neurons)
        neurons.append([neuron for neuron in range(len(scores)) if neuron not in lost])
    return Plan(heads, neurons)


def _lowest(scores: Tensor, count: int) -> set[int]:
    return set(scores.argsort(stable=True)[:count].tolist())
