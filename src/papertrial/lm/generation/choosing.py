"""From logits to a token: temperature, top-k, nucleus, and a draw that uses one random number per row."""

import torch
from torch import Tensor


def truncate(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Logits (..., V) divided by the temperature, then cut to the ``top_k`` best and to the nucleus of mass ``top_p``.

    The nucleus is the smallest set of most probable tokens whose mass reaches ``top_p`` (arXiv 1904.09751, section
    3.1), taken after ``top_k``. Removed tokens get -inf; the best token always stays. Ties with the k-th value stay
    too.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}; for the most probable token use greedy")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        worst = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < worst, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        outside = probs.cumsum(-1) - probs >= top_p
        outside[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
    return logits


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One token per row of logits (N, V) by inverting the cumulative distribution at ``uniforms`` (N,) in [0, 1).

    A row uses one random number and nothing else, so that its token does not depend on the rest of the batch.
    """
    probs = logits.double().softmax(-1)
    cumulative = probs.cumsum(-1)
    target = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, target, right=True)[:, 0]
    # rounding can carry the target to the very end of the table, behind the last token that has any mass
    last = probs.shape[-1] - 1 - (probs.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(token, last)
