import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from papertrial.papers.decoding.cascades.method import (
    PostHocDeferral,
    Records,
    auc_df,
    chow_average,
    chow_quantile,
    chow_sum,
    cost_curve,
    deferral_curve,
    length_bias_report,
    oracle_score,
    quantile_features,
    random_auc,
    relative_gain,
    threshold_at,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_log_probs(count, seed=0):
    source = generator(seed)
    lengths = torch.randint(1, 12, (count,), generator=source).tolist()
    return [torch.rand(length, generator=source).log() for length in lengths]


def some_records(count, seed=0, **columns):
    log_probs = some_log_probs(count, seed)
    states = torch.randn(count, 4, generator=generator(seed + 1))
    early = torch.randn(count, 3, generator=generator(seed + 2))
    tokens = [[1] * len(row) for row in log_probs]
    return Records(
        tokens, log_probs, **({"states": states, "early": early} | columns), prompt_lengths=torch.ones(count)
    )


# -- confidence ----------------------------------------------------------------------------------------------------


def test_the_sum_is_the_length_times_the_mean_and_quantiles_are_torchs():
    log_probs = some_log_probs(50)
    lengths = torch.tensor([len(row) for row in log_probs])
    torch.testing.assert_close(chow_sum(log_probs), lengths * chow_average(log_probs))
    for alpha in (0.0, 0.13, 0.5, 0.9, 1.0):
        expected = torch.stack([row.double().quantile(alpha) for row in log_probs])
        torch.testing.assert_close(chow_quantile(log_probs, alpha), expected)
    torch.testing.assert_close(chow_quantile(log_probs, 0.0), torch.stack([row.min() for row in log_probs]).double())
    torch.testing.assert_close(chow_quantile(log_probs, 1.0), torch.stack([row.max() for row in log_probs]).double())


def test_features_are_quantiles_sum_mean_and_on_request_the_length():
    log_probs = some_log_probs(20)
    features = quantile_features(log_probs, [0.0, 0.3], length=True)
    expected = [chow_quantile(log_probs, 0.0), chow_quantile(log_probs, 0.3), chow_sum(log_probs)]
    expected += [chow_average(log_probs), torch.tensor([float(len(row)) for row in log_probs]).double()]
    torch.testing.assert_close(features, torch.stack(expected, 1))
    assert quantile_features(log_probs).shape == (20, 13)


def test_sum_and_mean_can_both_rank_two_answers_wrongly_in_their_own_way():
    """A: long, every token likely. B: short, one token a guess. C: as B, with many sure tokens behind it."""
    a = torch.full((30,), 0.9).log()
    b = torch.tensor([0.3, 0.99]).log()
    c = torch.tensor([0.3] + [0.99] * 20).log()
    total, mean, least = chow_sum([a, b, c]), chow_average([a, b, c]), chow_quantile([a, b, c], 0.0)
    assert total[0] < total[1]  # the sum defers the long safe answer before the guess
    assert mean[2] > mean[0]  # the mean keeps the guess that hides among sure tokens
    assert least[0] > least[1]
    assert least[1] == least[2]


# -- curves --------------------------------------------------------------------------------------------------------


def some_qualities(count, seed=0):
    source = np.random.default_rng(seed)
    return source.normal(size=count), source.random(count), source.random(count)


def test_the_curve_is_the_quality_of_deferring_one_input_after_another():
    score, small, large = some_qualities(30)
    rates, quality = deferral_curve(score, small, large)
    order = np.argsort(score)
    for n in range(31):
        assert rates[n] == n / 30
        expected = np.concatenate([large[order[:n]], small[order[n:]]]).mean()
        assert quality[n] == pytest.approx(expected, abs=1e-12)
    assert quality[0] == small.mean()
    assert quality[-1] == large.mean()
    assert auc_df(score, small, large) == pytest.approx(np.trapezoid(quality, rates))


def test_ties_are_the_mean_over_all_orders():
    score, small, large = np.array([1.0, 0.0, 1.0, 1.0, 0.0]), *some_qualities(5)[1:]
    curves = []
    for noise in itertools.permutations(range(5)):
        curves.append(deferral_curve(score + 1e-6 * np.array(noise), small, large)[1])
    np.testing.assert_allclose(deferral_curve(score, small, large)[1], np.mean(curves, 0), atol=1e-12)


def test_areas_of_chance_oracle_and_reversal():
    score, small, large = some_qualities(60)
    chance = random_auc(small, large)
    assert auc_df(np.zeros(60), small, large) == pytest.approx(chance, abs=1e-12)
    assert chance == pytest.approx((small.mean() + large.mean()) / 2)
    area = auc_df(score, small, large)
    assert auc_df(-score, small, large) == pytest.approx(2 * chance - area, abs=1e-12)
    best = auc_df(oracle_score(small, large), small, large)
    for seed in range(20):
        assert auc_df(np.random.default_rng(seed).normal(size=60), small, large) <= best
    assert relative_gain(score, small, large) == pytest.approx(100 * (area - chance) / chance)
    assert relative_gain(np.zeros(60), small, large) == pytest.approx(0.0, abs=1e-9)


def test_only_the_order_of_scores_matters():
    score, small, large = some_qualities(40)
    np.testing.assert_array_equal(
        deferral_curve(score, small, large)[1], deferral_curve(np.exp(3 * score), small, large)[1]
    )


def test_costs_add_up_from_the_small_model_to_both():
    score, small, large = some_qualities(10)
    cheap, dear, extra = np.full(10, 1.0), np.linspace(5, 6, 10), np.full(10, 0.5)
    cost, quality = cost_curve(score, small, large, cheap, dear, extra)
    order = np.argsort(score)
    for n in range(11):
        assert cost[n] == pytest.approx((10 * 1.5 + dear[order[:n]].sum()) / 10)
    np.testing.assert_array_equal(quality, deferral_curve(score, small, large)[1])
    assert cost_curve(score, small, large, cheap, dear)[0][0] == 1.0


def test_the_length_report_finds_a_rule_that_defers_the_long():
    lengths = np.repeat([2, 4, 8, 16], 25)
    small, large = np.tile([1.0, 0.0], 50), np.ones(100)  # the gain has nothing to do with the length
    report = length_bias_report(-lengths, lengths, small, large, rate=0.5)
    assert report.counts.tolist() == [25, 25, 25, 25]
    assert report.rule.tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(report.oracle, [12 / 25, 13 / 25, 12 / 25, 13 / 25])
    assert report.in_vain.tolist() == [0, 0, 1, 1]
    best = length_bias_report(oracle_score(small, large), lengths, small, large, rate=0.5)
    assert best.in_vain.tolist() == [0, 0, 0, 0]
    tied = length_bias_report(np.zeros(100), lengths, small, large, rate=0.3)
    np.testing.assert_allclose(tied.rule, 0.3)
    assert length_bias_report(-lengths, np.ones(100), small, large).counts.tolist() == [100]


def test_deferral_in_vain_is_counted_among_what_the_large_model_does_not_improve():
    score, small, large = some_qualities(200)
    lengths = np.random.default_rng(1).integers(1, 9, 200)
    report = length_bias_report(score, lengths, small, large, rate=0.25)
    below = score < np.sort(score)[50]
    for least, most, share in zip(report.edges[:-1], report.edges[1:], report.in_vain, strict=True):
        rows = (lengths > least if least > report.edges[0] else lengths >= least) & (lengths <= most)
        rows &= large <= small
        assert share == pytest.approx(below[rows].mean())
    assert np.isnan(length_bias_report(score, lengths, np.zeros(200), np.ones(200)).in_vain).all()


def test_a_threshold_defers_the_share_it_was_set_for():
    score = some_qualities(40)[0]
    for deferred in (0, 1, 13, 39, 40):
        assert (score < threshold_at(score, deferred / 40)).sum() == deferred
    tied = [0.0, 1.0, 1.0, 1.0, 2.0]
    assert threshold_at(tied, 0.3) == 0.5  # one of five is nearer to 1.5 than four are
    assert threshold_at(tied, 0.7) == 1.5
    fresh = np.random.default_rng(7).normal(size=4000)
    # of 40 scores: their quantile's share among others of the same kind has a standard deviation below 0.08
    assert (fresh < threshold_at(score, 0.3)).mean() == pytest.approx(0.3, abs=0.24)


# -- the learned rule ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["regression", "classification"])
def test_a_rule_that_sees_the_gain_becomes_the_oracle(target):
    source = np.random.default_rng(0)
    small, large = (source.integers(0, 2, 400).astype(float) for _ in range(2))
    gain = torch.tensor(large - small)[:, None]
    phi = torch.cat([gain, torch.randn(400, 3, generator=generator()).double()], 1)
    rule = PostHocDeferral(target=target, steps=150, lr=1e-2, generator=generator(1)).fit_features(
        phi[:300], small[:300], large[:300]
    )
    score = rule.score_features(phi[300:])
    area = auc_df(score, small[300:], large[300:])
    best = auc_df(oracle_score(small[300:], large[300:]), small[300:], large[300:])
    # the classifier is not told how to order what the large model does not improve: ties and losses
    losses = {"regression": 0.002, "classification": 0.06}
    assert best - losses[target] <= area <= best


def test_labels_that_have_nothing_to_do_with_the_features_give_the_area_of_chance():
    areas = []
    for seed in range(4):
        source = np.random.default_rng(seed)
        small, large = (source.integers(0, 2, 900).astype(float) for _ in range(2))
        records = some_records(900, seed)
        rule = PostHocDeferral("quantile+embed1+embed2", steps=60, generator=generator(seed))
        rule.fit(records.rows(range(300)), small[:300], large[:300])
        score = rule.score(records.rows(range(300, 900)))
        areas.append(auc_df(score, small[300:], large[300:]) - random_auc(small[300:], large[300:]))
    # a random order of 600 gains of variance 1/2 has an area with standard deviation (1/24)^(1/2) / 600^(1/2)
    assert abs(np.mean(areas)) < 4 * (1 / 24 / 600 / 4) ** 0.5


def test_the_target_follows_the_qualities_unless_it_is_given():
    records, (_, grade, better) = some_records(60), some_qualities(60)
    right = (grade > 0.5).astype(float)
    for small, large, target, expected in (
        (right, 1 - right, None, "classification"), (grade, better, None, "regression"),
        (right, np.zeros(60), None, "regression"), (np.zeros(60), np.ones(60), None, "regression"),
        (grade, better, "classification", "classification"), (right, 1 - right, "regression", "regression"),
    ):  # fmt: skip
        rule = PostHocDeferral(target=target, steps=5, generator=generator()).fit(records, small, large)
        assert rule.fitted_target == expected
        assert rule.target == target


@pytest.mark.parametrize("target", ["regression", "classification"])
def test_a_saved_rule_scores_as_before(target, tmp_path):
    records, (_, small, large) = some_records(60), some_qualities(60)
    rule = PostHocDeferral(
        "quantile+embed1", target=target, alphas=(0.0, 0.5), length=True, hidden=(8, 4), steps=20, generator=generator()
    )
    with pytest.raises(ValueError, match="not been fitted"):
        rule.save(tmp_path / "rule.safetensors")
    rule.fit(records, small, large).save(tmp_path / "rule.safetensors")
    again = PostHocDeferral.load(tmp_path / "rule.safetensors")
    assert torch.equal(again.score(records), rule.score(records))
    assert (again.features, again.fitted_target) == ("quantile+embed1", target)
    (tmp_path / "text").write_text("not a rule")
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    save_file({"mean": torch.zeros(2)}, tmp_path / "part.safetensors", {"deferral": '{"target": "regression"}'})
    for name in ("text", "other.safetensors", "part.safetensors"):
        with pytest.raises(ValueError, match="not a saved deferral rule"):
            PostHocDeferral.load(tmp_path / name)


@pytest.mark.parametrize(
    ("features", "reads_states", "reads_early"),
    [("quantile", False, False), ("quantile+embed1", True, False), ("quantile+embed1+embed2", True, True)],
)
def test_a_rule_reads_what_its_name_says(features, reads_states, reads_early):
    records, (_, small, large) = some_records(60), some_qualities(60)
    rule = PostHocDeferral(features, target="regression", steps=30, generator=generator()).fit(records, small, large)
    before = rule.score(records)
    other = Records(records.tokens, records.log_probs, records.states + 1, records.prompt_lengths, records.early)
    assert torch.equal(rule.score(other), before) != reads_states
    other = Records(records.tokens, records.log_probs, records.states, records.prompt_lengths, records.early + 1)
    assert torch.equal(rule.score(other), before) != reads_early
    assert rule.needs_large == reads_early
    assert rule.phi(records).shape[1] == 13 + 4 * reads_states + 3 * reads_early


def test_a_rule_is_reproducible_and_leaves_the_global_generator_alone():
    records, (_, small, large) = some_records(60), some_qualities(60)
    before = torch.get_rng_state()
    one, two = (PostHocDeferral(target="regression", steps=30, generator=generator(3)) for _ in range(2))
    assert torch.equal(one.fit(records, small, large).score(records), two.fit(records, small, large).score(records))
    assert torch.equal(torch.get_rng_state(), before)


def test_records_can_be_joined_and_picked():
    one, two = some_records(4, 0), some_records(3, 5)
    joined = Records.join([one, two])
    assert len(joined) == 7
    picked = joined.rows([6, 0])
    assert torch.equal(picked.log_probs[0], two.log_probs[2])
    assert torch.equal(picked.early, torch.stack([two.early[2], one.early[0]]))
    assert picked.lengths.tolist() == [len(two.tokens[2]), len(one.tokens[0])]


def test_bad_requests_are_refused_with_a_reason():
    log_probs = some_log_probs(4)
    for alpha in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\]"):
            chow_quantile(log_probs, alpha)
        with pytest.raises(ValueError, match="alphas must be"):
            quantile_features(log_probs, [alpha])
    with pytest.raises(ValueError, match="answer 1 has log-prob"):
        chow_sum([torch.zeros(1), torch.zeros(0)])
    with pytest.raises(ValueError, match="not finite"):
        chow_average([torch.tensor([0.0, -torch.inf])])
    score, small, large = some_qualities(6)
    with pytest.raises(ValueError, match="q_large has the shape"):
        deferral_curve(score, small, large[:5])
    with pytest.raises(ValueError, match="score holds a number that is not finite"):
        auc_df(np.full(6, np.nan), small, large)
    with pytest.raises(ValueError, match="undefined"):
        relative_gain(score, small, -small)
    with pytest.raises(ValueError, match="rate must lie"):
        length_bias_report(score, score, small, large, rate=2)
    with pytest.raises(ValueError, match="buckets"):
        length_bias_report(score, score, small, large, buckets=0)
    records = some_records(12)
    _, small, large = some_qualities(12)
    for settings, reason in (
        ({"features": "entropy"}, "features must be"), ({"target": "rank"}, "target must be"),
        ({"held_out": 1.0}, "held_out"), ({"hidden": ()}, "hidden"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            PostHocDeferral(**settings, generator=generator())
    for held_out in (0.01, 0.95):
        with pytest.raises(ValueError, match="at least 1 and 2 are needed"):
            PostHocDeferral(held_out=held_out, generator=generator()).fit(records, small, large)
    with pytest.raises(ValueError, match="lower lr"):
        PostHocDeferral(lr=1e30, steps=1, generator=generator()).fit(records, small, large)
    for rate in (-0.1, 1.1):
        with pytest.raises(ValueError, match="rate must lie"):
            threshold_at(score, rate)
    with pytest.raises(ValueError, match="score has the shape"):
        threshold_at([], 0.5)
    rule = PostHocDeferral(target="classification", generator=generator(), steps=5)
    with pytest.raises(ValueError, match="has not been fitted"):
        rule.score(records)
    with pytest.raises(ValueError, match="never better on these"):
        rule.fit(records, np.ones(12), np.zeros(12))
    with pytest.raises(ValueError, match="12 records need as many qualities"):
        rule.fit(records, small[:11], large)
    with pytest.raises(ValueError, match="at least 8 records"):
        rule.fit(records.rows(range(4)), small[:4], large[:4])
    with pytest.raises(ValueError, match="fitted on 13 features, got 2"):
        rule.fit(records, small, large).score_features(torch.zeros(1, 2))
    blind = some_records(12, early=None)
    with pytest.raises(ValueError, match="records with large"):
        PostHocDeferral("quantile+embed1+embed2", generator=generator()).fit(blind, small, large)
    with pytest.raises(ValueError, match="different lengths"):
        some_records(12, states=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="1 of 2 have early states"):
        Records.join([records, blind])
    with pytest.raises(ValueError, match="parts is empty"):
        Records.join([])
