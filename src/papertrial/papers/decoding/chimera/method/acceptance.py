"""The lossless acceptance rule for sampled decoding: which of several drafted siblings is taken, if any."""

from collections.abc import Sequence

import torch
from torch import Tensor


def acceptance(p: Tensor, children: Sequence[int], q: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Chances with which siblings, tried in turn, are accepted, and what is drawn from where all are rejected.

    Parameters
    ----------
    p
        The base model's distribution (V,) of the token.
    children
        The drafted tokens, in the order of trial.
    q
        The distribution (V,) that each child was independently sampled from; None for children that were chosen without
        chance (the draft's best guesses), which must then differ from each other.

    Returns
    -------
    tuple
        Chances (k,) of accepting each child, given that those before it were rejected, and the distribution (V,) behind
        the last rejection (all zero where that cannot happen).

    Notes
    -----
    A sampled child x is accepted with min(1, p(x) / q(x)), and p becomes the normalised max(p - q, 0) where it is
    rejected. A chosen child is accepted with p(x), and p loses x where it is rejected: the same rule with q all on x.
    Either way the accepted or drawn token has the distribution p exactly.

    Raises
    ------
    ValueError
        Shapes that do not match, a repeated child without ``q``, or a child that ``q`` could not have given.
    """
    if p.dim() != 1 or (q is not None and q.shape != p.shape):
        raise ValueError(
            f"p must be (V,) and q alike, got {tuple(p.shape)} and {None if q is None else tuple(q.shape)}"
        )
    if q is None and len(set(children)) != len(children):
        raise ValueError("children repeats a token; give q, the distribution that they were sampled from")
    rest = p.double()
    chances = []
    for child in children:
        drafted = torch.zeros_like(rest).index_fill_(0, torch.tensor(child, device=p.device), 1.0)
        drafted = drafted if q is None else q.double()
        if not drafted[child] > 0:
            raise ValueError(f"the child {child} has probability 0 under q: it cannot have been sampled from it")
        chances.append(torch.clamp(rest[child] / drafted[child], max=1.0))
        rest = (rest - drafted).clamp(min=0.0)
        total = rest.sum()
        rest = rest / total if total > 0 else rest
    return torch.stack(chances) if chances else rest.new_zeros(0), rest
