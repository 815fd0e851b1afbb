"""Decoders against model.generate, against themselves without a cache, and against the laws they sample from."""

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from families import CORE, DECODERS, VOCABULARY, left_padded, random_ids, tiny_model, tiny_tokenizer
from papertrial.lm.generation import (
    StepDecoder,
    beam,
    draw,
    evaluating,
    greedy,
    left_pad,
    position_ids,
    sample,
    truncate,
)
from papertrial.lm.scoring import scored_positions, token_log_probs


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_positions_start_at_the_first_real_token():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]


def test_left_pad_puts_the_padding_left_and_takes_lists_and_tensors():
    ids, mask = left_pad([[5, 6, 7], torch.tensor([8])], pad_id=9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        left_pad([[1], []], pad_id=0)
    with pytest.raises(ValueError, match="at least one"):
        left_pad([], pad_id=0)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_equals_generate_token_for_token_with_left_padding(family, use_cache):
    model = tiny_model(family)
    ids, mask = left_padded(4, 7)
    ours = greedy(model, ids, mask, max_new_tokens=10, use_cache=use_cache)
    theirs = model.generate(
        ids, attention_mask=mask, max_new_tokens=10, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    assert torch.equal(ours.sequences, theirs)
    assert ours.mask.all()
    assert not ours.finished.any()


@pytest.mark.parametrize("family", CORE)
def test_a_left_padded_row_continues_as_it_does_alone(family):
    model = tiny_model(family)
    prompts = [random_ids(1, n, seed=n)[0] for n in (2, 5, 8)]
    batch = greedy(model, *left_pad(prompts, 0), max_new_tokens=6)
    for row, prompt in enumerate(prompts):
        assert torch.equal(batch.tokens[row], greedy(model, prompt[None], max_new_tokens=6).tokens[0])


def test_rows_stop_at_their_own_end_token_and_are_padded_after_it():
    model = tiny_model("llama")
    ids, mask = left_padded(6, 7)
    free = greedy(model, ids, mask, max_new_tokens=8)
    ends = [int(free.tokens[0, 2]), int(free.tokens[1, 5])]
    stopped = greedy(model, ids, mask, max_new_tokens=8, eos_token_id=ends, pad_token_id=50)
    for row in range(6):
        hits = [i for i, token in enumerate(free.tokens[row].tolist()) if token in ends]
        length = hits[0] + 1 if hits else 8
        assert stopped.lengths[row] == length
        assert stopped.finished[row] == bool(hits)
        assert torch.equal(stopped.tokens[row, :length], free.tokens[row, :length])
        assert (stopped.tokens[row, length:] == 50).all()
        assert (stopped.log_probs[row, length:] == 0).all()
    assert len(set(stopped.lengths.tolist())) > 2
    theirs = model.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=ends, pad_token_id=50
    )
    assert torch.equal(stopped.sequences, theirs)
    assert stopped.continuations()[0] == free.tokens[0, : stopped.lengths[0]].tolist()


def test_decoding_ends_early_when_every_row_has_ended():
    model = tiny_model("gpt2")
    ids = random_ids(1, 4)
    end = int(greedy(model, ids, max_new_tokens=1).tokens[0, 0])
    assert greedy(model, ids, max_new_tokens=50, eos_token_id=end).tokens.shape == (1, 1)


@pytest.mark.parametrize("family", CORE)
def test_reported_log_probs_are_those_of_the_untruncated_model(family):
    model = tiny_model(family)
    ids, mask = left_padded(3, 6)
    out = sample(
        model, ids, mask, max_new_tokens=7, temperature=0.6, top_k=5, generator=generators(1)[0], num_samples=2
    )
    scores = token_log_probs(model, out.sequences, out.attention_mask)[:, 5:]
    torch.testing.assert_close(out.log_probs, scores, atol=2e-5, rtol=1e-4)
    assert scored_positions(out.attention_mask)[:, 5:].all()


@pytest.mark.parametrize("family", CORE)
def test_a_sampled_row_does_not_depend_on_the_batch_around_it(family):
    model = tiny_model(family)
    prompts = [random_ids(1, n, seed=n)[0] for n in (3, 6, 9)]
    options = {"max_new_tokens": 12, "temperature": 1.3, "top_p": 0.95}
    together = sample(model, *left_pad(prompts, 0), generator=generators(10, 11, 12), **options)
    for row, prompt in enumerate(prompts):
        alone = sample(model, prompt[None], generator=generators(10 + row), **options)
        assert torch.equal(alone.tokens[0], together.tokens[row])
    fewer = sample(model, *left_pad(prompts[:2], 0), generator=generators(5)[0], **options)
    more = sample(model, *left_pad(prompts, 0), generator=generators(5)[0], **options)
    assert torch.equal(fewer.tokens, more.tokens[:2])


def test_samples_of_one_prompt_differ_and_leave_the_global_generator_alone():
    model = tiny_model("gpt2")
    state = torch.random.get_rng_state()
    out = sample(model, random_ids(2, 4), max_new_tokens=8, generator=generators(0)[0], num_samples=5)
    assert torch.equal(state, torch.random.get_rng_state())
    assert out.tokens.shape == (10, 8)
    assert len({tuple(row) for row in out.tokens.tolist()}) == 10
    assert torch.equal(out.prompt_ids[:5], random_ids(2, 4)[:1].expand(5, -1))


def test_sampled_frequencies_follow_the_truncated_distribution():
    model = tiny_model("llama")
    ids = random_ids(1, 5)
    with torch.no_grad():
        logits = model(ids).logits[:, -1]
    expected = truncate(logits, temperature=0.8, top_k=12, top_p=0.9).softmax(-1)[0]
    n = 20000
    out = sample(
        model, ids, max_new_tokens=1, temperature=0.8, top_k=12, top_p=0.9, generator=generators(3)[0], num_samples=n
    )
    counts = torch.bincount(out.tokens[:, 0], minlength=VOCABULARY).double()
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi2 = float(((counts - n * expected) ** 2 / (n * expected))[kept].sum())
    # the statistic has mean k - 1 and standard deviation sqrt(2 (k - 1)): 5 of them away has probability below 1e-5
    freedom = int(kept.sum()) - 1
    assert freedom >= 3
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


def test_draw_inverts_the_distribution_at_its_corners():
    logits = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).log().expand(6, -1)
    uniforms = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-53], dtype=torch.float64)
    # a token without mass is never drawn, not even at the ends
    assert draw(logits, uniforms).tolist() == [1, 1, 3, 3, 4, 4]


