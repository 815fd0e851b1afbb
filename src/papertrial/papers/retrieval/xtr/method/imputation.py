"""What a query token is taken to give to a document of which it retrieved nothing.

The paper takes the last retrieved score, the tightest bound that retrieval gives for free. It compares a constant of
zero, and mentions regression without saying of what on what: the power law here is this project's reading of it.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Imputation = Literal["last", "zero", "mean", "power_law"]


def missing_similarities(scores: Tensor, usable: Tensor, document_of: Tensor, impute: Imputation) -> Tensor:
    """The imputed score m_i of each query token.

    Parameters
    ----------
    scores
        (n, k') retrieved similarities, best first.
    usable
        (n, k') bool, False where nothing was retrieved; at least one True in each row.
    document_of
        (N,) owner of each token of the index, numbered from 0; its size and number of documents are what
        ``power_law`` needs, see :func:`expected_rank`.
    impute
        ``last``: the lowest retrieved score, an upper bound of every missing one (the paper's). ``zero``. ``mean`` of
        the retrieved scores. ``power_law``: see :func:`power_law`.

    Returns
    -------
    Tensor
        (n,) float32.

    References
    ----------
    arXiv 2304.01982, section 3.2 (bound) and table 5 (ablation).
    """
    retrieved = usable.sum(1)
    choices: dict[str, Callable[[], Tensor]] = {
        "last": lambda: _last(scores, usable),
        "zero": lambda: torch.zeros(len(scores)),
        "mean": lambda: scores.masked_fill(~usable, 0).sum(1) / retrieved,
        "power_law": lambda: power_law(
            scores, usable, expected_rank(retrieved, len(document_of), int(document_of.max()) + 1)
        ),
    }
    if impute not in choices:
        raise ValueError(f"impute must be one of {', '.join(map(repr, get_args(Imputation)))}, got {impute!r}")
    return choices[impute]()


def expected_rank(retrieved: Tensor, tokens: int, documents: int) -> Tensor:
    """Rank at which the best token of a document that was not retrieved is expected.

    A document of average length m = tokens / documents has its tokens anywhere among the ranks after the last retrieved
    one; the first of m places drawn from R without replacement is expected at (R + 1) / (m + 1).

    Parameters
    ----------
    retrieved
        (n,) tokens that each query token retrieved.
    tokens, documents
        Size of the index.

    Returns
    -------
    Tensor
        (n,) float64, above ``retrieved``.
    """
    return retrieved + (tokens - retrieved + 1).double() / (tokens / documents + 1)


def power_law(scores: Tensor, usable: Tensor, rank: Tensor) -> Tensor:
    """The score at a rank that was not retrieved, from a power law through the retrieved ones.

    For each query token, log s_r = a + b log r is fitted by least squares to its scores s_r at ranks r = 1, 2, ... and
    read at ``rank``. No missing score is above the last retrieved one, so the last is taken where the law is above it.
    It is taken also where no law can be fitted: fewer than two scores, or one that is not positive (leaving such scores
    out would bend the law upwards).

    Parameters
    ----------
    scores, usable
        As in :func:`missing_similarities`.
    rank
        (n,) rank to read the law at, at least 1.

    Returns
    -------
    Tensor
        (n,) float32, never above the last retrieved score.
    """
    if rank.shape != scores.shape[:1] or not bool((rank >= 1).all()):
        raise ValueError(f"rank must be ({len(scores)},) and at least 1, got {tuple(rank.shape)}: {rank.tolist()[:5]}")
    last = _last(scores, usable)
    count = usable.sum(1)
    fits = (count >= 2) & (last > 0)
    used = usable & fits[:, None]
    x = usable.cumsum(1).clamp(min=1).double().log()  # a gap takes no rank
    y = scores.double().masked_fill(~used, 1).log()
    mean_x, mean_y = ((values * used).sum(1) / count for values in (x, y))
    apart = (x - mean_x[:, None]) * used
    # the ranks of two scores differ, so the sum of squares is zero only where nothing is fitted
    slope = (apart * (y - mean_y[:, None])).sum(1) / apart.square().sum(1).masked_fill(~fits, 1)
    law = (mean_y + slope * (rank.double().log() - mean_x)).exp().float()
    return torch.where(fits, law.minimum(last), last)


def _last(scores: Tensor, usable: Tensor) -> Tensor:
    return scores.masked_fill(~usable, torch.inf).amin(1)
