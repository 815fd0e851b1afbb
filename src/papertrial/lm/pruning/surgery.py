"""Cutting a model: slices of its weights in place of the weights."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from papertrial.lm.anatomy import Block, anatomy
from papertrial.lm.anatomy.parts import matrix
from papertrial.lm.hooks import patch, scale
from papertrial.lm.pruning import ordinary
from papertrial.lm.pruning.plan import Plan, attention_projections


def prune(model: PreTrainedModel, plan: Plan, *, inplace: bool = False) -> PreTrainedModel:
    """The model with only the heads and neurons of ``plan``; its configuration says what it is.

    Parameters
    ----------
    model
        A transformers model of a known family, with or without a head; adapters merged.
    plan
        What is kept. Layers may differ; see the package for which cuts reload as ordinary checkpoints.
    inplace
        Cut ``model`` itself: no second copy in memory. Use the returned model all the same, it may be of a sister
        class (a Llama model whose number of heads no longer divides its width is returned as the same function, in
        Mistral's class). By default ``model`` is left as it was.

    Raises
    ------
    ValueError
        For an unknown family, a plan that does not fit, quantised weights or adapters.
    TypeError
        For a wrapped model.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a plain transformers model, got {type(model).__name__}: merge and unwrap it")
    after = plan.sizes(model)  # complains before anything is touched
    for block in anatomy(model).blocks:
        _require_plain(block)
    pruned = model if inplace else _copied(model)
    for block in anatomy(pruned).blocks:
        cut(block, plan.heads[block.index], plan.key_value_heads(block), plan.neurons[block.index])
    return ordinary.described(pruned, after)


def _copied(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares the projections' weights for now: the cut puts slices in their place, in the copy only."""
    shared = {}
    for block in anatomy(model).blocks:
        for module in (*attention_projections(block), block.gate, block.up, block.down):
            if module is not None:
                shared[id(module.weight)] = module.weight
    return copy.deepcopy(model, shared)


def _require_plain(block: Block) -> None:
    for module in (*attention_projections(block), block.gate, block.up, block.down):
        if module is not None:
            matrix(module)  # complains about quantised weights and open adapters
            if hasattr(module, "base_layer"):
                raise ValueError(f"layer {block.index} carries adapters: unload them (merge_and_unload) first")


@torch.no_grad()
def cut(block: Block, heads: Sequence[int], key_value_heads: Sequence[int], neurons: Sequence[int]) -> None:
    """Keep these units of one block, in place; sizes that the modules carry as attributes follow."""
    # indices live on the CPU whatever the default device: the model may be one without storage
    kept = {"query": heads, "key": key_value_heads, "value": key_value_heads}
    outputs: dict[nn.Module, list[int]] = {}
    for name, units in kept.items():
        module = block.projection(name)  # type: ignore[arg-type]
        places = block.split_heads(torch.arange(matrix(module).shape[1], device="cpu"), name)  # type: ignore[arg-type]
        outputs.setdefault(module, []).extend(places[list(units)].flatten().tolist())
    size = block.head_size
    inputs = torch.arange(block.heads * size, device="cpu").unflatten(0, (-1, size))[list(heads)].flatten()
    for module, indices in outputs.items():
        # ascending: a fused projection keeps its layout, be it by blocks or by heads
        _narrow(module, outputs=torch.tensor(sorted(indices), device="cpu"))
    _narrow(block.output, inputs=inputs)
    chosen = torch.tensor(list(neurons), device="cpu")
    for reading in (block.gate, block.up):
        if reading is not None:
            _narrow(reading, outputs=chosen)
    _narrow(block.down, inputs=chosen)
    _update_attributes(block, len(heads), len(key_value_heads), len(neurons))


def _narrow(projection: nn.Module, *, inputs: Tensor | None = None, outputs: Tensor | None = None) -> None:
    """Keep some inputs or outputs of a Linear or Conv1D."""
    module = cast(Any, projection)
    wide: nn.Parameter = module.weight
    weight: Tensor = wide.detach()
    transposed = isinstance(module, Conv1D)
    for axis, indices in ((int(not transposed), inputs), (int(transposed), outputs)):
        if indices is not None:
            weight = weight.index_select(axis, indices.to(weight.device))
    module.weight = nn.Parameter(weight, requires_grad=wide.requires_grad)
    if outputs is not None and module.bias is not None:
        bias: nn.Parameter = module.bias
        kept = bias.detach().index_select(0, outputs.to(bias.device))
        module.bias = nn.Parameter(kept, requires_grad=bias.requires_grad)
    read, written = weight.shape if transposed else weight.shape[::-1]
    if transposed:
        module.nx, module.nf = read, written
    else:
        module.in_features, module.out_features = read, written


def _update_attributes(block: Block, heads: int, key_value_heads: int, neurons: int) -> None:
    """The sizes that some families copy from the configuration into their modules and use in the forward pass."""
    width = heads * block.head_size
    values = {
        "num_heads": heads,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "num_key_value_groups": heads // key_value_heads,
        "split_size": width,  # GPT-2
        "all_head_size": width,  # BERT
    }
    for name, value in values.items():
        if isinstance(getattr(block.attention, name, None), int):
            setattr(block.attention, name, value)
    if isinstance(getattr(block.mlp_reader, "intermediate_size", None), int):
        cast(Any, block.mlp_reader).intermediate_size = neurons


@contextlib.contextmanager
def masked(model: PreTrainedModel, plan: Plan) -> Iterator[None]:
    """During the block the model computes what ``prune(model, plan)`` does, at its full size and speed.

    For trying a plan without cutting, and the oracle of the cut.
    """
    plan.sizes(model)
    edits = []
    for block in anatomy(model).blocks:
        if heads := plan.dropped_heads(block):
            edits.append(scale("head_out", block.index, 0.0, units=heads))
        if neurons := plan.dropped_neurons(block):
            edits.append(scale("mlp_act", block.index, 0.0, units=neurons))
    with patch(model, *edits):
        yield


def keep_layers(model: PreTrainedModel, layers: Sequence[int], *, inplace: bool = False) -> PreTrainedModel:
    """The model with only these layers, in their order; an ordinary checkpoint in every family.

    Parameters
    ----------
    layers
        Ascending indices, at least one.

    Raises
    ------
    ValueError
        For indices that are not ascending or not there.
    """
    count = len(anatomy(model).blocks)
    if not layers or list(layers) != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= count:
        raise ValueError(f"layers must be ascending indices in 0 .. {count - 1}, got {list(layers)}")
    pruned = model if inplace else copy.deepcopy(model)
    parts = anatomy(pruned)
    owner, _, name = parts.family.layers.rpartition(".")
    kept = nn.ModuleList([parts.blocks[layer].module for layer in layers])
    setattr(parts.body.get_submodule(owner) if owner else parts.body, name, kept)
    for index, block in enumerate(kept):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                cast(Any, module).layer_idx = index  # the cache is addressed by it
    ordinary.keep_layers_in_config(pruned, layers)
    return pruned
