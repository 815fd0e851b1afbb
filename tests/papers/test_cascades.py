import itertools

import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from families import DECODERS, VOCABULARY, random_ids, tiny_model
from papertrial.lm.generation import left_pad
from papertrial.lm.hooks import record
from papertrial.papers.decoding.cascades import world
from papertrial.papers.decoding.cascades.method import (
    Cascade,
    PostHocDeferral,
    Records,
    answer,
    auc_df,
    chow_average,
    chow_quantile,
    chow_sum,
    cost_curve,
    deferral_curve,
    first_layer_states,
    forward_flops,
    length_bias_report,
    oracle_score,
    quantile_features,
    random_auc,
    relative_gain,
)

PROMPTS = [[5, 9, 3, 22, 7, 41], [8, 2], [60, 11, 33, 4]]


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


def tiny_t5(seed=0, layers=2):
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=44, num_layers=layers, num_heads=4, pad_token_id=0,
        eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5ForConditionalGeneration(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model.eval()


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


# -- answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
def test_log_probs_are_those_of_the_scores_that_generate_saw(family):
    model = tiny_model(family)
    ids, mask = left_pad(PROMPTS, 0)
    free = answer(model, ids, mask, max_new_tokens=8)
    end = free.tokens[1][3]  # ends some rows early
    records = answer(model, ids, mask, max_new_tokens=8, eos_token_id=end)
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=8, eos_token_id=end, pad_token_id=0,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    for row in range(3):
        new = out.sequences[row, ids.shape[1] :].tolist()
        stop = new.index(end) + 1 if end in new else len(new)
        assert records.tokens[row] == new[:stop]
        expected = [float(out.scores[t][row].log_softmax(-1)[new[t]]) for t in range(stop)]
        torch.testing.assert_close(records.log_probs[row], torch.tensor(expected), atol=2e-5, rtol=1e-4)
    assert min(records.lengths.tolist()) < 8
    assert records.prompt_lengths.tolist() == [6, 2, 4]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_states_are_the_mean_over_the_answer_alone_whatever_the_batch(family):
    model = tiny_model(family)
    ids, mask = left_pad(PROMPTS, 0)
    end = answer(model, ids, mask, max_new_tokens=8).tokens[1][3]
    together = answer(model, ids, mask, max_new_tokens=8, eos_token_id=end, large=model)
    for row, prompt in enumerate(PROMPTS):
        alone = answer(model, torch.tensor([prompt]), max_new_tokens=8, eos_token_id=end, large=model)
        whole = torch.tensor([prompt + alone.tokens[0]])
        with torch.no_grad():
            hidden = model(whole, output_hidden_states=True).hidden_states
        expected = hidden[-1][0, len(prompt) - 1 : -1].mean(0)
        torch.testing.assert_close(together.states[row], expected, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(together.early[row], hidden[1][0, len(prompt) - 1], atol=2e-5, rtol=1e-4)
        assert together.tokens[row] == alone.tokens[0]


def test_an_encoder_decoder_is_scored_as_generate_scores_it():
    model = tiny_t5()
    ids, mask = torch.tensor([[5, 9, 3, 22], [8, 4, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    free = answer(model, ids, mask, max_new_tokens=7)
    end = free.tokens[0][4]
    records = answer(model, ids, mask, max_new_tokens=7, eos_token_id=end, large=model)
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=7, eos_token_id=end, pad_token_id=0,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    for row in range(2):
        new = out.sequences[row, 1:].tolist()
        stop = new.index(end) + 1 if end in new else len(new)
        assert records.tokens[row] == new[:stop]
        expected = [float(out.scores[t][row].log_softmax(-1)[new[t]]) for t in range(stop)]
        torch.testing.assert_close(records.log_probs[row], torch.tensor(expected), atol=2e-5, rtol=1e-4)
        decoder = torch.tensor([[0, *new[: stop - 1]]])
        with torch.no_grad():
            states = model(
                input_ids=ids[row, None], attention_mask=mask[row, None], decoder_input_ids=decoder,
                output_hidden_states=True,
            ).decoder_hidden_states  # fmt: skip
        torch.testing.assert_close(records.states[row], states[-1][0].mean(0), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(records.early[row], states[1][0, 0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_early_states_are_those_of_a_whole_pass_and_only_that_part_runs(family):
    model = tiny_model(family)
    ids, mask = left_pad(PROMPTS, 0)
    with record(model, ["resid_post"]) as seen, torch.no_grad():
        first_layer_states(model, ids, mask, layer=2)
    early, ran = first_layer_states(model, ids, mask, layer=1), []
    handles = [block.register_forward_hook(lambda *_: ran.append(1)) for block in _blocks(model)]
    assert torch.equal(first_layer_states(model, ids, mask, layer=1), early)
    assert len(ran) == 1
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(early, seen["resid_post"][0][:, -1])


def _blocks(model):
    from papertrial.lm.anatomy import anatomy

    return [block.module for block in anatomy(model).blocks]


def test_work_is_counted_by_weights_and_tokens():
    model = tiny_model("llama")
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 44
    prompts, answers = torch.tensor([5, 3]), torch.tensor([2, 4])
    expected = 2.0 * (2 * layer * (prompts + answers) + 67 * 32 * answers)
    assert forward_flops(model, prompts, answers).tolist() == expected.tolist()
    assert forward_flops(model, prompts, layer=1).tolist() == (2.0 * layer * prompts).tolist()
    t5 = tiny_t5()
    attention, feed = 4 * 32 * 32, 2 * 32 * 44
    bias = 32 * 4  # of positions, in the first layer of each half
    read, made = 2 * (attention + feed) + bias, 2 * (2 * attention + feed) + bias
    whole = 2.0 * (read * prompts + made * answers + 67 * 32 * answers)
    assert forward_flops(t5, prompts, answers).tolist() == whole.tolist()


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
    tied = length_bias_report(np.zeros(100), lengths, small, large, rate=0.3)
    np.testing.assert_allclose(tied.rule, 0.3)
    assert length_bias_report(-lengths, np.ones(100), small, large).counts.tolist() == [100]


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


# -- the cascade ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_a_cascade_gives_each_input_the_answer_of_the_model_that_the_rule_chose(kind):
    if kind == "decoder":
        small, large = tiny_model("llama"), tiny_model("llama", seed=1, num_hidden_layers=3)
        ids, mask = left_pad(PROMPTS, 0)
    else:
        small, large = tiny_t5(), tiny_t5(1, layers=3)
        ids, mask = random_ids(3, 5), torch.ones(3, 5, dtype=torch.long)
    settings = {"max_new_tokens": 6, "eos_token_id": 2}
    first, second = (answer(model, ids, mask, **settings) for model in (small, large))
    least = chow_quantile(first.log_probs, 0.0)
    middle = float(least.sort().values[1])
    for chooser, expected in (
        ({"threshold": middle}, least < middle),
        ({"rate": 2 / 3}, least <= middle),
        ({"rate": 0.0}, least > 0),
        ({"rate": 1.0}, least <= 0),
    ):
        cascade = Cascade(small, large, lambda records: chow_quantile(records.log_probs, 0.0), **chooser, **settings)
        out = cascade.generate(ids, mask)
        assert torch.equal(out.deferred, expected)
        torch.testing.assert_close(out.scores, least)
        for row in range(3):
            assert out.outputs[row] == (second if expected[row] else first).tokens[row]
        cost = forward_flops(small, first.prompt_lengths, first.lengths)
        cost = cost + expected * forward_flops(large, second.prompt_lengths, second.lengths)
        assert out.cost.tolist() == cost.tolist()


def test_a_look_into_the_large_model_is_charged():
    small, large = tiny_model("llama"), tiny_model("llama", seed=1, num_hidden_layers=3)
    ids = random_ids(24, 5)
    settings = {"max_new_tokens": 6, "eos_token_id": 2}
    records = answer(small, ids, large=large, **settings)
    _, q_small, q_large = some_qualities(24)
    rule = PostHocDeferral("quantile+embed1+embed2", target="regression", steps=10, generator=generator())
    rule.fit(records, q_small, q_large)
    out = Cascade(small, large, rule, rate=0.0, **settings).generate(ids)
    torch.testing.assert_close(out.scores, rule.score(records))
    alone = forward_flops(small, records.prompt_lengths, records.lengths)
    assert out.cost.tolist() == (alone + forward_flops(large, records.prompt_lengths, layer=1)).tolist()


def test_records_can_be_joined_and_picked():
    one, two = some_records(4, 0), some_records(3, 5)
    joined = Records.join([one, two])
    assert len(joined) == 7
    picked = joined.rows([6, 0])
    assert torch.equal(picked.log_probs[0], two.log_probs[2])
    assert torch.equal(picked.early, torch.stack([two.early[2], one.early[0]]))
    assert picked.lengths.tolist() == [len(two.tokens[2]), len(one.tokens[0])]


# -- the world -----------------------------------------------------------------------------------------------------


def test_answers_of_the_world_are_right():
    made = world.World(50, generator())
    names = {tuple(key): name for key, name in zip(made.keys, made.names, strict=True)}
    assert len(names) == 50
    capitals: set[str] = set()
    lower = dict(zip(range(46, 51), (20 + ord(vowel) - ord("a") for vowel in "aeiou"), strict=True))
    for question in made.questions(300, generator(1)):
        assert question.prompt[-1] == world.SEP
        assert question.answer[-1] == world.EOS
        body, result = world.text(question.prompt[1:-1]), world.text(question.answer)
        if question.task == "compare":
            a, b = int(body[:3]), int(body[3:])
            assert result == ("<" if a < b else ">" if a > b else "=")
        elif question.task == "recite":
            a, b = body[1:].split("+")
            letters = result[:-2]
            assert int(result[-2:]) == int(a) + int(b)
            assert letters.lower() == "abcdefghijklmnopqrstuvwxyz"[ord(body[0]) - ord("a") :]
            capitals |= set(letters) - set(letters.lower())
            ordinary = [lower.get(token, token) for token in question.answer]
            assert world.same(question.answer, ordinary)
            assert not world.same(question.answer, [*question.answer[:-2], 10, 10, 10])
        else:
            key = [ord(letter) - ord("a") for letter in body]
            assert result == "".join(chr(ord("a") + letter) for letter in names[tuple(key)])
    parts = [made.questions(400, generator(3), ["recall"], share=(k, 3)) for k in range(3)]
    asked = [{tuple(q.prompt) for q in part} for part in parts]
    assert sum(map(len, asked)) == len(set.union(*asked)) == 50
    kept = [world.reserved(question) for question in made.questions(3000, generator(4), ["compare", "recite"])]
    assert 0.2 < sum(kept) / 3000 < 0.3
    lengths = {len(q.answer) for q in made.questions(600, generator(2), ["recite"])}
    assert {min(lengths), max(lengths)} == {5, 29}
    assert capitals == set("AEIOU")


def test_packed_batches_teach_the_answers_alone_and_keep_questions_apart():
    made = world.World(20, generator())
    questions = made.questions(50, generator(1))
    batches = world.training_batches(questions, 4, 48)
    whole = iter(questions)
    model = tiny_model("llama")
    for batch in batches:
        total, count = 0.0, 0
        for ids, labels, positions in zip(*(batch[name].tolist() for name in batch), strict=True):
            starts = [n for n, place in enumerate(positions) if place == 0 and ids[n] != world.PAD]
            for start in starts:
                question = next(whole)
                length = len(question.prompt) + len(question.answer)
                assert ids[start : start + length] == question.prompt + question.answer
                assert labels[start : start + length] == [-100] * len(question.prompt) + question.answer
                assert positions[start : start + length] == list(range(length))
                with torch.no_grad():
                    logits = model(torch.tensor([ids[start : start + length]])).logits[0].log_softmax(-1)
                for place in range(len(question.prompt), length):
                    total -= float(logits[place - 1, ids[start + place]])
                    count += 1
        with torch.no_grad():
            loss = world.answer_loss(model, batch)
        assert int(loss.weight) == count
        assert float(loss.total) == pytest.approx(total, rel=1e-4)
    with pytest.raises(ValueError, match="does not fit into rows of 4"):
        world.training_batches(questions, 4, 4)
    with pytest.raises(ValueError, match="and a batch has 4"):
        world.training_batches(questions[:3], 4, 48)


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
    rule = PostHocDeferral(generator=generator(), steps=5)
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
    with pytest.raises(ValueError, match="parts is empty"):
        Records.join([])
    model, other = tiny_model("llama"), tiny_model("llama", vocab_size=50)
    for settings, reason in (
        ({}, "either threshold or rate"), ({"rate": 0.5, "threshold": 0.0}, "either"), ({"rate": 2.0}, "rate must lie"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            Cascade(model, model, rule, max_new_tokens=3, **settings)
    with pytest.raises(ValueError, match="67 and 50 tokens"):
        Cascade(model, other, rule, rate=0.5, max_new_tokens=3)
    with pytest.raises(ValueError, match="layer must lie between 1 and 2"):
        first_layer_states(model, random_ids(1, 3), torch.ones(1, 3), layer=3)
    for facts in (0, 26**3 + 1):
        with pytest.raises(ValueError, match="facts must lie"):
            world.World(facts, generator())
    with pytest.raises(ValueError, match="tasks must be"):
        world.World(5, generator()).questions(3, generator(), ["sing"])
    with pytest.raises(ValueError, match="share must be"):
        world.World(5, generator()).questions(3, generator(), share=(2, 2))
