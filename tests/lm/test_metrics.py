"""Measures against closed forms, brute force and scipy."""

import math

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import mannwhitneyu

from papertrial.lm.metrics import (
    auroc,
    distinct_n,
    diversity,
    exact_match,
    expected_calibration_error,
    jensen_shannon,
    ngram_entropy,
    rep_n,
    token_f1,
)


def test_rep_n_counts_repeats_of_earlier_ngrams():
    assert rep_n("abab", 2) == pytest.approx(1 / 3)  # ab ba ab
    assert rep_n("abc", 2) == 0
    assert rep_n("a", 2) == 0


def test_diversity_is_100_without_repeats_and_the_closed_form_for_one_repeated_token():
    assert diversity(["abcde"]) == pytest.approx(100)
    length = 10
    assert diversity([[7] * length]) == pytest.approx(100 / math.prod(length - n + 1 for n in (2, 3, 4)))


def test_diversity_is_averaged_over_continuations_and_not_pooled():
    assert diversity(["abcde", "abcde"]) == pytest.approx(100)
    assert diversity(["abcde", [7] * 10]) == pytest.approx((100 + diversity([[7] * 10])) / 2)
    with pytest.raises(ValueError, match="continuation 1 is empty"):
        diversity(["ab", ""])
    with pytest.raises(ValueError, match="at least one"):
        diversity([])


def test_distinct_n_and_entropy_pool_the_sequences():
    assert distinct_n(["ab", "ab"], 1) == 0.5
    assert distinct_n(["abc", "ab"], 2) == pytest.approx(2 / 3)
    assert ngram_entropy(["abcd", "abcd"]) == pytest.approx(2)
    assert ngram_entropy(["aaaa"]) == 0
    for measure in (distinct_n, ngram_entropy):
        with pytest.raises(ValueError, match="length 3"):
            measure(["ab"], 3)


def test_answers_are_compared_after_normalisation():
    assert exact_match("The Eiffel-Tower!", ["eiffeltower"])
    assert not exact_match("Eiffel", ["tower", "eiffel tower"])
    assert token_f1("the red car", ["a red bus", "car park"]) == pytest.approx(0.5)
    assert token_f1("the", ["a"]) == 1.0
    assert token_f1("red red", ["red blue"]) == 0.5
    with pytest.raises(ValueError, match="list"):
        exact_match("a", "a")


def test_auroc_equals_the_mann_whitney_statistic_with_ties():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 6, 200), rng.random(200) < 0.3
    statistic = mannwhitneyu(scores[labels], scores[~labels]).statistic
    assert auroc(scores, labels) == pytest.approx(statistic / (labels.sum() * (~labels).sum()))
    assert auroc([1, 1, 1], [0, 1, 0]) == 0.5
    with pytest.raises(ValueError, match="one class"):
        auroc([1, 2], [1, 1])
    with pytest.raises(ValueError, match="finite"):
        auroc([math.nan, 2], [0, 1])


def test_calibration_error_equals_the_definition_bin_by_bin():
    rng = np.random.default_rng(1)
    confidence, correct = rng.random(300), rng.random(300) < 0.5
    total = 0.0
    for b in range(7):
        inside = (confidence >= b / 7) & (confidence < (b + 1) / 7)
        total += inside.sum() / 300 * abs(correct[inside].mean() - confidence[inside].mean())
    assert expected_calibration_error(confidence, correct, bins=7) == pytest.approx(total)
    assert expected_calibration_error([1.0, 1.0], [1, 1]) == 0
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        expected_calibration_error([1.2], [1])


def test_jensen_shannon_equals_scipy_in_bits_with_zeros():
    rng = np.random.default_rng(2)
    p, q = rng.dirichlet(np.ones(5), 8), rng.dirichlet(np.ones(5), 8)
    p[0], q[0] = [1, 0, 0, 0, 0], [0, 1, 0, 0, 0]
    np.testing.assert_allclose(jensen_shannon(p, q), jensenshannon(p, q, base=2, axis=-1) ** 2, atol=1e-12)
    assert jensen_shannon(p[0], q[0]) == 1
    assert jensen_shannon(p[1], p[1]) == 0
    with pytest.raises(ValueError, match="distributions"):
        jensen_shannon([0.2, 0.2], [0.5, 0.5])
