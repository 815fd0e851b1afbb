"""Replacing and observing the attention function of any known model, layer by layer, with causality kept.

One function is registered with transformers, once, both as attention and as mask (a name without a mask of its own
would silently see the future). It looks up, per layer, what a context manager has put there, and otherwise does what
the model did before, bit for bit.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from papertrial.lm.anatomy import anatomy, unwrap

_NAME = "papertrial"
_SLOT = "_papertrial_attention"


class AttentionFunction(Protocol):
    """The signature of transformers.

    ``query`` (B, H, T, d_h); ``key``, ``value`` (B, G, S, d_h), rotated, with the cache in front, not repeated;
    ``attention_mask`` additive float (B, 1, T, S), or None where everything is visible (encoders without padding).
    ``scaling`` multiplies the scores: always use it, OPT passes 1 and a query that is already scaled. ``kwargs`` may
    hold ``softcap``. Returns the output (B, T, H, d_h) and the weights (B, H, T, S) or None.
    """

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]: ...


@dataclass
class _Slot:
    """What is attached to one attention module."""

    functions: list[AttentionFunction] = field(default_factory=list)
    observers: list[Callable[[dict[str, Tensor]], None]] = field(default_factory=list)
    before: str = "sdpa"


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The float mask, with sdpa's own mask hung on it for the layers that go on as before."""
    skip = kwargs.pop("allow_is_causal_skip", True)
    mask = eager_mask(*args, **kwargs)
    if mask is not None:
        options = {**kwargs, "allow_is_causal_skip": skip}
        options.pop("dtype", None)
        mask._papertrial_sdpa = (sdpa_mask(*args, **options),)  # type: ignore[attr-defined]
    return cast("Tensor | None", mask)


