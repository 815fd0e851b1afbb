"""What is kept of each layer, and what every part of a model weighs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from papertrial.lm.anatomy import Anatomy, Block, anatomy, unwrap


@dataclass(frozen=True)
class LayerSizes:
    """H query heads, G key/value heads and F neurons of one layer."""

    heads: int
    key_value_heads: int
    neurons: int


class Plan:
    """Which query heads and neurons of each layer are kept.

    Key/value heads follow: one stays if any of its query heads stays, and all that stay must keep equally many (a
    group is cut as a whole, or every group alike), because attention pairs queries with keys by their order.

    Parameters
    ----------
    heads, neurons
        Per layer the indices that are kept, in any order, each at most once and at least one.
    """

    def __init__(self, heads: Iterable[Iterable[int]], neurons: Iterable[Iterable[int]]) -> None:
        self.heads = tuple(_indices("heads", layer, kept) for layer, kept in enumerate(heads))
        self.neurons = tuple(_indices("neurons", layer, kept) for layer, kept in enumerate(neurons))
        if len(self.heads) != len(self.neurons):
            raise ValueError(f"heads speaks of {len(self.heads)} layers and neurons of {len(self.neurons)}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and (self.heads, self.neurons) == (other.heads, other.neurons)

    def __hash__(self) -> int:
        return hash((self.heads, self.neurons))

    def __repr__(self) -> str:
        cut = ", ".join(f"{len(h)}x{len(n)}" for h, n in zip(self.heads, self.neurons, strict=True))
        return f"Plan(heads x neurons kept per layer: {cut})"

    def sizes(self, model: nn.Module) -> list[LayerSizes]:
        """Sizes of the layers after the cut.

        Raises
        ------
        ValueError
            If the plan does not fit the model, naming layer and index.
        """
        blocks = anatomy(model).blocks
        if len(self.heads) != len(blocks):
            raise ValueError(f"the plan has {len(self.heads)} layers and the model has {len(blocks)}")
        return [
            LayerSizes(len(heads), len(self.key_value_heads(block)), len(neurons))
            for block, heads, neurons in zip(blocks, self.heads, self._neurons_within(blocks), strict=True)
        ]

    def _neurons_within(self, blocks: Sequence[Block]) -> tuple[tuple[int, ...], ...]:
        for block, kept in zip(blocks, self.neurons, strict=True):
            if kept[-1] >= block.neurons:
                raise ValueError(f"layer {block.index} has {block.neurons} neurons, the plan keeps neuron {kept[-1]}")
        return self.neurons

    def key_value_heads(self, block: Block) -> tuple[int, ...]:
        """The key/value heads of a block that are kept."""
        kept = self.heads[block.index]
        if kept[-1] >= block.heads:
            raise ValueError(f"layer {block.index} has {block.heads} heads, the plan keeps head {kept[-1]}")
        per_group = block.heads // block.key_value_heads
        counts: dict[int, int] = {}
        for head in kept:
            counts[head // per_group] = counts.get(head // per_group, 0) + 1
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"layer {block.index}: the plan keeps {sorted(counts.values())} query heads in its key/value groups; "
                f"heads that share keys ({per_group} each) must be cut alike in every group that stays"
            )
        return tuple(sorted(counts))

    def dropped_heads(self, block: Block) -> list[int]:
        """The query heads of a block that go."""
        return sorted(set(range(block.heads)) - set(self.heads[block.index]))

    def dropped_neurons(self, block: Block) -> list[int]:
        """The neurons of a block that go."""
        return sorted(set(range(block.neurons)) - set(self.neurons[block.index]))


def _indices(what: str, layer: int, kept: Iterable[int]) -> tuple[int, ...]:
    indices = sorted(int(index) for index in kept)
    if not indices:
        raise ValueError(f"layer {layer} would keep no {what}: keep at least one, or drop the layer with keep_layers")
    if indices[0] < 0 or len(set(indices)) != len(indices):
        raise ValueError(f"{what} of layer {layer} must be distinct indices from 0 on, got {indices[:8]}")
    return tuple(indices)


def whole_plan(model: nn.Module) -> Plan:
    """The plan that keeps everything."""
    blocks = anatomy(model).blocks
    return Plan([range(block.heads) for block in blocks], [range(block.neurons) for block in blocks])


def sizes(model: nn.Module) -> list[LayerSizes]:
    """Sizes of every layer, read from the weights."""
    return [LayerSizes(block.heads, block.key_value_heads, block.neurons) for block in anatomy(model).blocks]


# -- parameters --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters by part; a tied matrix counts once, as embedding.

    Attributes
    ----------
    attention, mlp : projections of all layers with their biases.
    norm : all norms, of heads too.
    embedding : of tokens and learned positions.
    head : the unembedding where it is not tied, and its bias.
    other : the rest (token types, poolers, the transform of a masked-token head).
    """

    attention: int
    mlp: int
    norm: int
    embedding: int
    head: int
    other: int

    @property
    def blocks(self) -> int:
        """What pruning heads and neurons can reach."""
        return self.attention + self.mlp

    @property
    def total(self) -> int:
        return self.attention + self.mlp + self.norm + self.embedding + self.head + self.other


