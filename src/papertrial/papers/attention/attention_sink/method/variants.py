"""Attention in which the sink does or does not emerge: how scores become weights, and learned keys and values.

Every variant is a function for :func:`papertrial.lm.attention.use_attention`. With scores z_ij = q_i . k_j / sqrt(d_h)
over the keys that query i may see, and m_ij in {0, 1} saying which these are:

| name | A_ij |
|---|---|
| ``softmax`` | exp(z_ij) m_ij / sum_l exp(z_il) m_il |
| ``sigmoid`` | sigmoid(z_ij) m_ij |
| ``elu1`` | (elu(z_ij) + 1) m_ij |
| ``sigmoid_norm``, ``elu1_norm`` | the two above, divided by their sum over j plus 1e-8 |
| ``linear``, ``mlp``, ``elu`` | phi(q_i) . phi(k_j) / sqrt(d_h) m_ij; phi(x) is x, W2 relu(W1 x), or elu(x) + 1 |
| ``linear_norm``, ``mlp_norm`` | these divided by max(|sum_j|, 1): they can be negative |
| ``elu_norm`` | divided by the sum over j plus 1e-8 |
| ``kv_bias`` | softmax with one more key k* and value v*, learned, without position, which every query sees |
| ``k_bias`` | the same with v* = 0 |
| ``v_bias`` | softmax, and v* is added to the output |

Where there is a k*, the weights returned are those of the text's own keys and sum to one minus the bias's share.
"""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papertrial.lm.anatomy import anatomy, unwrap
from papertrial.lm.attention import (
    AttentionFunction,
    attention_scores,
    repeat_heads,
    softmax_weights,
    use_attention,
    visible,
    weighted_attention,
)
from papertrial.papers.attention.attention_sink.method.saved import SINK_PARAMETERS, saved_parameters

Variant = Literal[
    "softmax",
    "sigmoid",
    "sigmoid_norm",
    "elu1",
    "elu1_norm",
    "linear",
    "linear_norm",
    "mlp",
    "mlp_norm",
    "elu",
    "elu_norm",
    "k_bias",
    "kv_bias",
    "v_bias",
]
VARIANTS: tuple[Variant, ...] = get_args(Variant)

NORMALISED = ("softmax", "sigmoid_norm", "elu1_norm", "elu_norm", "v_bias")
"""Variants whose weights over the text's keys are positive and sum to one."""

_EPS = 1e-8
_SPREAD = 0.02


