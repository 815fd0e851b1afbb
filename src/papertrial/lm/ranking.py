"""Measures of rankings with known relevant items."""

import math
from collections.abc import Collection, Hashable, Sequence


def reciprocal_rank(ranking: Sequence[Hashable], relevant: Collection[Hashable], k: int = 10) -> float:
    """1 / rank of the first relevant item among the first k, 0 if there is none; its mean over queries is MRR@k."""
    _check(ranking, relevant, k)
    return next((1.0 / rank for rank, item in enumerate(ranking[:k], start=1) if item in relevant), 0.0)


def recall_at(ranking: Sequence[Hashable], relevant: Collection[Hashable], k: int) -> float:
    """Share of the relevant items that stand among the first k."""
    _check(ranking, relevant, k)
    return len(set(ranking[:k]) & set(relevant)) / len(set(relevant))


def ndcg_at(ranking: Sequence[Hashable], relevant: Collection[Hashable], k: int = 10) -> float:
    """Discounted gain of the first k (1 / log2(rank + 1) for each relevant item) over that of the best ranking."""
    _check(ranking, relevant, k)
    gain = sum(1 / math.log2(rank + 1) for rank, item in enumerate(ranking[:k], start=1) if item in relevant)
    return gain / sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(set(relevant))) + 1))


def _check(ranking: Sequence[Hashable], relevant: Collection[Hashable], k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not relevant:
        raise ValueError("relevant is empty: a query without an answer cannot be scored")
    if len(set(ranking[:k])) != len(ranking[:k]):
        raise ValueError("ranking names an item twice")
