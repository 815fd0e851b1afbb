"""Key/value cache surgery: what candidate search, tree verification and branching need, for every decoder family.

A cache of transformers grows by concatenation and is changed in place by ``model.forward``, even with
``use_cache=False``. All functions here change the cache they are given too, except :func:`branch`.

Slots and positions: a cache slot is a column of the attention mask. With left padding, slot j of row r holds position
``j - pads(r)``. Causality and sliding windows are decided by slots, rotary or learned positions by ``position_ids``.
"""

import copy
import inspect
from typing import cast

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from papertrial.lm.anatomy import unwrap


class WindowLayer(DynamicSlidingWindowLayer):
    """A sliding-window layer that keeps everything it has seen and shows the model only its window.

    The stock layer forgets what left the window, so that cropping or gathering beyond it is impossible. Recording costs
    the memory of a full-attention layer; the attention itself stays windowed.
    """

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.record_past = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, G, T, d_h) and return the part that the window of the T new queries covers."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = torch.cat([cast(Tensor, self.keys), key_states], dim=-2)
        self.values = torch.cat([cast(Tensor, self.values), value_states], dim=-2)
        self.cumulative_length = self.keys.shape[-2]
        visible = self.sliding_window - 1 + key_states.shape[-2]
        return self.keys[:, :, -visible:], self.values[:, :, -visible:]

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens (zero or negative, as in transformers)."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be zero or negative, got {tokens_to_remove}")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        self.keys = cast(Tensor, self.keys)[:, :, :tokens_to_remove]
        self.values = cast(Tensor, self.values)[:, :, :tokens_to_remove]
        self.cumulative_length = self.keys.shape[-2]


# Exact types: the quantised and indexed layers of transformers derive from DynamicLayer but carry further state.
_KNOWN = (DynamicLayer, DynamicSlidingWindowLayer, WindowLayer)


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache that every function of this module can treat.

    Parameters
    ----------
    model
        A decoder of transformers (also one wrapped by peft). Layers with a sliding window get a recording layer, see
        :class:`WindowLayer`.

    Raises
    ------
    ValueError
        If the model is an encoder, an encoder-decoder, or keeps a state that is not keys and values (state-space and
        linear-attention layers, indexed sparse attention); decode those with ``use_cache=False``.
    """
    model = unwrap(model)
    config = model.config
    if (
        getattr(config, "is_encoder_decoder", False)
        or "past_key_values" not in inspect.signature(model.forward).parameters
    ):
        raise ValueError(f"{type(model).__name__} is not a decoder-only model with a key/value cache: give one that is")
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = WindowLayer(layer.sliding_window)
    _check(cache, f"{type(model).__name__}: ")
    return cache


def _check(cache: Cache, prefix: str = "") -> None:
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise TypeError(f"{prefix}cache must be a transformers Cache with layers, got {type(cache).__name__}")
    for index, layer in enumerate(cache.layers):
        foreign = isinstance(layer, DynamicLayer) and not type(layer).__module__.startswith("transformers.")
        if type(layer) not in _KNOWN and not foreign:
            raise ValueError(
                f"{prefix}layer {index} of the cache is a {type(layer).__name__}, which holds more than growing keys "
                "and values; make the cache with papertrial.lm.cache.new_cache(model), or decode with use_cache=False"
            )


def _layers(cache: Cache) -> list[DynamicLayer]:
    _check(cache)
    return [cast(DynamicLayer, layer) for layer in cache.layers]


def length(cache: Cache) -> int:
    """Slots in use: tokens seen so far, padding included."""
    # the maximum, because a layer that was pruned away leaves an empty one behind
    return max((int(layer.get_seq_length()) for layer in _layers(cache)), default=0)


def branch(cache: DynamicCache) -> DynamicCache:
    """A copy that can be decoded further without changing ``cache``; cheap, and gradients flow through it.

    Keys and values are shared until either side grows (growing makes new tensors). Layers of a foreign class are copied
    in depth, because their ``update`` may write in place.
    """
    layers = []
    for layer in _layers(cache):
        layers.append(copy.copy(layer) if type(layer) in _KNOWN else copy.deepcopy(layer))
    twin = copy.copy(cache)
    twin.layers = list(layers)
    return twin


def repeat(cache: Cache, n: int) -> None:
    """Repeat every row ``n`` times, copies side by side: row r becomes rows r*n .. r*n + n - 1."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    for layer in _layers(cache):
        layer.batch_repeat_interleave(n)