def _dispatch(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    slot: _Slot = getattr(module, _SLOT, None) or _Slot()
    if slot.functions:
        output, weights = slot.functions[-1](module, query, key, value, attention_mask, **kwargs)
    else:
        output, weights = _as_before(slot.before, module, query, key, value, attention_mask, **kwargs)
        if weights is None and slot.observers:
            with torch.set_grad_enabled(torch.is_grad_enabled()):
                _, weights = softmax_attention(module, query, key, value, attention_mask, **{**kwargs, "dropout": 0.0})
    if slot.observers:
        seen = {"query": query, "key": key, "value": value}
        if weights is not None:
            seen["weights"] = weights
        for observer in slot.observers:
            observer(seen)
    return output, weights


def _as_before(
    before: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if before == "eager" and eager is not None:
        return cast("tuple[Tensor, Tensor | None]", eager(module, query, key, value, attention_mask, **kwargs))
    own = getattr(attention_mask, "_papertrial_sdpa", None)
    mask = attention_mask if own is None else own[0]
    return cast("tuple[Tensor, None]", sdpa_attention_forward(module, query, key, value, mask, **kwargs))


AttentionInterface.register(_NAME, _dispatch)
AttentionMaskInterface.register(_NAME, _mask)


def repeat_heads(values: Tensor, heads: int) -> Tensor:
    """Keys or values (B, G, S, d_h) repeated to (B, H, S, d_h): query head h reads group h * G // H."""
    groups = values.shape[1]
    if heads % groups:
        raise ValueError(f"{heads} query heads cannot share {groups} key/value heads evenly")
    return values if groups == heads else values.repeat_interleave(heads // groups, dim=1)


def visible(attention_mask: Tensor | None, scores: Tensor) -> Tensor:
    """Which keys each query may see, (B, 1, T, S) bool, from the additive mask."""
    if attention_mask is None:
        return torch.ones_like(scores[:, :1], dtype=torch.bool)
    return attention_mask > torch.finfo(attention_mask.dtype).min / 2


def attention_scores(
    query: Tensor, key: Tensor, scaling: float | None = None, softcap: float | None = None, **_: Any
) -> Tensor:
    """Scores (B, H, T, S) before the mask."""
    scores = query @ repeat_heads(key, query.shape[1]).mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    return scores if softcap is None else (scores / softcap).tanh() * softcap


def softmax_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Plain scaled dot-product attention, softmax in float32: the oracle, and a start for variants."""
    scores = attention_scores(query, key, scaling, kwargs.get("softcap"))
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    mixed = nn.functional.dropout(weights, dropout, training=module.training) @ repeat_heads(value, query.shape[1])
    return mixed.transpose(1, 2).contiguous(), weights


def weighted_attention(weigh: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> AttentionFunction:
    """An attention function that differs from the plain one in how scores become weights.

    Parameters
    ----------
    weigh
        ``(module, scores (B, H, T, S), visible (B, 1, T, S) bool) -> weights (B, H, T, S)``; ``module.layer_idx`` tells
        the layer. Invisible weights are set to 0 afterwards, whatever it returns there, so that no variant can see the
        future.
    """

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
        scores = attention_scores(query, key, scaling, kwargs.get("softcap"))
        seen = visible(attention_mask, scores)
        weights = weigh(module, scores, seen).masked_fill(~seen, 0.0).to(query.dtype)
        mixed = nn.functional.dropout(weights, dropout, training=module.training) @ repeat_heads(value, query.shape[1])
        return mixed.transpose(1, 2).contiguous(), weights

    return attend


def softmax_weights(scores: Tensor, seen: Tensor) -> Tensor:
    """Softmax over the visible keys in float32; rows that see nothing are 0, not NaN, also in the gradient."""
    masked = scores.float().masked_fill(~seen, torch.finfo(torch.float32).min)
    return (masked.softmax(-1) * seen).to(scores.dtype)


@contextlib.contextmanager
def _slots(model: nn.Module, layers: Sequence[int] | None) -> Iterator[dict[int, _Slot]]:
    """The slots of some layers while the model runs through the dispatcher; all is as before afterwards."""
    inner, parts = unwrap(model), anatomy(model)
    count = len(parts.blocks)
    chosen = list(range(count)) if layers is None else [int(layer) for layer in layers]
    outside = [layer for layer in chosen if not -count <= layer < count]
    if outside:
        raise ValueError(f"layer {outside[0]} is out of range: the model has {count} layers")
    before = inner.config._attn_implementation
    outermost = before != _NAME
    modules = [block.attention for block in parts.blocks]
    if outermost:
        if before not in ("sdpa", "eager"):
            raise ValueError(
                f"attention implementation {before!r} cannot be combined: set it to 'sdpa' or 'eager' first"
            )
        for module in modules:
            setattr(module, _SLOT, _Slot(before=before))
        inner.set_attn_implementation(_NAME)
    try:
        yield {layer % count: getattr(modules[layer], _SLOT) for layer in chosen}
    finally:
        if outermost:
            inner.set_attn_implementation(before)
            for module in modules:
                delattr(module, _SLOT)


@contextlib.contextmanager
def use_attention(model: nn.Module, function: AttentionFunction, layers: Sequence[int] | None = None) -> Iterator[None]:
    """Run the given layers (default all) with ``function`` during the block, the others as before.

    Nested blocks: the innermost wins where layers overlap. Works in forward, training and generate, with a cache.

    Raises
    ------
    ValueError
        For an unknown architecture, a layer out of range, or a model set to another implementation than sdpa or eager
        (flash kernels receive no mask that could be handed on).
    """
    with _slots(model, layers) as slots:
        for slot in slots.values():
            slot.functions.append(function)
        try:
            yield
        finally:
            for slot in slots.values():
                slot.functions.pop()


class AttentionRecording:
    """By layer index, of the latest forward: ``recording[3]`` is the pattern (B, H, T, S) of layer 3.

    ``queries``, ``keys`` and ``values`` hold what the attention function received: rotated, with the cache in front,
    keys and values not repeated over the heads that share them.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self._seen: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}

    def _of(self, what: str, layer: int) -> Tensor:
        if layer not in self._seen:
            raise KeyError(f"layer {layer} was not recorded; recorded: {sorted(self._seen)}")
        if not self._seen[layer]:
            raise KeyError(f"layer {layer} was not passed: run the model inside the block")
        if what not in self._seen[layer]:
            raise KeyError(f"the attention function of layer {layer} returns no weights")
        return self._seen[layer][what]

    def __getitem__(self, layer: int) -> Tensor:
        return self._of("weights", layer)

    @property
    def layers(self) -> list[int]:
        """The recorded layers, ascending."""
        return sorted(self._seen)

    def patterns(self) -> Tensor:
        """All recorded layers stacked, (L, B, H, T, S); needs the same number of heads in each."""
        return torch.stack([self[layer] for layer in self.layers])

    def queries(self, layer: int) -> Tensor:
        """(B, H, T, d_h)."""
        return self._of("query", layer)

    def keys(self, layer: int) -> Tensor:
        """(B, G, S, d_h)."""
        return self._of("key", layer)

    def values(self, layer: int) -> Tensor:
        """(B, G, S, d_h)."""
        return self._of("value", layer)


@contextlib.contextmanager
def record_attention(
    model: nn.Module, layers: Sequence[int] | None = None, *, detach: bool = True
) -> Iterator[AttentionRecording]:
    """Record attention patterns during the block without changing what the model computes.

    Under sdpa the pattern is computed beside the kernel, from the same queries and keys; a function put there by
    :func:`use_attention` shows the weights that it returns.
    """
    with _slots(model, layers) as slots:
        recording = AttentionRecording(sorted(slots))

        def observer_of(layer: int) -> Callable[[dict[str, Tensor]], None]:
            def observe(seen: dict[str, Tensor]) -> None:
                recording._seen[layer] = {name: t.detach() if detach else t for name, t in seen.items()}

            return observe

        observers = {layer: observer_of(layer) for layer in slots}
        for layer, slot in slots.items():
            slot.observers.append(observers[layer])
        try:
            yield recording
        finally:
            for layer, slot in slots.items():
                slot.observers.remove(observers[layer])
