"""Confidence in a generated answer from its tokens' log-probabilities: high means keep, the lowest are deferred."""

from collections.abc import Sequence

import torch
from torch import Tensor

ALPHAS = tuple(n / 10 for n in range(11))
"""The quantiles that are fed to the learned rule: the least probable token, the deciles, the most probable one."""


def _checked(log_probs: Sequence[Tensor]) -> list[Tensor]:
    for n, row in enumerate(log_probs):
        if row.dim() != 1 or len(row) == 0:
            raise ValueError(
                f"answer {n} has log-probabilities of shape {tuple(row.shape)}; one token at least is needed"
            )
        if not bool(torch.isfinite(row).all()):
            raise ValueError(f"answer {n} has a log-probability that is not finite: score it without warped logits")
    return [row.double() for row in log_probs]


def chow_sum(log_probs: Sequence[Tensor]) -> Tensor:
    """Log-probability (N,) of each whole answer; ``log_probs`` holds one tensor (n_i,) per answer, end token included.

    Raises
    ------
    ValueError
        An empty answer, or a log-probability that is not finite; so do the other scores.
    """
    return torch.stack([row.sum() for row in _checked(log_probs)]) if len(log_probs) else torch.zeros(0).double()


def chow_average(log_probs: Sequence[Tensor]) -> Tensor:
    """Mean log-probability (N,) per token."""
    return torch.stack([row.mean() for row in _checked(log_probs)]) if len(log_probs) else torch.zeros(0).double()


def chow_quantile(log_probs: Sequence[Tensor], alpha: float) -> Tensor:
    """The ``alpha``-quantile (N,) of the tokens' log-probabilities, interpolated linearly; 0 is the least of them.

    References
    ----------
    arXiv 2404.10136.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    return _quantiles(_checked(log_probs), torch.tensor([alpha], dtype=torch.float64))[:, 0]


def quantile_features(log_probs: Sequence[Tensor], alphas: Sequence[float] = ALPHAS, *, length: bool = False) -> Tensor:
    """Features (N, A + 2) for a learned rule: A quantiles, sum and mean; and the number of tokens, if ``length``."""
    if not alphas or not all(0.0 <= alpha <= 1.0 for alpha in alphas):
        raise ValueError(f"alphas must be one or more numbers in [0, 1], got {list(alphas)}")
    rows = _checked(log_probs)
    columns = [
        _quantiles(rows, torch.tensor(list(alphas), dtype=torch.float64)),
        chow_sum(rows)[:, None],
        chow_average(rows)[:, None],
    ]
    if length:
        columns.append(torch.tensor([float(len(row)) for row in rows], dtype=torch.float64)[:, None])
    return torch.cat(columns, 1)


def _quantiles(rows: Sequence[Tensor], alphas: Tensor) -> Tensor:
    """(N, A), padded answers sorted all at once."""
    if not rows:
        return torch.zeros(0, len(alphas), dtype=torch.float64)
    ordered = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=torch.inf).sort(1).values
    place = alphas.to(ordered) * torch.tensor([[len(row) - 1] for row in rows]).to(ordered)  # (N, A)
    below = place.floor().long()
    low, high = ordered.gather(1, below), ordered.gather(1, place.ceil().long())
    return low + (high - low) * (place - below)