def test_truncation_equals_the_warpers_of_transformers():
    logits = torch.randn(20, 50, generator=generators(0)[0]) * 3
    for temperature, k, p in ((0.7, 10, 0.8), (1.5, 50, 0.3), (1.0, 1, 0.5), (2.0, 7, 0.99)):
        theirs = TemperatureLogitsWarper(temperature)(None, logits)
        theirs = TopPLogitsWarper(p)(None, TopKLogitsWarper(k)(None, theirs))
        torch.testing.assert_close(truncate(logits, temperature=temperature, top_k=k, top_p=p), theirs)


def test_forced_prefixes_are_taken_over_and_the_rest_is_the_rollout_from_them():
    model = tiny_model("qwen2")
    ids, mask = left_padded(2, 5)
    forced, lengths = random_ids(2, 4, seed=8), torch.tensor([4, 0])
    options = {"max_new_tokens": 7, "top_k": 1}
    out = sample(model, ids, mask, generator=generators(0, 1), prefix_forcing=(forced, lengths), **options)
    assert torch.equal(out.tokens[0, :4], forced[0])
    longer = torch.cat([ids[:1], forced[:1]], 1)
    assert torch.equal(out.tokens[0, 4:], greedy(model, longer, max_new_tokens=3).tokens[0])
    assert torch.equal(out.tokens[1], greedy(model, ids[1:], mask[1:], max_new_tokens=7).tokens[0])
    repeated = sample(
        model, ids, mask, generator=generators(0)[0], num_samples=3, prefix_forcing=(forced, lengths), max_new_tokens=5
    )
    assert torch.equal(repeated.tokens[:3, :4], forced[:1].expand(3, -1))
    with pytest.raises(ValueError, match="lengths must lie"):
        sample(model, ids, mask, generator=generators(0)[0], prefix_forcing=(forced, lengths), max_new_tokens=3)


