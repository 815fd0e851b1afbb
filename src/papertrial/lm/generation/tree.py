"""Looking ahead: run several possible continuations of every row in one forward pass over one shared cache.

The continuations form a tree. A node sees the context and its own ancestors, at the position of its depth; siblings do
not see each other. Nothing is copied per candidate, so k candidates cost one pass with k tokens a row, not k rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from papertrial.lm import cache as kv
from papertrial.lm.anatomy import body, unwrap
from papertrial.lm.generation.inputs import position_ids
from papertrial.lm.generation.stepping import StepDecoder


def tree_mask(parents: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Who sees whom in a tree, and how deep each node lies.

    Parameters
    ----------
    parents
        For each of N nodes the number of its parent, which comes before it; -1 hangs a node under the context.

    Returns
    -------
    tuple
        Bool (N, N), row i true at i and at the ancestors of i; depths (N,), 0 under the context.

    Raises
    ------
    ValueError
        If there is no node, or a parent does not come before its child.
    """
    if len(parents) == 0:
        raise ValueError("parents is empty: a tree needs at least one node")
    sees = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if not -1 <= parent < node:
            raise ValueError(f"parents[{node}] is {parent}: a parent must be -1 or come before its child")
        if parent >= 0:
            sees[node] |= sees[parent]
    return sees, sees.sum(1) - 1


def can_look_ahead(decoder: StepDecoder, nodes: int) -> bool:
    """Whether :func:`look_ahead` may feed that many nodes now; if not, repeat the rows instead.

    False without a cache, under attention kernels that take no mask of their own, and where layers have sliding windows
    of different lengths and one of them would hide part of the context.
    """
    config = unwrap(decoder.model).config
    if decoder.cache is None or config._attn_implementation not in ("eager", "sdpa"):
        return False
    windows = _windows(decoder)
    if not _hides(decoder, nodes):
        return True
    everywhere = len(windows) == len(decoder.cache.layers)
    return len(set(windows)) == 1 and (everywhere or getattr(config, "layer_types", None) is not None)


def _windows(decoder: StepDecoder) -> list[int]:
    assert decoder.cache is not None
    return [layer.sliding_window for layer in decoder.cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]


def _hides(decoder: StepDecoder, nodes: int) -> bool:
    """Whether some layer's window is too short to show everything to every node."""
    assert decoder.cache is not None
    return any(kv.length(decoder.cache) + nodes >= window for window in _windows(decoder))


@dataclass
class LookAhead:
    """What the model says at every node, before any of them is kept.

    Attributes
    ----------
    tokens : (B, N).
    logits : (B, N, V) float32, what would follow each node.
    hidden : (B, N, D), the final hidden state at each node; None unless the decoder keeps hidden states.
    """

    decoder: StepDecoder
    tokens: Tensor
    logits: Tensor
    hidden: Tensor | None

    def accept(self, nodes: Tensor) -> None:
        """Keep a path of nodes in every row and forget the others; the decoder then stands after the path's last node.

        Parameters
        ----------
        nodes
            (B, P) node numbers from the top of the tree downwards; -1, on the left, where a row keeps fewer than P
            (its empty places become left padding of the whole row). Every row keeps at least one.
        """
        decoder, rows = self.decoder, torch.arange(len(nodes), device=nodes.device)
        if nodes.dim() != 2 or nodes.shape[1] < 1 or len(nodes) != len(self.tokens) or bool((nodes[:, -1] < 0).any()):
            raise ValueError("nodes must be (rows, at least 1) and name at least one node a row, -1 only on the left")
        if bool(((nodes[:, 1:] < 0) & (nodes[:, :-1] >= 0)).any()):
            raise ValueError("nodes has -1 behind a node: the empty places of a row stand on the left")
        context = decoder.input_ids.shape[1]
        columns = torch.arange(context + nodes.shape[1], device=nodes.device)
        # a row that keeps fewer nodes is moved to the right, so that its empty slots become left padding: between the
        # context and the nodes they would count in sliding windows
        moved = columns - (nodes < 0).sum(1, keepdim=True)
        chosen = (nodes + context).gather(1, (columns - context).clamp(min=0).expand(len(nodes), -1))
        order = torch.where(moved < context, moved.clamp(min=-1), chosen)
        assert decoder.cache is not None
        kv.gather(decoder.cache, order)
        ids = torch.cat([decoder.input_ids, self.tokens], 1)
        mask = torch.cat([decoder.attention_mask, torch.ones_like(self.tokens)], 1)
        decoder.input_ids = ids.gather(1, order.clamp(min=0)).masked_fill(order < 0, 0)
        decoder.attention_mask = kv.gather_mask(mask, order)
        decoder.logits = self.logits[rows, nodes[:, -1]]
        if self.hidden is not None:
            decoder.hidden = self.hidden[rows[:, None], nodes.clamp(min=0)]

    def reject(self) -> None:
        """Forget every node; the decoder stands where it stood."""
        assert self.decoder.cache is not None
        kv.crop(self.decoder.cache, self.tokens.shape[1])


