"""The sink metric of arXiv 2410.10781 (section 3): how much attention a column of an attention map receives.

A column of an attention map is important if its token receives much attention from those that can see it. The mean
over the rows that can is what makes columns comparable: an even causal map gives its first column 1/T (1 + 1/2 + ... +
1/T) all the same, 0.074 at T = 64, because early rows have few columns to share between.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_EPS = 1e-8


def uniform_importance(length: int) -> Tensor:
    """Importance of each column (T,) when every row spreads its attention evenly over what it sees, float64.

    alpha_k = (1 / (T - k + 1)) (1/k + ... + 1/T): the yardstick for a map in which nothing is preferred.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    shares = 1.0 / torch.arange(1, length + 1, dtype=torch.float64)
    return shares.flip(0).cumsum(0).flip(0) / torch.arange(length, 0, -1)


def proxy_scores(attn: Tensor) -> Tensor:
    """|A_ij| / sum_j |A_ij|: what share each key has of a row (..., T, S) that need not sum to one.

    Of maps that do it is the map itself. It says how uneven a row is, not how large: where all weights are tiny it can
    name a sink that carries nothing, so look at the plain weights as well.
    """
    sizes = attn.abs()
    return sizes / (sizes.sum(-1, keepdim=True) + _EPS)


def column_importance(attn: Tensor, *, causal: bool = True) -> Tensor:
    """alpha_k = mean over the rows i that see column k of A_ik: (B, H, T, T) to (B, H, T).

    Parameters
    ----------
    attn
        Weights; rows are queries. In a causal map rows k..T see column k, in others all T rows do.

    Raises
    ------
    ValueError
        For maps that are not square or shorter than two tokens, that hold a NaN or an infinite weight, and for a causal
        one with weight above its diagonal.
    """
    if attn.ndim != 4 or attn.shape[-1] != attn.shape[-2]:
        raise ValueError(f"attn must be (B, H, T, T), got {tuple(attn.shape)}")
    length = attn.shape[-1]
    if length < 2:
        raise ValueError(f"attn must be of at least 2 tokens, got {length}")
    if not bool(attn.isfinite().all()):
        raise ValueError("attn holds NaN or infinite weights: the model's forward pass has overflowed")
    if not causal:
        return attn.mean(-2)
    if bool(attn.triu(1).any()):
        raise ValueError("attn has weight above the diagonal; of bidirectional attention pass causal=False")
    return attn.sum(-2) / torch.arange(length, 0, -1, device=attn.device)


def column_excess(attn: Tensor, *, causal: bool = True) -> Tensor:
    """How many times its even share a column receives: (B, H, T, T) to (B, H, T), 1 where nothing is preferred.

    The even share of column k is what :func:`column_importance` would give it if every row spread the sum of its own
    sizes evenly over the tokens that it sees. So weights need not sum to one and early columns have no advantage: an
    untrained sigmoid, which gives a half to every token, has an excess of 1 just as an untrained softmax. A head
    without any weight prefers nothing: 1.

    Raises
    ------
    ValueError
        What :func:`column_importance` refuses.
    """
    sizes = attn.abs()
    alpha = column_importance(sizes, causal=causal)
    length = attn.shape[-1]
    every = torch.full((length,), length, device=attn.device)
    visible = torch.arange(1, length + 1, device=attn.device) if causal else every
    spread = sizes.sum(-1) / visible  # (B, H, T), the mean weight of each row
    even = spread.flip(-1).cumsum(-1).flip(-1) / visible.flip(0) if causal else spread.mean(-1, keepdim=True)
    return torch.where(even > 0, alpha / even.clamp(min=torch.finfo(alpha.dtype).tiny), 1.0)


def sink_metric(
    attentions: Sequence[Tensor],
    eps: float = 0.3,
    positions: int | None = None,
    normalize: bool = False,
    *,
    causal: bool = True,
) -> Tensor:
    """Sink_k: in how many percent of (sample, layer, head) the importance of position k exceeds ``eps``, (T,).

    Parameters
    ----------
    attentions
        (B, H, T, T) per layer, as ``output_attentions`` gives them.
    eps
        Between 0 and 1; 0.3 in the paper.
    positions
        Look at the first so many tokens only (64 in the paper); causal maps are the same for a shorter text.
    normalize
        Judge :func:`proxy_scores` instead of the weights.

    Raises
    ------
    ValueError
        For no layers, ``eps`` outside (0, 1), fewer than two positions or more than there are, a cut through
        bidirectional maps, and all that :func:`column_importance` refuses.
    """
    check_eps(eps)
    if not attentions:
        raise ValueError("attentions is empty: give one map per layer")
    importances = []
    for attn in attentions:
        if positions is not None:
            attn = _first(attn, positions, causal)
        importances.append(column_importance(proxy_scores(attn) if normalize else attn, causal=causal))
    return percent_above(importances, eps)


def percent_above(importances: Sequence[Tensor], eps: float) -> Tensor:
    """In how many percent of samples, layers and heads alpha_k exceeds ``eps``: (B, H, T) per layer to (T,)."""
    return 100 * torch.cat([(alpha > eps).flatten(0, 1) for alpha in importances]).float().mean(0)


def check_eps(eps: float) -> None:
    """Raises ValueError unless the threshold lies between 0 and 1."""
    if not 0 < eps < 1:
        raise ValueError(f"eps must lie between 0 and 1, got {eps}")


def _first(attn: Tensor, positions: int, causal: bool) -> Tensor:
    length = attn.shape[-1]
    if not 2 <= positions <= length:
        raise ValueError(f"positions must lie in 2..{length}, the length of the maps; got {positions}")
    if not causal and positions < length:
        raise ValueError("bidirectional maps cannot be cut: their rows are spread over the whole text")
    return attn[..., :positions, :positions]
