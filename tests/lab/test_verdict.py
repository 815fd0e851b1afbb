import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from papertrial.lab.statistics import t_interval
from papertrial.lab.verdict import judge


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=12))
def test_interval_is_students_t(values):
    interval = t_interval(values)
    spread = scipy.stats.sem(values)
    expected = scipy.stats.t.ppf(0.975, len(values) - 1) * spread
    assert interval.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert interval.high - interval.mean == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert interval.mean - interval.low == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_interval_covers_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3.0, 2.0, (2000, 5))
    covered = sum(i.low <= 3.0 <= i.high for i in map(t_interval, draws.tolist()))
    assert abs(covered / 2000 - 0.95) < 0.015  # three standard errors of a proportion


def test_one_value_has_no_interval():
    assert t_interval([2.0]).low == -math.inf


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_interval_refuses_what_is_no_number(values):
    with pytest.raises(ValueError, match="value"):
        t_interval(values)


def test_upheld_needs_the_whole_interval_above_the_margin(claim, make_evidence):
    assert judge(claim, make_evidence({"plain": [0, 0, 0], "added": [2, 2.1, 1.9]})).word == "upheld"
    assert judge(claim, make_evidence({"plain": [0, 0, 0], "added": [2, 4, 0.5]})).word == "undecided"


def test_contradicted_when_the_whole_interval_is_below_the_margin(claim, make_evidence):
    judged = judge(claim, make_evidence({"plain": [0, 0, 0], "added": [0.5, 0.51, 0.49]}))
    assert judged.word == "contradicted"
    assert "margin of 1 points" in judged.reason


def test_lower_is_better_flips_the_sign(claim, make_evidence):
    lower = claim.model_copy(update={"better": "lower"})
    evidence = make_evidence({"plain": [5, 5, 5], "added": [2, 2.1, 1.9]})
    assert judge(lower, evidence).word == "upheld"
    assert judge(lower, evidence).effect.mean == pytest.approx(3.0)
    assert judge(claim, evidence).word == "contradicted"


def test_pairs_cancel_what_seeds_share(claim, make_evidence):
    shared = [0.0, 50.0, 100.0]
    judged = judge(claim, make_evidence({"plain": shared, "added": [s + 2 for s in shared]}))
    assert judged.word == "upheld"
    assert judged.effect.high - judged.effect.low == pytest.approx(0.0)


def test_relative_effect_is_in_percent_of_the_baseline(claim, make_evidence):
    relative = claim.model_copy(update={"relative": True, "margin": 5.0})
    judged = judge(relative, make_evidence({"plain": [-10, -10, -10], "added": [-9, -9, -9]}))
    assert judged.effect.mean == pytest.approx(10.0)
    assert judged.word == "upheld"
    zero = judge(relative, make_evidence({"plain": [0, 1, 1], "added": [1, 1, 1]}))
    assert zero.word == "undecided"


def test_a_control_must_be_beaten_as_well(claim, make_evidence):
    controlled = claim.model_copy(update={"controls": ("control",)})
    arms = {"plain": [0, 0, 0], "added": [2, 2.1, 1.9]}
    assert judge(controlled, make_evidence(arms | {"control": [0, 0, 0.1]})).word == "upheld"
    beaten = judge(controlled, make_evidence(arms | {"control": [3, 3, 3.1]}))
    assert beaten.word == "contradicted"
    assert "control" in beaten.reason


def test_no_worse_allows_a_loss_within_the_margin_and_any_gain(claim, make_evidence):
    no_worse = claim.model_copy(update={"kind": "no_worse"})
    level = {"plain": [5, 5, 5]}
    assert judge(no_worse, make_evidence(level | {"added": [4.9, 4.8, 4.9]})).word == "upheld"
    assert judge(no_worse, make_evidence(level | {"added": [9, 9, 9.5]})).word == "upheld"
    assert judge(no_worse, make_evidence(level | {"added": [3.5, 3.6, 3.5]})).word == "contradicted"
    assert judge(no_worse, make_evidence(level | {"added": [4.9, 3.5, 5.5]})).word == "undecided"


def test_exact_claims_hold_within_their_tolerance_in_every_seed(claim, make_evidence):
    exact = claim.model_copy(update={"kind": "exact", "margin": 0.0, "tolerance": 0.01})
    assert judge(exact, make_evidence({"plain": [1, 1, 1], "added": [1, 1.009, 0.995]})).word == "upheld"
    assert judge(exact, make_evidence({"plain": [1, 1, 1], "added": [1, 1, 1.02]})).word == "contradicted"


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_too_few_seeds_smoke_and_failed_preconditions_are_undecided(claim, make_evidence, better):
    claim = claim.model_copy(update={"better": better})
    clear = {"plain": [0.0, 0.0, 0.0], "added": [9.0, 9.0, 9.0]}
    assert judge(claim, make_evidence({a: v[:2] for a, v in clear.items()})).word == "undecided"
    assert judge(claim, make_evidence(clear, scale="smoke")).word == "undecided"
    failed = judge(claim, make_evidence(clear, undecided="the base model is too weak"))
    assert failed.word == "undecided"
    assert "too weak" in failed.reason


def test_a_seed_without_the_claimed_arm_is_undecided_not_dropped(claim, make_evidence):
    evidence = make_evidence({"plain": [0, 0, 0, 0], "added": [2, 2, 2, 2]})
    del evidence.trials[1].metrics["added"]
    assert judge(claim, evidence).word == "undecided"
