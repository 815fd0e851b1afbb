"""Scores against plain log-softmax of full logits, brute force over the vocabulary, and hand-made windows."""

import math

import pytest
import torch
from torch import nn

from families import CORE, DECODERS, VOCABULARY, left_padded, random_ids, tiny_model, tiny_tokenizer
from papertrial.lm.generation import position_ids
from papertrial.lm.scoring import (
    bits_per_byte,
    choice_scores,
    continuation_scores,
    label_log_probs,
    perplexity,
    score_tokens,
    scored_positions,
    sequence_nll,
    text_bits,
    token_log_probs,
    windows,
)

CLOSE = {"atol": 2e-5, "rtol": 1e-4}  # float32 sums in another order


def plain_log_probs(model, ids):
    """(T - 1,) of one sequence, from the definition."""
    with torch.no_grad():
        logits = model(ids[None]).logits[0].double()
    return logits[:-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("logits_at_once", [2**25, 3 * VOCABULARY, 1])
def test_token_log_probs_equal_the_definition_in_chunks_and_with_padding_on_either_side(family, logits_at_once):
    model = tiny_model(family)
    left, left_mask = left_padded(4, 9)
    right, right_mask = left.flip(1), left_mask.flip(1)
    for ids, mask in ((left, left_mask), (right, right_mask)):
        with torch.no_grad():
            scores = token_log_probs(model, ids, mask, logits_at_once=logits_at_once)
        assert scores.shape == (4, 8)
        assert scores.dtype == torch.float32
        scored = scored_positions(mask)
        assert (scores[~scored] == 0).all()
        for row in range(4):
            expected = plain_log_probs(model, ids[row][mask[row].bool()])
            torch.testing.assert_close(scores[row][scored[row]].double(), expected, **CLOSE)


@pytest.mark.parametrize("family", CORE)
def test_gradients_in_chunks_equal_those_of_the_plain_loss(family):
    ids, mask = left_padded(3, 8)
    gradients = []
    for chunked in (True, False):
        model = tiny_model(family)
        if chunked:
            loss = -token_log_probs(model, ids, mask, logits_at_once=4 * VOCABULARY).sum()
        else:
            labels = ids.masked_fill(mask == 0, -100)
            for row in range(3):
                labels[row, row] = -100  # the first real token has no context
            out = model(ids, attention_mask=mask, position_ids=position_ids(mask))
            loss = nn.functional.cross_entropy(
                out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
            )
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-4, rtol=1e-3)


def test_no_more_logits_than_asked_for_are_ever_made():
    model = tiny_model("llama")
    ids, mask = left_padded(4, 12)
    sizes = []
    handle = model.lm_head.register_forward_hook(lambda _m, _a, out: sizes.append(out.numel()))
    score_tokens(model, ids, mask, logits_at_once=5 * VOCABULARY)
    handle.remove()
    assert max(sizes) == 5 * VOCABULARY
    assert sum(sizes) == int(scored_positions(mask).sum()) * VOCABULARY


def test_a_model_that_changes_its_forward_is_scored_by_its_forward():
    model = tiny_model("llama")

    class Shifted(type(model)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 2.0
            return out

    ids = random_ids(1, 6)
    shifted = Shifted(model.config)
    shifted.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = (2 * model(ids).logits)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(token_log_probs(shifted.eval(), ids).detach(), expected, **CLOSE)


@pytest.mark.parametrize("family", CORE)
def test_token_statistics_equal_brute_force_over_the_vocabulary(family):
    model = tiny_model(family)
    ids, mask = left_padded(3, 7)
    scores = score_tokens(model, ids, mask, keep_hidden=True, logits_at_once=5 * VOCABULARY)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=position_ids(mask), output_hidden_states=True)
    probs = out.logits.double().softmax(-1)
    for row in range(3):
        for t in range(6):
            if not (mask[row, t] and mask[row, t + 1]):
                assert not scores.mask[row, t]
                assert scores.rank[row, t] == 0
                continue
            p, target = probs[row, t], int(ids[row, t + 1])
            assert scores.log_probs[row, t].item() == pytest.approx(p[target].log().item(), abs=2e-5)
            assert scores.entropy[row, t].item() == pytest.approx(-(p * p.log()).sum().item(), abs=2e-5)
            assert scores.max_log_prob[row, t].item() == pytest.approx(p.max().log().item(), abs=2e-5)
            assert scores.rank[row, t] == 1 + sum(1 for q in p.tolist() if q > p[target])
            mass = sum(q for q in p.tolist() if q >= p[target])
            assert scores.top_p_mass[row, t].item() == pytest.approx(mass, abs=2e-5)
            torch.testing.assert_close(scores.hidden[row, t], out.hidden_states[-1][row, t], **CLOSE)


def test_ties_share_a_rank_and_count_in_the_mass():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    scores = score_tokens(model, random_ids(1, 5))
    assert (scores.rank == 1).all()
    torch.testing.assert_close(scores.top_p_mass, torch.ones(1, 4))
    torch.testing.assert_close(scores.entropy, torch.full((1, 4), math.log(VOCABULARY)))


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(10, 4, 1), (10, 4, 3), (11, 5, 2), (3, 8, 2), (2, 2, 1), (9, 9, 8)]
)
def test_windows_score_every_target_once_with_enough_context(length, window, stride):
    spans = windows(length, window, stride)
    scored = [t for _, stop, first in spans for t in range(first, stop)]
    assert scored == list(range(1, length))
    for start, stop, first in spans:
        assert stop - start <= window
        assert first == 1 or first - start >= window - stride
    with pytest.raises(ValueError, match="stride"):
        windows(10, 4, 4)


