"""Measures of generated sequences, answers and confidences that several papers share.

Sequences are lists of anything hashable: token ids, or words.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def ngrams(sequence: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """All n-grams in order; empty if the sequence is shorter than ``n``."""
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return [tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)]


def rep_n(sequence: Sequence[Hashable], n: int) -> float:
    """Share of n-grams that repeat an earlier one, ``1 - |unique| / |all|``, in [0, 1]; 0 if there is no n-gram.

    Source: arXiv 2202.06417, section 4.2 (there in percent).
    """
    grams = ngrams(sequence, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def diversity(sequences: Sequence[Sequence[Hashable]]) -> float:
    """Mean over continuations of ``prod_{n=2..4} (1 - rep_n)``, in percent.

    Computed per continuation and then averaged: what two continuations share does not count as repetition.

    Raises
    ------
    ValueError
        If there is no continuation or an empty one, whose diversity is undefined.

    Source: arXiv 2202.06417, section 4.2.
    """
    if len(sequences) == 0:
        raise ValueError("sequences is empty: give at least one continuation")
    for index, sequence in enumerate(sequences):
        if len(sequence) == 0:
            raise ValueError(
                f"continuation {index} is empty: its diversity is undefined, leave it out and report how many"
            )
    products = [math.prod(1 - rep_n(sequence, n) for n in (2, 3, 4)) for sequence in sequences]
    return 100 * sum(products) / len(products)


def distinct_n(sequences: Sequence[Sequence[Hashable]], n: int) -> float:
    """Different n-grams over all n-grams, pooled over the sequences (arXiv 1510.03055, section 5.2), in [0, 1].

    Falls with the amount of text: compare equal numbers of tokens only.
    """
    grams = [gram for sequence in sequences for gram in ngrams(sequence, n)]
    if not grams:
        raise ValueError(f"no sequence has an n-gram of length {n}")
    return len(set(grams)) / len(grams)


def ngram_entropy(sequences: Sequence[Sequence[Hashable]], n: int = 1) -> float:
    """Entropy in bits of the pooled empirical n-gram distribution."""
    counts = Counter(gram for sequence in sequences for gram in ngrams(sequence, n))
    total = sum(counts.values())
    if total == 0:
        raise ValueError(f"no sequence has an n-gram of length {n}")
    return -sum(count / total * math.log2(count / total) for count in counts.values())


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no English articles, single spaces (the SQuAD rule, arXiv 1606.05250)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, gold: Sequence[str]) -> bool:
    """Whether the normalised answer equals one of the gold answers."""
    return normalise_answer(answer) in {normalise_answer(candidate) for candidate in _gold(gold)}


def token_f1(answer: str, gold: Sequence[str]) -> float:
    """Best F1 of the bags of words of the normalised answer and a gold answer; two empty answers agree."""
    words = normalise_answer(answer).split()
    best = 0.0
    for candidate in _gold(gold):
        target = normalise_answer(candidate).split()
        shared = sum((Counter(words) & Counter(target)).values())
        size = len(words) + len(target)
        best = max(best, 2 * shared / size if size else 1.0)
    return best


def _gold(gold: Sequence[str]) -> Sequence[str]:
    if isinstance(gold, str) or len(gold) == 0:
        raise ValueError(f"gold must be a list of at least one answer, got {gold!r}")
    return gold


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Probability that a positive has the higher score than a negative, ties counting half.

    Parameters
    ----------
    scores, labels
        (N,) finite numbers, and (N,) booleans or 0/1.
    """
    values, positive = _scores_and_labels(scores, labels)
    if positive.all() or not positive.any():
        raise ValueError("labels holds one class only: the area under the curve is undefined")
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    below = np.cumsum(counts) - counts
    ranks = below[place] + (counts[place] + 1) / 2
    wins = ranks[positive].sum() - positive.sum() * (positive.sum() + 1) / 2
    return float(wins / (positive.sum() * (~positive).sum()))


def expected_calibration_error(confidences: ArrayLike, correct: ArrayLike, bins: int = 10) -> float:
    """Mean gap between confidence and accuracy over equal bins of [0, 1], by bin size (arXiv 1706.04599, eq. 3)."""
    values, hit = _scores_and_labels(confidences, correct)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"confidences must lie in [0, 1], got {values.min()} .. {values.max()}")
    place = np.minimum((values * bins).astype(int), bins - 1)
    gaps = np.bincount(place, weights=values - hit, minlength=bins)
    return float(np.abs(gaps).sum() / len(values))


def _scores_and_labels(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    values, marks = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if values.ndim != 1 or values.shape != marks.shape or len(values) == 0:
        raise ValueError(f"scores and labels must be equally long and not empty, got {values.shape} and {marks.shape}")
    if not np.isfinite(values).all():
        raise ValueError("scores holds values that are not finite")
    if not np.isin(marks, (0, 1)).all():
        raise ValueError("labels must be booleans, or 0 and 1")
    return values, marks.astype(bool)


def jensen_shannon(p: ArrayLike, q: ArrayLike) -> NDArray[np.float64]:
    """Jensen-Shannon divergence in bits, in [0, 1], over the last axis of two arrays of distributions (..., K)."""
    p, q = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    for name, values in (("p", p), ("q", q)):
        if (values < 0).any() or not np.allclose(values.sum(-1), 1, atol=1e-4):
            raise ValueError(f"{name} must hold distributions: not negative and summing to 1 over the last axis")
    middle = (p + q) / 2

    def bits(values: NDArray[np.float64]) -> NDArray[np.float64]:
        safe = np.where(values > 0, values, 1.0)
        return np.asarray((values * np.log2(safe / np.where(values > 0, middle, 1.0))).sum(-1))

    return np.clip((bits(p) + bits(q)) / 2, 0.0, 1.0)
