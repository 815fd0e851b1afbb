"""The void rule: a block is void for a token if it lengthens the token's vector too little, given the blocks before.

With n_l the L2 norm of the residual vector after block l (n_0: before the first), the progress of block l is
d_l = n_l - n_(l-1), and block l is void if

    d_l < alpha * (max_{i<l} d_i - min_{i<l} d_i).

The progress is signed: a block that shortens the vector is void whatever the threshold. With one earlier block or none
the range is 0, so that the first two blocks are void only if they shorten the vector.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class VoidRule:
    """The threshold's dials.

    Parameters
    ----------
    alpha
        Share of the range of earlier progress that a block must add, in [0, 1]. Larger means more voids; at 0 a block
        is void only where it shortens the vector. The authors use 0.8.
    include_current
        Count the block's own progress into the range, which their text can be read to say and their code does not.
    range_from
        First block (from 1) whose progress counts. With 2 the first block is left out, whose jump from the embedding
        dwarfs all others in small models. The authors count from 1.

    Raises
    ------
    ValueError
        For a dial out of range.
    """

    alpha: float = 0.8
    include_current: bool = False
    range_from: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {self.alpha}")
        if self.range_from < 1:
            raise ValueError(f"range_from must be at least 1 (the first block), got {self.range_from}")


class ProgressRange:
    """Judges one block after the other in one forward pass; each token has its own range."""

    def __init__(self, rule: VoidRule) -> None:
        self.rule = rule
        self._block = 0
        self._high: Tensor | None = None
        self._low: Tensor | None = None

    def active(self, progress: Tensor) -> Tensor:
        """Whether the next block is active, bool of the shape of its ``progress``; then counts it into the range."""
        self._block += 1
        if self.rule.include_current:
            self._count(progress)
        threshold = torch.zeros_like(progress)
        if self._high is not None and self._low is not None:
            threshold = self.rule.alpha * (self._high - self._low)
        if not self.rule.include_current:
            self._count(progress)
        return ~(progress < threshold)

    def _count(self, progress: Tensor) -> None:
        if self._block >= self.rule.range_from:
            self._high = progress if self._high is None else torch.maximum(self._high, progress)
            self._low = progress if self._low is None else torch.minimum(self._low, progress)


def active_layers(norms: Tensor, alpha: float = 0.8, *, include_current: bool = False, range_from: int = 1) -> Tensor:
    """The rule on recorded norms.

    Parameters
    ----------
    norms
        (L + 1, ...): the norm of each token's vector before the first block and after each.
    alpha, include_current, range_from
        See :class:`VoidRule`.

    Returns
    -------
    Tensor
        Bool (L, ...), false where a block is void.

    Raises
    ------
    ValueError
        For fewer than two rows, norms that are not finite or negative, or a dial out of range.

    Examples
    --------
    >>> active_layers(torch.tensor([1.0, 5.0, 6.0, 6.5, 10.0]), alpha=0.5).tolist()
    [True, True, False, True]
    """
    rule = VoidRule(alpha, include_current, range_from)
    if norms.dim() == 0 or norms.shape[0] < 2:
        raise ValueError(f"norms must be (layers + 1, ...) with at least one layer, got shape {tuple(norms.shape)}")
    if not bool((norms.isfinite() & (norms >= 0)).all()):
        raise ValueError("norms must be finite and not negative")
    judged = ProgressRange(rule)
    return torch.stack([judged.active(progress) for progress in norms.diff(dim=0)])


def lengths(states: Tensor) -> Tensor:
    """L2 norms (...) of vectors (..., D), in float32 at least: half precision overflows in the square."""
    return torch.linalg.vector_norm(states, dim=-1, dtype=torch.promote_types(states.dtype, torch.float32))