def select(cache: Cache, rows: Tensor) -> None:
    """Keep the given rows, in the given order; a row may be named more than once.

    Parameters
    ----------
    rows
        Integer row numbers (B',) or a boolean mask (B,).
    """
    if rows.dim() != 1:
        raise ValueError(f"rows must have one dimension, got shape {tuple(rows.shape)}")
    if rows.dtype == torch.bool:
        rows = rows.nonzero()[:, 0]
    for layer in _layers(cache):
        if layer.get_seq_length() > 0:
            layer.batch_select_indices(rows.to(cast(Tensor, layer.keys).device))


def crop(cache: Cache, drop: int) -> None:
    """Forget the last ``drop`` slots of every row.

    Raises
    ------
    ValueError
        If ``drop`` is negative or more than the cache holds, or if a sliding-window layer that does not record its past
        has moved on too far (such a cache was not made by :func:`new_cache`).
    """
    layers, seen = _layers(cache), length(cache)
    if not 0 <= drop <= seen:
        raise ValueError(f"drop must lie between 0 and the {seen} slots of the cache, got {drop}")
    if drop == 0:
        return
    for index, layer in enumerate(layers):
        if type(layer) is DynamicSlidingWindowLayer and layer.keys is not None:
            missing = layer.keys.shape[-2] - drop < min(seen - drop, layer.sliding_window - 1)
            if missing:
                raise ValueError(
                    f"layer {index} has a sliding window of {layer.sliding_window} and no longer holds the slots that "
                    f"come back when {drop} are dropped; make the cache with papertrial.lm.cache.new_cache(model)"
                )
        if layer.is_initialized:
            layer.crop(-drop)


def gather(cache: Cache, positions: Tensor) -> None:
    """Keep chosen slots of each row, in the given order: what acceptance of one path of a token tree needs.

    Parameters
    ----------
    positions
        Slot numbers (B, P), one row of them per cache row; -1 leaves a slot empty (zeros), to be hidden by the
        attention mask. Rows that keep fewer slots than others should have their -1 on the left: then what is left is in
        effect left padded, and sliding windows, which count slots, stay right. See :func:`gather_mask` for the mask
        that belongs to it.

    Notes
    -----
    Keys are stored with their rotation applied, so each kept token keeps the position it was computed at.

    Raises
    ------
    ValueError
        If a slot number is out of range, or a sliding-window layer no longer holds a slot that its window needs.
    """
    layers, seen = _layers(cache), length(cache)
    if positions.dim() != 2:
        raise ValueError(f"positions must be (rows, slots), got shape {tuple(positions.shape)}")
    if positions.numel() and (int(positions.min()) < -1 or int(positions.max()) >= seen):
        raise ValueError(
            f"positions must lie in -1 .. {seen - 1}, got {int(positions.min())} .. {int(positions.max())}"
        )
    for index, layer in enumerate(layers):
        if type(layer) not in _KNOWN:
            raise ValueError(f"layer {index} is a {type(layer).__name__}: gather does not know what else it stores")
        rows = cast(Tensor, layer.keys).shape[0] if layer.is_initialized else len(positions)
        if rows != len(positions):
            raise ValueError(f"positions has {len(positions)} rows, the cache has {rows}")
    for index, layer in enumerate(layers):
        if layer.is_initialized:
            _gather_layer(layer, positions.to(cast(Tensor, layer.keys).device), seen, index)


def _gather_layer(layer: DynamicLayer, positions: Tensor, seen: int, index: int) -> None:
    kept, keys, values = positions, cast(Tensor, layer.keys), cast(Tensor, layer.values)
    forgotten = seen - keys.shape[-2]
    if isinstance(layer, DynamicSlidingWindowLayer) and forgotten:
        kept = positions[:, -(layer.sliding_window - 1) :] if layer.sliding_window > 1 else positions[:, :0]
        if bool(((kept >= 0) & (kept < forgotten)).any()):
            raise ValueError(
                f"layer {index} has a sliding window of {layer.sliding_window} and has forgotten slots "
                f"0 .. {forgotten - 1}; make the cache with papertrial.lm.cache.new_cache(model)"
            )
    source = (kept - forgotten).clamp(min=0)[:, None, :, None]
    hole = (kept < 0)[:, None, :, None]

    def take(states: Tensor) -> Tensor:
        wanted = source.expand(-1, states.shape[1], -1, states.shape[3])
        return states.gather(2, wanted).masked_fill(hole, 0.0)

    layer.keys, layer.values = take(keys), take(values)
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = positions.shape[1]


def gather_mask(attention_mask: Tensor, positions: Tensor) -> Tensor:
    """The attention mask (B, P) that belongs to a cache after :func:`gather` with the same ``positions``."""
    kept = attention_mask.gather(1, positions.clamp(min=0))
    return kept.masked_fill(positions < 0, 0)
