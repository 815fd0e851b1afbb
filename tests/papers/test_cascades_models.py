import numpy as np
import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from families import DECODERS, VOCABULARY, random_ids, tiny_model, tiny_tokenizer
from papertrial.lm.generation import left_pad
from papertrial.lm.hooks import record
from papertrial.lm.tokenizers import byte_tokenizer
from papertrial.papers.decoding.cascades.method import (
    Cascade,
    PostHocDeferral,
    answer,
    answer_texts,
    chow_quantile,
    chow_sum,
    early_states,
    forward_flops,
)

PROMPTS = [[5, 9, 3, 22, 7, 41], [8, 2], [60, 11, 33, 4]]
TEXTS = ["the cat sat", "a fox", "then the dog came back.", "mat"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


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
        read = torch.cat([hidden[1][0, : len(prompt)].mean(0), hidden[1][0, len(prompt) - 1]])
        torch.testing.assert_close(together.early[row], read, atol=2e-5, rtol=1e-4)
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
            whole = model(
                input_ids=ids[row, None, : mask[row].sum()], decoder_input_ids=decoder, output_hidden_states=True
            )
        states = whole.decoder_hidden_states
        mean = torch.stack([out.scores[t][row] for t in range(stop)]).mean(0)  # the head is linear
        torch.testing.assert_close(model.lm_head(records.states[row]), mean, atol=1e-4, rtol=1e-4)
        early = torch.cat([whole.encoder_last_hidden_state[0].mean(0), states[1][0, 0]])
        torch.testing.assert_close(records.early[row], early, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_early_states_are_those_of_a_whole_pass_and_only_that_part_runs(family):
    model = tiny_model(family)
    ids, mask = left_pad(PROMPTS, 0)
    with record(model, ["resid_post"]) as seen, torch.no_grad():
        early_states(model, ids, mask, layer=2)
    early, ran = early_states(model, ids, mask, layer=1), []
    handles = [block.register_forward_hook(lambda *_: ran.append(1)) for block in _blocks(model)]
    assert torch.equal(early_states(model, ids, mask, layer=1), early)
    assert len(ran) == 1
    for handle in handles:
        handle.remove()
    states = seen["resid_post"][0]
    for row, prompt in enumerate(PROMPTS):
        expected = torch.cat([states[row, -len(prompt) :].mean(0), states[row, -1]])
        torch.testing.assert_close(early[row], expected)


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
    q_small, q_large = np.random.default_rng(0).random((2, 24))
    rule = PostHocDeferral("quantile+embed1+embed2", target="regression", steps=10, generator=generator())
    rule.fit(records, q_small, q_large)
    out = Cascade(small, large, rule, rate=0.0, **settings).generate(ids)
    torch.testing.assert_close(out.scores, rule.score(records))
    alone = forward_flops(small, records.prompt_lengths, records.lengths)
    assert out.cost.tolist() == (alone + forward_flops(large, records.prompt_lengths, layer=1)).tolist()


# -- texts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_texts_are_answered_one_by_one_whatever_the_batch(kind):
    model, tokenizer = (tiny_model("gpt2") if kind == "decoder" else tiny_t5()), tiny_tokenizer()
    other, others_words = tiny_model("llama", seed=1, vocab_size=260), byte_tokenizer()
    made = answer_texts(
        model, tokenizer, TEXTS, max_new_tokens=6, large=other, large_tokenizer=others_words, batch_size=3
    )
    for row, text in enumerate(TEXTS):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        alone = answer(model, ids, max_new_tokens=6, eos_token_id=2)
        assert made.records.tokens[row] == alone.tokens[0]
        torch.testing.assert_close(made.records.log_probs[row], alone.log_probs[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(made.records.states[row], alone.states[0], atol=2e-5, rtol=1e-4)
        assert made.texts[row] == tokenizer.decode(alone.tokens[0], skip_special_tokens=True)
        look = torch.tensor([others_words(text)["input_ids"]])
        early = early_states(other, look, torch.ones_like(look))[0]
        torch.testing.assert_close(made.records.early[row], early, atol=2e-5, rtol=1e-4)
        assert made.look_lengths[row] == look.shape[1]


def test_the_models_own_end_tokens_are_the_default():
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    free = answer_texts(model, tokenizer, TEXTS, max_new_tokens=8, eos_token_id=[])
    end = free.records.tokens[2][3]
    model.generation_config.eos_token_id = [end, 2]
    ended = answer_texts(model, tokenizer, TEXTS, max_new_tokens=8).records.tokens
    for short, long in zip(ended, free.records.tokens, strict=True):
        stops = [n for n, token in enumerate(long) if token in (end, 2)]
        assert short == long[: stops[0] + 1 if stops else 8]
    assert len(ended[2]) <= 4
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="names an end token"):
        answer_texts(model, tokenizer, TEXTS, max_new_tokens=8)


@pytest.mark.parametrize("features", ["quantile", "quantile+embed1+embed2"])
def test_a_cascade_of_two_tokenizers_answers_in_texts(features):
    small, words = tiny_model("gpt2"), tiny_tokenizer()
    large, large_words = tiny_model("llama", seed=1, vocab_size=260, num_hidden_layers=3), byte_tokenizer()
    texts = [*TEXTS, "over the lazy dog", "quick", "on the mat", "cat!"]
    first = answer_texts(
        small, words, texts, max_new_tokens=5, large=large if "embed2" in features else None,
        large_tokenizer=large_words,
    )  # fmt: skip
    second = answer_texts(large, large_words, texts, max_new_tokens=5)
    q_small, q_large = np.random.default_rng(0).random((2, 8))
    rule = PostHocDeferral(features, steps=5, generator=generator()).fit(first.records, q_small, q_large)
    out = Cascade(small, large, rule, rate=0.5, max_new_tokens=5, tokenizers=(words, large_words)).answer(texts)
    torch.testing.assert_close(out.scores, rule.score(first.records), atol=1e-5, rtol=1e-4)
    assert out.deferred.sum() == 4
    read, wrote = first.records.prompt_lengths, first.records.lengths
    cost = forward_flops(small, read, wrote)
    cost += out.deferred * forward_flops(large, second.records.prompt_lengths, second.records.lengths)
    if "embed2" in features:
        cost += forward_flops(large, torch.tensor([len(large_words(text)["input_ids"]) for text in texts]), layer=1)
    assert out.cost.tolist() == cost.tolist()
    for row, deferred in enumerate(out.deferred.tolist()):
        chosen = second if deferred else first
        assert (out.texts[row], out.outputs[row]) == (chosen.texts[row], chosen.records.tokens[row])


def test_models_that_share_their_words_may_differ_in_padding_of_their_embeddings():
    small, large, words = tiny_model("llama"), tiny_model("llama", seed=1, vocab_size=80), tiny_tokenizer()
    ids, settings = random_ids(4, 5), {"rate": 0.5, "max_new_tokens": 3}
    out = Cascade(small, large, _sums, tokenizers=(words, tiny_tokenizer()), **settings).generate(ids)
    assert out.texts is None
    assert out.deferred.sum() == 2
    with pytest.raises(ValueError, match="67 and 80 tokens"):
        Cascade(small, large, _sums, **settings).generate(ids)
    with pytest.raises(ValueError, match="tokenizers differ"):
        Cascade(small, large, _sums, tokenizers=(words, byte_tokenizer()), **settings).generate(ids)


def _sums(records):
    return chow_sum(records.log_probs)


def test_a_start_token_is_asked_for_where_none_is_known():
    model = tiny_t5()
    model.config.decoder_start_token_id = 7
    model.generation_config.decoder_start_token_id = None
    states = early_states(model, random_ids(2, 4), torch.ones(2, 4))
    assert torch.isfinite(states).all()
    model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        early_states(model, random_ids(2, 4), torch.ones(2, 4))


def test_bad_requests_are_refused_with_a_reason():
    model, words = tiny_model("llama"), tiny_tokenizer()
    for chooser, reason in (
        ({}, "either threshold or rate"), ({"rate": 0.5, "threshold": 0.0}, "either"), ({"rate": 2.0}, "rate must lie"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            Cascade(model, model, _sums, max_new_tokens=3, **chooser)
    for rule in (lambda records: torch.zeros(1), lambda records: torch.full((2,), torch.nan)):
        with pytest.raises(ValueError, match="one finite score for each of 2"):
            Cascade(model, model, rule, rate=0.5, max_new_tokens=3).generate(random_ids(2, 3))
    with pytest.raises(ValueError, match="tokenizers is None"):
        Cascade(model, model, _sums, rate=0.5, max_new_tokens=3).answer(TEXTS)
    for prompts, reason in (
        ("a text", "must be a sequence"),
        ([], "must be a sequence"),
        ([""], r"prompts\[0\] has no"),
    ):
        with pytest.raises(ValueError, match=reason):
            answer_texts(model, words, prompts, max_new_tokens=3)
    with pytest.raises(ValueError, match="batch_size"):
        answer_texts(model, words, TEXTS, max_new_tokens=3, batch_size=0)
    with pytest.raises(ValueError, match="layer must lie between 1 and 2"):
        early_states(model, random_ids(1, 3), torch.ones(1, 3), layer=3)
    with pytest.raises(ValueError, match="with a token in every row"):
        answer(tiny_t5(), random_ids(2, 3), torch.tensor([[1, 1, 0], [0, 0, 0]]), max_new_tokens=3)
    with pytest.raises(ValueError, match="must be"):
        answer(tiny_t5(), torch.zeros(0, 3, dtype=torch.long), max_new_tokens=3)