def _additive(decoder: StepDecoder, visible: Tensor, depths: Tensor) -> Tensor | dict[str, Tensor]:
    """The mask as the model takes it: 0 where visible (B, N, t + N), else the lowest number; one for each kind of layer
    where windows hide part of it.
    """
    dtype = next(body(decoder.model).parameters()).dtype

    def additive(seen: Tensor) -> Tensor:
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]

    nodes = len(depths)
    if not _hides(decoder, nodes):
        return additive(visible)
    assert decoder.cache is not None
    windows, context = _windows(decoder), decoder.input_ids.shape[1]
    # a node stands where its depth puts it, not where its slot is
    places = torch.cat([torch.arange(context, device=depths.device), context + depths])
    near = places[None, :] > context + depths[:, None] - windows[0]
    # a layer shows the model no more than the window of the oldest of its new tokens
    windowed = additive((visible & near)[:, :, -(windows[0] - 1 + nodes) :])
    if len(windows) == len(decoder.cache.layers):
        return windowed
    return {"full_attention": additive(visible), "sliding_attention": windowed}


@torch.no_grad()
def look_ahead(decoder: StepDecoder, tokens: Tensor, parents: Sequence[int]) -> LookAhead:
    """Run a tree of N continuations of every row. ``accept`` or ``reject`` what comes back before the next step.

    Parameters
    ----------
    tokens
        (B, N) token ids of the nodes.
    parents
        (N,) as in :func:`tree_mask`, the same tree for every row.

    Raises
    ------
    ValueError
        Where :func:`can_look_ahead` says no, or the shapes do not match.
    """
    if not can_look_ahead(decoder, len(parents)):
        raise ValueError("this model and cache cannot run a tree (see can_look_ahead): repeat the rows instead")
    if tokens.shape != (decoder.input_ids.shape[0], len(parents)):
        raise ValueError(f"tokens must be {(decoder.input_ids.shape[0], len(parents))}, got {tuple(tokens.shape)}")
    device = decoder.input_ids.device
    sees, depths = (part.to(device) for part in tree_mask(parents))
    visible = torch.cat(
        [decoder.attention_mask.bool()[:, None, :].expand(-1, len(parents), -1), sees.expand(len(tokens), -1, -1)], 2
    )
    inputs: dict[str, Any] = {"input_ids": tokens.to(device), "use_cache": True, "past_key_values": decoder.cache}
    inputs["attention_mask"] = _additive(decoder, visible, depths)
    if decoder.takes_positions:
        inputs["position_ids"] = position_ids(decoder.attention_mask)[:, -1:] + 1 + depths
    logits, hidden = decoder.run(inputs, int(depths.max()) + 1)
    return LookAhead(decoder, tokens.to(device), logits, hidden)