class SinkBias(nn.Module):
    """The learned key k* and value v* of one layer: (H, d_h) each, or (1, d_h) shared by the heads; either may be None.

    They belong to query heads, also where heads share keys and values.
    """

    def __init__(
        self, heads: int, head_size: int, *, key: bool, value: bool, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.register_parameter("key", _drawn((heads, head_size), generator) if key else None)
        self.register_parameter("value", _drawn((heads, head_size), generator) if value else None)


class FeatureMap(nn.Module):
    """phi(x) = W2 relu(W1 x), the same for queries, keys and all heads of a layer; W1 and W2 (d_h, d_h), no offsets."""

    def __init__(self, head_size: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        spread = head_size**-0.5  # keeps the length of what passes, up to the relu
        self.first = _drawn((head_size, head_size), generator, spread)
        self.second = _drawn((head_size, head_size), generator, spread)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_h) to (..., d_h)."""
        return F.linear(F.relu(F.linear(x, self.first)), self.second)


def _drawn(shape: tuple[int, ...], generator: torch.Generator | None, spread: float = _SPREAD) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=generator) * spread)


# -- from scores to weights ----------------------------------------------------------------------------------------


def attention_weights(scores: Tensor, seen: Tensor, variant: Variant) -> Tensor:
    """Weights (B, H, T, S) of a variant that needs nothing but scores (softmax, sigmoid and elu1, with their norms).

    Parameters
    ----------
    scores
        (B, H, T, S), scaled, not masked.
    seen
        Bool, broadcast to the scores' shape. Masks by multiplication, so that a row that sees nothing is 0.

    Raises
    ------
    ValueError
        For another variant.
    """
    if variant == "softmax":
        return softmax_weights(scores, seen)
    if variant in ("sigmoid", "sigmoid_norm"):
        weights = scores.sigmoid() * seen
    elif variant in ("elu1", "elu1_norm"):
        weights = (F.elu(scores) + 1) * seen
    else:
        raise ValueError(f"variant {variant!r} is not a function of scores alone")
    return _normalised(weights) if variant.endswith("_norm") else weights


def _normalised(weights: Tensor) -> Tensor:
    return weights / (weights.sum(-1, keepdim=True) + _EPS)


def _bounded(weights: Tensor) -> Tensor:
    """Of weights with signs: their sum may be 0, so only sums beyond one are divided away."""
    return weights / weights.sum(-1, keepdim=True).abs().clamp(min=1)


def _mixed(module: nn.Module, weights: Tensor, value: Tensor, dropout: float) -> Tensor:
    """(B, H, T, d_h)."""
    return F.dropout(weights, dropout, training=module.training) @ repeat_heads(value, weights.shape[1])


def _scored(variant: Variant) -> AttentionFunction:
    return weighted_attention(lambda module, scores, seen: attention_weights(scores, seen, variant))


def _kernel(variant: Variant, unscale: float) -> AttentionFunction:
    """``unscale`` turns the query into the one before scaling, in families that scale it ahead of the function."""
    name, _, norm = variant.partition("_")

    def weigh(module: nn.Module, scores: Tensor, seen: Tensor) -> Tensor:
        weights = scores * seen
        if norm:
            weights = _normalised(weights) if name == "elu" else _bounded(weights)
        return weights

    product = weighted_attention(weigh)

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        features: Callable[[Tensor], Tensor] = {
            "linear": lambda x: x,
            "mlp": lambda x: _own(module)(x),
            "elu": lambda x: F.elu(x) + 1,
        }[name]
        scale = (query.shape[-1] ** -0.5 if scaling is None else scaling) / unscale
        return product(module, features(query * unscale), features(key), value, attention_mask, scale, dropout)

    return attend


def _biased(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Softmax over k* and the visible keys. k* never enters the cache: it is put in front at every call instead."""
    bias = _own(module)
    scores = attention_scores(query, key, scaling, kwargs.get("softcap"))
    seen = visible(attention_mask, scores)
    weights, share = softmax_weights(scores, seen), None
    if bias.key is not None:
        to_bias = attention_scores(query, _per_head(bias.key, query), scaling, kwargs.get("softcap"))  # (B, H, T, 1)
        every = torch.cat([torch.ones_like(seen[..., :1]), seen], -1)
        joint = softmax_weights(torch.cat([to_bias, scores], -1), every)
        dropped = F.dropout(joint, dropout, training=module.training)
        share, weights = dropped[..., :1], joint[..., 1:].to(query.dtype)
        mixed = dropped[..., 1:].to(query.dtype) @ repeat_heads(value, query.shape[1])
    else:
        mixed = _mixed(module, weights, value, dropout)
    if bias.value is not None:
        star = _per_head(bias.value, query)  # (1, H, 1, d_h)
        mixed = mixed + (star if share is None else share.to(query.dtype) * star)
    return mixed.transpose(1, 2).contiguous(), weights


def _per_head(vectors: Tensor, query: Tensor) -> Tensor:
    """(H or 1, d_h) as the one key or value of each head, (1, H, 1, d_h)."""
    heads, size = query.shape[1], query.shape[-1]
    return vectors.to(query.dtype).expand(heads, size)[None, :, None]


def _own(module: nn.Module) -> Any:
    own = getattr(module, SINK_PARAMETERS, None)
    if own is None:
        raise ValueError(
            f"{type(module).__name__} has no parameters of a sink variant: call set_attention on the model"
        )
    return own


# -- putting a variant into a model --------------------------------------------------------------------------------


def set_attention(
    model: nn.Module,
    variant: Variant,
    *,
    per_head: bool = True,
    layers: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    saved: str | os.PathLike[str] | None = None,
) -> contextlib.AbstractContextManager[None]:
    """Attach a variant's parameters to the model now, and run it with the variant inside the returned block.

        attending = set_attention(model, "k_bias", generator=generator)
        with attending:                                             # can be entered again and again
            train(model, batches, steps=..., optimizer=adamw(3e-3))  # trains the bias too
        model.save_pretrained(folder)

        model = AutoModelForCausalLM.from_pretrained(folder)        # knows nothing of the bias, and warns of it
        with set_attention(model, "k_bias", saved=folder):          # takes it from the folder
            ...

    Parameters
    ----------
    model
        Any model that :func:`papertrial.lm.anatomy.anatomy` knows, decoder or encoder.
    variant
        One of ``VARIANTS``, see the table at the top.
    per_head
        Biases only: one k* and v* for each head, or one for all heads of a layer.
    layers
        Which layers, default all; the others stay as they are.
    generator
        Of the biases' start, N(0, 0.02^2), and the feature maps'. None draws from the global one.
    saved
        A folder that ``save_pretrained`` wrote while a variant's parameters were attached: take those, of every chosen
        layer, instead of drawing new ones. ``from_pretrained`` alone does not bring them back.

    Notes
    -----
    Parameters stay attached to the model after the block, as ``<attention module>.attention_sink``, and stand in its
    state dict. The next ``set_attention`` of the same variant on this model takes them up; ``forget_attention`` removes
    them. The bias is not part of the key/value cache, so any cache works, also one that was filled before.

    Raises
    ------
    ValueError
        For an unknown variant, a layer out of range, parameters of another variant that are still attached, and a
        ``saved`` folder that has none for a chosen layer, or those of another variant, or for a variant without any.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
    parts = anatomy(model)
    count = len(parts.blocks)
    chosen = list(range(count)) if layers is None else list(layers)
    if outside := [layer for layer in chosen if not -count <= layer < count]:
        raise ValueError(f"layer {outside[0]} is out of range: the model has {count} layers")
    stored = None if saved is None else saved_parameters(model, saved)
    new: list[tuple[int, nn.Module]] = []
    for layer in chosen:
        weight = parts.blocks[layer].W_O  # (H, d_h, D)
        own = _parameters(variant, weight.shape[0] if per_head else 1, weight.shape[1], generator)
        if stored is not None:
            _fill(own, stored.get(layer % count), variant, layer)
        if own is not None:
            new.append((layer, own.to(device=weight.device, dtype=weight.dtype)))
    if stored is None:
        new = [(layer, own) for layer, own in new if not _fits(parts.blocks[layer].attention, own, layer)]
    for layer, own in new:  # once all of them are known to be right
        setattr(parts.blocks[layer].attention, SINK_PARAMETERS, own)
    unscale = float(parts.blocks[chosen[0]].W_O.shape[1]) ** 0.5 if chosen and parts.family.scaled_query else 1.0
    return _Attending(model, _function(variant, unscale), chosen)


def _function(variant: Variant, unscale: float) -> AttentionFunction:
    if variant in ("k_bias", "kv_bias", "v_bias"):
        return _biased
    if variant.partition("_")[0] in ("linear", "mlp", "elu"):
        return _kernel(variant, unscale)
    return _scored(variant)


def _parameters(variant: Variant, heads: int, size: int, generator: torch.Generator | None) -> nn.Module | None:
    """A layer's own parameters, freshly drawn; None for the variants that have none."""
    if variant in ("k_bias", "kv_bias", "v_bias"):
        return SinkBias(heads, size, key=variant != "v_bias", value=variant != "k_bias", generator=generator)
    return FeatureMap(size, generator) if variant in ("mlp", "mlp_norm") else None


def _form(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _fill(own: nn.Module | None, stored: Mapping[str, Tensor] | None, variant: Variant, layer: int) -> None:
    """Put what a folder holds of a layer in the place of what was drawn."""
    if own is None:
        raise ValueError(f"saved: {variant!r} has no parameters that could be taken from a folder")
    needed, held = _form(own.state_dict()), _form(stored or {})
    if needed != held:
        raise ValueError(f"saved: of layer {layer} the folder holds {held or 'nothing'}; {variant!r} needs {needed}")
    own.load_state_dict(dict(stored or {}))


def _fits(module: nn.Module, fresh: nn.Module, layer: int) -> bool:
    """Whether the layer has parameters of this form already; those of another variant are an error."""
    there = getattr(module, SINK_PARAMETERS, None)
    if there is None:
        return False
    if _form(there.state_dict()) != _form(fresh.state_dict()):
        raise ValueError(
            f"layer {layer} still has the parameters {_form(there.state_dict())} of another variant, "
            f"{_form(fresh.state_dict())} are needed: call forget_attention first"
        )
    return True


class _Attending(contextlib.AbstractContextManager[None]):
    """``use_attention`` that can be entered more than once."""

    def __init__(self, model: nn.Module, function: AttentionFunction, layers: Sequence[int]) -> None:
        self._arguments = (model, function, layers)
        self._entered: list[contextlib.AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        block = use_attention(*self._arguments)
        block.__enter__()
        self._entered.append(block)

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)


def forget_attention(model: nn.Module) -> None:
    """Remove what ``set_attention`` attached; a model without such parameters is left as it is."""
    for block in anatomy(model).blocks:
        if hasattr(block.attention, SINK_PARAMETERS):
            delattr(block.attention, SINK_PARAMETERS)


# -- the sink token ------------------------------------------------------------------------------------------------


def add_sink_token(model: nn.Module, *, generator: torch.Generator | None = None) -> int:
    """Give a model one more token, to be put before every sequence with :func:`prepend_sink_token`; returns its id.

    Its embedding starts at N(0, 0.02^2); where the model has an unembedding of its own, so does its row there.
    """
    inner = unwrap(model)
    sink = anatomy(model).W_E.shape[0]
    with torch.random.fork_rng(devices=[]):  # transformers draws the new row globally before it is overwritten
        inner.resize_token_embeddings(sink + 1, mean_resizing=False)
    parts = anatomy(model)
    tables = [parts.W_E] if parts.unembed is None or parts.tied else [parts.W_E, parts.W_U.mT]
    with torch.no_grad():
        for table in tables:  # (V, D)
            table[sink] = (torch.randn(table.shape[1], generator=generator) * _SPREAD).to(table)
    return sink


def prepend_sink_token(input_ids: Tensor, sink: int, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sequences (B, T + 1) with the sink token before their first real token, and their mask.

    Padding on the left stays on the left of it, padding on the right where it is.

    Raises
    ------
    ValueError
        Unless ``input_ids`` is (B, T), and the mask has its shape and a real token in every row.
    """
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be (B, T), got {tuple(input_ids.shape)}")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.dtype)
    if mask.shape != input_ids.shape or not bool(mask.any(1).all()):
        raise ValueError(
            f"attention_mask must be {tuple(input_ids.shape)} with a real token in every row, got {tuple(mask.shape)}"
        )
    first = mask.argmax(1, keepdim=True)  # (B, 1)
    place = torch.arange(input_ids.shape[1] + 1, device=input_ids.device)[None]  # (1, T + 1)
    source = (place - (place > first).to(place.dtype)).clamp(max=input_ids.shape[1] - 1)
    ids = input_ids.gather(1, source).masked_fill(place == first, sink)
    return ids, mask.gather(1, source).masked_fill(place == first, 1)