def test_windowed_nll_conditions_on_the_window_and_nothing_else():
    model = tiny_model("gpt2")
    ids = random_ids(1, 13)[0]
    expected = 0.0
    for t in range(1, 13):  # window 6, stride 2: the window that first reaches t
        start = max(0, -(-(t - 5) // 2) * 2)
        expected -= plain_log_probs(model, ids[start : t + 1])[-1].item()
    got = sequence_nll(model, [ids], window=6, stride=2)
    assert got.item() == pytest.approx(expected, abs=1e-4)


def test_sequence_nll_and_perplexity_do_not_depend_on_the_batch():
    model = tiny_model("qwen2")
    sequences = [random_ids(1, n, seed=n)[0].tolist() for n in (5, 1, 12, 8, 3)]
    expected = torch.stack([-plain_log_probs(model, torch.tensor(s)).sum() for s in sequences])
    for batch_size in (1, 2, 8):
        torch.testing.assert_close(sequence_nll(model, sequences, batch_size=batch_size), expected, **CLOSE)
    tokens = sum(len(s) - 1 for s in sequences)
    assert perplexity(model, sequences) == pytest.approx(math.exp(expected.sum().item() / tokens), rel=1e-5)
    with pytest.raises(ValueError, match="at least two"):
        perplexity(model, [[3]])
    with pytest.raises(ValueError, match="go together"):
        perplexity(model, sequences, window=4)


def test_a_uniform_model_costs_the_logarithm_of_the_vocabulary_per_token():
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    texts = ["the cat sat on the mat", "a dog", ""]
    tokens = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    size = sum(len(text) for text in texts)
    got = bits_per_byte(model, tokenizer, texts, bos_token_id=1)
    assert got == pytest.approx(tokens * math.log2(VOCABULARY) / size, rel=1e-5)
    with_end = bits_per_byte(model, tokenizer, texts, bos_token_id=1, eos_token_id=2)
    assert with_end == pytest.approx((tokens + 3) * math.log2(VOCABULARY) / size, rel=1e-5)


def test_text_bits_are_the_code_length_after_the_start_token():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    text = "the lazy dog sat"
    ids = torch.tensor([1, *tokenizer.encode(text, add_special_tokens=False)])
    bits, sizes = text_bits(model, tokenizer, [text], bos_token_id=1)
    assert bits.item() == pytest.approx(-plain_log_probs(model, ids).sum().item() / math.log(2), abs=1e-3)
    assert sizes.tolist() == [16]


def test_a_tokenizer_that_loses_text_is_refused():
    with pytest.raises(ValueError, match="text 1 does not survive"):
        bits_per_byte(tiny_model("gpt2"), tiny_tokenizer(), ["the cat", "THE CAT"], bos_token_id=1)
    with pytest.raises(ValueError, match="no bytes"):
        bits_per_byte(tiny_model("gpt2"), tiny_tokenizer(), [""], bos_token_id=1)


@pytest.mark.parametrize("family", CORE)
def test_continuation_scores_equal_the_definition(family):
    model = tiny_model(family)
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (1, 5, 3)]
    continuations = [random_ids(1, n, seed=20 + n)[0].tolist() for n in (4, 1, 2)]
    totals, counts = continuation_scores(model, prompts, continuations, batch_size=2)
    assert counts.tolist() == [4, 1, 2]
    for row in range(3):
        whole = torch.tensor(prompts[row] + continuations[row])
        expected = plain_log_probs(model, whole)[len(prompts[row]) - 1 :].sum().item()
        assert totals[row].item() == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match="continuation 1 is empty"):
        continuation_scores(model, prompts, [[3], [], [4]])


def test_choices_are_scored_behind_what_all_of_them_share():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    prompt, options = "the cat", [" sat", " jumps over", "s sat"]
    got = choice_scores(model, tokenizer, [prompt], [options], bos_token_id=1)[0]
    mean = choice_scores(model, tokenizer, [prompt], [options], bos_token_id=1, normalise="mean")[0]
    joined = [[1, *tokenizer.encode(prompt + option, add_special_tokens=False)] for option in options]
    alone = [1, *tokenizer.encode(prompt, add_special_tokens=False)]
    shared = min(next(i for i in range(99) if [*alone, -1][: i + 1] != [*ids, -2][: i + 1]) for ids in joined)
    for index, ids in enumerate(joined):
        expected = plain_log_probs(model, torch.tensor(ids))[shared - 1 :].sum().item()
        assert got[index].item() == pytest.approx(expected, abs=1e-4)
        assert mean[index].item() == pytest.approx(expected / (len(ids) - shared), abs=1e-4)
    with pytest.raises(ValueError, match="give bos_token_id"):
        choice_scores(model, tokenizer, [""], [["the", "dog"]])
    with pytest.raises(ValueError, match="adds no token"):
        choice_scores(model, tokenizer, ["the cat"], [[" sat", ""]])


def test_spellings_of_a_label_add_up_in_probability():
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    labels = {"yes": [" the", " dog"], "no": [" sat"]}
    got = label_log_probs(model, tokenizer, ["the cat", "a fox"], labels)
    for row, prompt in enumerate(("the cat", "a fox")):
        the, dog, sat = choice_scores(model, tokenizer, [prompt], [[" the", " dog", " sat"]])[0].exp().tolist()
        assert got[row].exp().tolist() == pytest.approx([the + dog, sat], rel=1e-6)


def test_what_cannot_be_scored_is_refused():
    ids = random_ids(1, 5)
    with pytest.raises(ValueError, match="next token"):
        token_log_probs(tiny_model("bert"), ids)
    with pytest.raises(ValueError, match="64 positions"):
        token_log_probs(tiny_model("gpt2"), random_ids(1, 65))
    with pytest.raises(ValueError, match="attention_mask is"):
        token_log_probs(tiny_model("gpt2"), ids, torch.ones(1, 4))
