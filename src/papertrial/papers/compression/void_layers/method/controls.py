"""As many blocks left out per token as the rule leaves out, but chosen otherwise: what the rule has to beat.

All return bool (L, B, S), false where a block is to be left out; for :func:`skip_layers`.
"""

import torch
from torch import Tensor


def random_layers(dropped: Tensor, layers: int, *, generator: torch.Generator, spared: int = 0) -> Tensor:
    """Blocks drawn anew for every token, without replacement.

    Parameters
    ----------
    dropped
        (B, S) integers, blocks to leave out.
    layers
        L.
    spared
        The first blocks, left out only where no other is left: the void rule hardly ever reaches the first two, and
        with 2 this draws from where it does.

    Raises
    ------
    ValueError
        If ``dropped`` or ``spared`` does not lie in 0 .. L.
    """
    _check(dropped, layers)
    if not 0 <= spared <= layers:
        raise ValueError(f"spared must lie in 0 .. {layers}, got {spared}")
    keys = torch.rand(layers, *dropped.shape, generator=generator, device=generator.device).to(dropped.device)
    keys[:spared] += 1
    return _drop_smallest(keys, dropped)


def last_layers(dropped: Tensor, layers: int) -> Tensor:
    """The last blocks: each token leaves the model early, ``dropped`` (B, S) blocks before the end."""
    _check(dropped, layers)
    order = torch.arange(layers, device=dropped.device).view(layers, *[1] * dropped.dim())
    return order < layers - dropped


def least_turning_layers(dropped: Tensor, cosine: Tensor) -> Tensor:
    """The blocks that turn the vector least: those with the largest ``cosine`` (L, B, S) of input and output."""
    _check(dropped, cosine.shape[0])
    if cosine.shape[1:] != dropped.shape:
        raise ValueError(f"cosine is {tuple(cosine.shape)} and must be (layers, {tuple(dropped.shape)})")
    return _drop_smallest(-cosine, dropped)


def _drop_smallest(keys: Tensor, dropped: Tensor) -> Tensor:
    return keys.argsort(dim=0).argsort(dim=0) >= dropped


def _check(dropped: Tensor, layers: int) -> None:
    if dropped.is_floating_point() or (dropped.numel() and not 0 <= int(dropped.min()) <= int(dropped.max()) <= layers):
        raise ValueError(f"dropped must hold integers in 0 .. {layers}, the number of blocks")
