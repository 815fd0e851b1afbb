"""Deferral curves: what a cascade's quality is at every share of calls to the large model, and what it costs."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def _columns(*named: tuple[str, ArrayLike]) -> list[Array]:
    columns = [np.asarray(values, dtype=np.float64) for _, values in named]
    for (name, _), column in zip(named, columns, strict=True):
        if column.ndim != 1 or len(column) == 0 or len(column) != len(columns[0]):
            raise ValueError(
                f"{name} has the shape {column.shape}; {named[0][0]} has {columns[0].shape}: one row of both"
            )
        if not np.isfinite(column).all():
            raise ValueError(f"{name} holds a number that is not finite")
    return columns


def _spread(order: Array, values: Array) -> Array:
    """``values`` in the order of ``order``, those of equal rank replaced by their mean: the mean over all orders."""
    ranks, group = np.unique(order, return_inverse=True)
    means = np.bincount(group, values) / np.bincount(group)
    return np.repeat(means, np.bincount(group, minlength=len(ranks)))


def deferral_curve(score: ArrayLike, q_small: ArrayLike, q_large: ArrayLike) -> tuple[Array, Array]:
    """Quality of the cascade where the share r of inputs with the lowest scores goes to the large model.

    Parameters
    ----------
    score
        Confidence in the small model's answers (N,); ties are deferred in random order, and the mean is returned.
    q_small, q_large
        Quality of both models' answers (N,).

    Returns
    -------
    tuple
        Rates (N + 1,) from 0 to 1, and the mean quality (N + 1,) there: the small model's at 0, the large one's at 1.

    Raises
    ------
    ValueError
        Columns of different lengths, empty ones, or numbers that are not finite.

    References
    ----------
    arXiv 2404.10136.
    """
    ranks, small, large = _columns(("score", score), ("q_small", q_small), ("q_large", q_large))
    gains = np.concatenate([[0.0], np.cumsum(_spread(ranks, large - small))])
    quality = (small.sum() + gains) / len(small)
    quality[-1] = large.mean()  # not its rounding
    return np.arange(len(small) + 1) / len(small), quality


def auc_df(score: ArrayLike, q_small: ArrayLike, q_large: ArrayLike) -> float:
    """Area under the deferral curve (trapezoids); in units of the quality."""
    rates, quality = deferral_curve(score, q_small, q_large)
    return float(np.trapezoid(quality, rates))


def random_auc(q_small: ArrayLike, q_large: ArrayLike) -> float:
    """The area of deferral by chance: halfway between the two models."""
    small, large = _columns(("q_small", q_small), ("q_large", q_large))
    return float(small.mean() + large.mean()) / 2


def relative_gain(score: ArrayLike, q_small: ArrayLike, q_large: ArrayLike) -> float:
    """What the area gains over deferral by chance, in percent of the latter."""
    chance = random_auc(q_small, q_large)
    if chance == 0:
        raise ValueError("the area of random deferral is 0: a gain relative to it is undefined")
    return 100 * (auc_df(score, q_small, q_large) - chance) / chance


def oracle_score(q_small: ArrayLike, q_large: ArrayLike) -> Array:
    """The score (N,) that defers first where the large model gains most: no rule has a larger area."""
    small, large = _columns(("q_small", q_small), ("q_large", q_large))
    return small - large


def cost_curve(
    score: ArrayLike,
    q_small: ArrayLike,
    q_large: ArrayLike,
    cost_small: ArrayLike,
    cost_large: ArrayLike,
    overhead: ArrayLike | None = None,
) -> tuple[Array, Array]:
    """Mean cost and quality (N + 1,) of the cascade at every rate of deferral.

    Parameters
    ----------
    cost_small, cost_large
        Of answering each input (N,), in any one unit. The small model always answers.
    overhead
        What the rule's features cost on top for each input (N,): the part of the large model that is run to decide.
    """
    free = np.zeros(len(np.atleast_1d(np.asarray(score)))) if overhead is None else overhead
    ranks, small, large, cheap, dear, extra = _columns(
        ("score", score), ("q_small", q_small), ("q_large", q_large), ("cost_small", cost_small),
        ("cost_large", cost_large), ("overhead", free),
    )  # fmt: skip
    spent = np.concatenate([[0.0], np.cumsum(_spread(ranks, dear))])
    _, quality = deferral_curve(ranks, small, large)
    return (cheap.sum() + extra.sum() + spent) / len(ranks), quality


class LengthBias(NamedTuple):
    """Deferral by length of the small model's answer: ``edges`` (B + 1,) in tokens, and (B,) how many inputs fall into
    each bucket, the shares of them that the rule and the oracle defer, and the share that the rule defers of those on
    which the large model is no better (nan where there are none)."""

    edges: Array
    counts: Array
    rule: Array
    oracle: Array
    in_vain: Array


def length_bias_report(
    score: ArrayLike,
    lengths: ArrayLike,
    q_small: ArrayLike,
    q_large: ArrayLike,
    *,
    rate: float = 0.5,
    buckets: int = 4,
) -> LengthBias:
    """How often answers of each length are deferred at a fixed overall rate, beside the oracle's choice.

    Parameters
    ----------
    lengths
        Tokens of the small model's answers (N,).
    rate
        Overall share that is deferred; ties at the threshold count by their share.
    buckets
        Groups of about equal size, by length; equal lengths stay together.

    Raises
    ------
    ValueError
        A rate outside [0, 1], fewer than one bucket, or columns that do not match.
    """
    ranks, sizes, small, large = _columns(
        ("score", score), ("lengths", lengths), ("q_small", q_small), ("q_large", q_large)
    )
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"rate must lie in [0, 1], got {rate}")
    if buckets < 1:
        raise ValueError(f"buckets must be at least 1, got {buckets}")
    upper = np.unique(np.quantile(sizes, np.arange(1, buckets + 1) / buckets, method="inverted_cdf"))
    edges = np.concatenate([[sizes.min()], upper])  # each bucket up to its upper edge, that included
    group = np.searchsorted(upper, sizes, side="left")
    counts = np.bincount(group, minlength=len(upper)).astype(np.float64)

    def shares(order: Array, among: Array) -> Array:
        with np.errstate(invalid="ignore"):
            deferred = np.bincount(group, _deferred(order, rate) * among, minlength=len(counts))
            return deferred / np.bincount(group, among, minlength=len(counts))

    every, vain = np.ones(len(ranks)), (large <= small).astype(np.float64)
    return LengthBias(edges, counts, shares(ranks, every), shares(small - large, every), shares(ranks, vain))


def threshold_at(score: ArrayLike, rate: float) -> float:
    """The threshold below which a share ``rate`` of the scores lies: calibrates a cascade on inputs like those to come.

    Halfway between two neighbouring scores; of equal scores at the border, all or none are below it, whichever comes
    nearer to the rate.

    Raises
    ------
    ValueError
        A rate outside [0, 1], no scores, or one that is not finite.
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"rate must lie in [0, 1], got {rate}")
    (scores,) = _columns(("score", score))
    values, counts = np.unique(scores, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])  # how many are deferred by each of the possible borders
    borders = np.concatenate([values[:1] - 1.0, (values[:-1] + values[1:]) / 2, values[-1:] + 1.0])
    return float(borders[np.abs(below - rate * len(scores)).argmin()])


def _deferred(score: Array, rate: float) -> Array:
    """Chance (N,) that each input is among the ``rate`` lowest scores; between 0 and 1 only for ties at the border."""
    _, group, counts = np.unique(score, return_inverse=True, return_counts=True)
    wanted = rate * len(score)
    before = np.cumsum(counts) - counts
    return np.clip((wanted - before) / counts, 0.0, 1.0)[group]