def parameter_counts(model: nn.Module) -> ParameterCounts:
    """Count the parameters of a model of a known family by part."""
    parts = anatomy(model)
    seen: set[int] = set()

    def count(modules: Iterable[nn.Module | None]) -> int:
        total = 0
        for module in modules:
            for parameter in [] if module is None else module.parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    total += parameter.numel()
        return total

    attention = count(m for block in parts.blocks for m in attention_projections(block))
    mlp = count(m for block in parts.blocks for m in (block.gate, block.up, block.down))
    norm = count(_norms(parts))
    embedding = count([parts.embed, parts.embed_positions])
    head = count([parts.unembed])
    return ParameterCounts(attention, mlp, norm, embedding, head, count([unwrap(model)]))


def attention_projections(block: Block) -> list[nn.Module]:
    """The modules with the attention weights of a block, a fused one once."""
    modules = [block.projection("query"), block.projection("key"), block.projection("value"), block.output]
    return list(dict.fromkeys(modules))


def _norms(parts: Anatomy) -> list[nn.Module | None]:
    norms = [parts.final_norm]
    for block in parts.blocks:
        norms += [block.attention_norm, block.mlp_norm, block.post_attention_norm, block.post_mlp_norm]
        norms += [block.query_norm, block.key_norm]
    return [None if norm is None else norm.module for norm in norms]


@dataclass(frozen=True)
class UnitCosts:
    """Parameters that go with one query head, one key/value head (keys and values together), one neuron."""

    query_head: int
    key_value_head: int
    neuron: int


def unit_costs(block: Block) -> UnitCosts:
    """What one unit of a block weighs, biases included."""
    width, size = block.W_in.shape[0], block.head_size

    def read(bias: object) -> int:
        return width + (bias is not None)

    query = size * (read(block.b_Q) + width)
    keys_and_values = size * (read(block.head_biases("key")) + read(block.head_biases("value")))
    neuron = read(block.b_in) + width + (0 if block.gate is None else read(block.b_gate))
    return UnitCosts(query, keys_and_values, neuron)


def parameters_after(model: nn.Module, plan: Plan) -> int:
    """Parameters of ``prune(model, plan)`` by the formula: what is there, minus dropped units times their costs."""
    total = parameter_counts(model).total
    for block, after in zip(anatomy(model).blocks, plan.sizes(model), strict=True):
        costs = unit_costs(block)
        total -= (block.heads - after.heads) * costs.query_head
        total -= (block.key_value_heads - after.key_value_heads) * costs.key_value_head
        total -= (block.neurons - after.neurons) * costs.neuron
    return total