@pytest.mark.parametrize("family", CORE)
def test_beam_search_never_scores_below_greedy_and_one_beam_is_greedy(family):
    model = tiny_model(family)
    ids, mask = left_padded(3, 6)
    plain = greedy(model, ids, mask, max_new_tokens=5)
    one = beam(model, ids, mask, num_beams=1, max_new_tokens=5)
    assert torch.equal(one.tokens, plain.tokens)
    torch.testing.assert_close(one.log_probs, plain.log_probs, atol=2e-5, rtol=1e-4)
    # with as many beams as continuations of length 2 the search is exhaustive
    full = beam(model, ids, mask, num_beams=VOCABULARY, max_new_tokens=2)
    short = greedy(model, ids, mask, max_new_tokens=2)
    assert (full.log_probs.sum(-1) >= short.log_probs.sum(-1) - 1e-5).all()
    with torch.no_grad():
        first = StepDecoder(model, ids, mask).logits.log_softmax(-1)
        decoder = StepDecoder(model, ids, mask)
        decoder.repeat(VOCABULARY)
        second = decoder.step(torch.arange(VOCABULARY).repeat(3)).log_softmax(-1)
    best = (first.reshape(-1, 1) + second).reshape(3, -1).max(-1).values
    torch.testing.assert_close(full.log_probs.sum(-1), best, atol=2e-5, rtol=1e-4)


def test_beam_rows_end_at_the_end_token():
    model = tiny_model("gpt2")
    ids = random_ids(3, 5)
    end = int(beam(model, ids, num_beams=3, max_new_tokens=6).tokens[0, 3])
    out = beam(model, ids, num_beams=3, max_new_tokens=6, eos_token_id=end, pad_token_id=0)
    for row in range(3):
        tokens = out.continuations()[row]
        assert (end in tokens) == bool(out.finished[row])
        assert end not in tokens[:-1]


@pytest.mark.parametrize("family", CORE)
def test_the_step_driver_with_and_without_cache_agrees_through_repeat_select_and_drop(family):
    model = tiny_model(family)
    ids, mask = left_padded(2, 6)
    drivers = [StepDecoder(model, ids, mask, use_cache=use, keep_hidden=True) for use in (True, False)]
    seen = []
    for decoder in drivers:
        states = [decoder.hidden]
        decoder.repeat(3)
        decoder.step(random_ids(6, 1, seed=1)[:, 0])
        decoder.select(torch.tensor([4, 0, 2]))
        block = decoder.step(random_ids(3, 4, seed=2))
        states += [decoder.hidden, block]
        decoder.drop(2)
        states += [
            decoder.step(random_ids(3, 1, seed=3)[:, 0]),
            decoder.hidden,
            decoder.input_ids,
            decoder.attention_mask,
        ]
        seen.append(states)
    for cached, plain in zip(*seen, strict=True):
        torch.testing.assert_close(cached, plain, atol=2e-5, rtol=1e-4)
    assert seen[0][0].shape == (2, 6, 32)
    assert seen[0][1].shape == (3, 4, 32)
    assert seen[0][2].shape == (3, 4, VOCABULARY)


@pytest.mark.parametrize("family", DECODERS)
def test_kept_hidden_states_are_what_the_unembedding_reads(family):
    model = tiny_model(family, **({"final_logit_softcapping": None} if family == "gemma2" else {}))
    ids, mask = left_padded(2, 6)
    decoder = StepDecoder(model, ids, mask, keep_hidden=True)
    with torch.no_grad():
        logits = model.get_output_embeddings()(decoder.hidden[:, -1])
    torch.testing.assert_close(logits, decoder.logits, atol=1e-5, rtol=1e-5)


def test_a_state_space_model_decodes_without_cache():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = MambaConfig(vocab_size=31, hidden_size=16, num_hidden_layers=1, state_size=4, pad_token_id=0)
        model = MambaForCausalLM(config).eval()
    ids = random_ids(2, 5) % 31
    with pytest.raises(ValueError, match="cache"):
        greedy(model, ids, max_new_tokens=3)
    ours = greedy(model, ids, max_new_tokens=4, use_cache=False)
    theirs = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=-1)
    assert torch.equal(ours.sequences, theirs)


def test_a_processor_changes_the_choice_but_not_the_reported_log_probs():
    model = tiny_model("mistral")
    ids = random_ids(2, 5)
    plain = greedy(model, ids, max_new_tokens=1)

    def forbid(input_ids, scores):
        assert input_ids.shape[1] >= 5
        return scores.scatter(1, plain.tokens, -torch.inf)

    out = greedy(model, ids, max_new_tokens=1, processors=[forbid])
    with torch.no_grad():
        log_probs = model(ids).logits[:, -1].log_softmax(-1)
    assert torch.equal(out.tokens[:, 0], log_probs.topk(2).indices[:, 1])
    torch.testing.assert_close(out.log_probs, log_probs.topk(2).values[:, 1:], atol=1e-5, rtol=1e-5)


def test_dropout_is_off_while_decoding_and_modes_come_back():
    model = tiny_model("gpt2")
    expected = greedy(model, random_ids(2, 5), max_new_tokens=8).tokens
    model.train()
    model.transformer.h[0].eval()
    assert torch.equal(greedy(model, random_ids(2, 5), max_new_tokens=8).tokens, expected)
    assert model.training
    assert model.transformer.h[1].training
    assert not model.transformer.h[0].training
    with pytest.raises(RuntimeError), evaluating(model):
        raise RuntimeError
    assert model.transformer.h[1].training


def test_texts_are_decoded_without_padding_and_end_marks():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompts = tokenizer(["the cat", "a dog sat on"])["input_ids"]
    out = greedy(model, *left_pad(prompts, tokenizer.pad_token_id), max_new_tokens=5)
    assert out.texts(tokenizer) == [tokenizer.decode(row, skip_special_tokens=True) for row in out.tokens]


def test_bad_requests_are_refused_with_a_reason():
    model = tiny_model("gpt2")
    ids = random_ids(2, 5)
    source = generators(0)[0]
    cases = [
        (lambda: greedy(model, ids, max_new_tokens=0), "max_new_tokens"),
        (lambda: greedy(model, ids[:, :0], max_new_tokens=1), "at least one"),
        (lambda: greedy(model, ids, torch.tensor([[1, 1, 1, 1, 0]] * 2), max_new_tokens=1), "on the left"),
        (lambda: greedy(model, ids, torch.ones(2, 4), max_new_tokens=1), "attention_mask is"),
        (lambda: greedy(model, ids, max_new_tokens=61), "position table has 64"),
        (lambda: sample(model, ids, max_new_tokens=1, temperature=0.0, generator=source), "greedy"),
        (lambda: sample(model, ids, max_new_tokens=1, top_k=0, generator=source), "top_k"),
        (lambda: sample(model, ids, max_new_tokens=1, top_p=1.2, generator=source), "top_p"),
        (lambda: sample(model, ids, max_new_tokens=1, num_samples=0, generator=source), "num_samples"),
        (lambda: sample(model, ids, max_new_tokens=1, generator=generators(0)), "1 entries"),
        (lambda: beam(model, ids, num_beams=0, max_new_tokens=1), "num_beams"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    assert greedy(model, ids, max_new_tokens=60).tokens.shape == (2, 60)  # the last position that exists is usable
