from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import normalize
from transformers import LogitsProcessor, MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

from families import CORE, tiny_model
from papertrial.lab.trial import Trial
from papertrial.lm.generation import left_pad
from papertrial.papers.decoding.contrastive_search import method
from papertrial.papers.decoding.contrastive_search.experiment import _lengths, bisect
from papertrial.papers.decoding.contrastive_search.method import (
    contrastive_generate,
    contrastive_search,
    isotropy,
    isotropy_of_states,
    scored_contrastive_search,
    self_similarity_matrix,
)

PROMPTS = [[5, 9, 3, 22, 7, 41], [8, 2], [60, 11, 33, 4]]
GREEDY = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": -1}


@pytest.fixture(params=CORE)
def model(request):
    return tiny_model(request.param)


def naive(model, prompt, k, alpha, new_tokens):
    """The definition, word for word: the whole sequence is run again for every candidate."""
    ids = list(prompt)
    for _ in range(new_tokens):
        with torch.no_grad():
            out = model(torch.tensor([ids]), output_hidden_states=True)
            probs = out.logits[0, -1].softmax(-1)
            context = normalize(out.hidden_states[-1][0], dim=-1)
            best = None
            for candidate in probs.topk(k).indices.tolist():
                again = model(torch.tensor([[*ids, candidate]]), output_hidden_states=True)
                state = normalize(again.hidden_states[-1][0, -1], dim=-1)
                score = (1 - alpha) * probs[candidate] - alpha * max(float(state @ c) for c in context)
                if best is None or score > best[0]:
                    best = (score, candidate)
        ids.append(best[1])
    return ids


@pytest.mark.parametrize("settings", [{"k": 5, "alpha": 0.0}, {"k": 1, "alpha": 0.7}])
def test_no_penalty_or_one_candidate_is_greedy(model, settings):
    ids, mask = left_pad(PROMPTS, 0)
    greedy = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(contrastive_search(model, ids, mask, max_new_tokens=10, **settings), greedy)


@pytest.mark.parametrize("alpha", [0.3, 0.6, 1.0])
def test_equals_the_definition_run_word_for_word(model, alpha):
    ids, mask = left_pad(PROMPTS, 0)
    batch = contrastive_search(model, ids, mask, k=4, alpha=alpha, max_new_tokens=8)
    for row, prompt in zip(batch, PROMPTS, strict=True):
        assert row[-len(prompt) - 8 :].tolist() == naive(model, prompt, 4, alpha, 8)


def test_without_a_cache_and_where_rows_must_be_repeated_it_is_the_same(model, monkeypatch):
    ids, mask = left_pad(PROMPTS, 0)
    expected = contrastive_search(model, ids, mask, k=4, max_new_tokens=10)
    assert torch.equal(contrastive_search(model, ids, mask, k=4, max_new_tokens=10, use_cache=False), expected)
    monkeypatch.setattr(method, "can_look_ahead", lambda decoder, nodes: False)
    assert torch.equal(contrastive_search(model, ids, mask, k=4, max_new_tokens=10), expected)


def test_a_sliding_window_shorter_than_the_text_is_respected():
    model = tiny_model("mistral", sliding_window=6)
    cached = contrastive_search(model, torch.tensor([PROMPTS[0]]), k=4, max_new_tokens=14)
    assert cached[0].tolist() == naive(model, PROMPTS[0], 4, 0.6, 14)


def test_left_padded_batch_equals_single_prompts(model):
    ids, mask = left_pad(PROMPTS, 0)
    batch = contrastive_search(model, ids, mask, max_new_tokens=12)
    for row, prompt in zip(batch, PROMPTS, strict=True):
        single = contrastive_search(model, torch.tensor([prompt]), max_new_tokens=12)
        assert row[-12:].tolist() == single[0, -12:].tolist()


def test_full_vocabulary_and_full_penalty_picks_the_least_similar_token():
    model = tiny_model("llama")
    vocabulary = model.config.vocab_size
    ids = torch.tensor([PROMPTS[0]])
    chosen = contrastive_search(model, ids, k=vocabulary, alpha=1.0, max_new_tokens=1)[0, -1]
    tries = torch.cat([ids.expand(vocabulary, -1), torch.arange(vocabulary)[:, None]], 1)
    with torch.no_grad():
        states = normalize(model(tries, output_hidden_states=True).hidden_states[-1], dim=-1)
    worst = (states[:, -1:] @ states[:, :-1].mT).amax((1, 2))
    assert chosen == worst.argmin()


@pytest.mark.parametrize("alpha", [0.2, 0.6, 0.99])
def test_collinear_states_make_it_greedy(model, monkeypatch, alpha):
    constant = lambda states, dim: torch.ones_like(states) / states.shape[-1] ** 0.5  # noqa: E731
    monkeypatch.setattr(method, "normalize", constant)
    ids, mask = left_pad(PROMPTS, 0)
    greedy = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(contrastive_search(model, ids, mask, alpha=alpha, max_new_tokens=10), greedy)


def test_equal_scores_go_to_the_more_probable_token():
    score = torch.tensor([[0.1, 0.4, 0.4, 0.2], [0.3, 0.3, 0.3, 0.3]])
    assert method._first_argmax(score).tolist() == [1, 0]


def test_scores_are_what_the_choice_was_made_of():
    model = tiny_model("gpt2")
    out = scored_contrastive_search(model, torch.tensor([PROMPTS[0]]), k=4, alpha=0.6, max_new_tokens=5)
    torch.testing.assert_close(out.score, 0.4 * out.probability - 0.6 * out.penalty)
    with torch.no_grad():
        whole = model(out.sequences, output_hidden_states=True)
    probs = whole.logits[0, 5:-1].softmax(-1).gather(-1, out.sequences[0, 6:, None])[:, 0]
    torch.testing.assert_close(out.probability[0], probs, atol=1e-5, rtol=1e-4)  # float32 rounding of two routes
    states = normalize(whole.hidden_states[-1][0], dim=-1)
    penalties = [float((states[:t] @ states[t]).max()) for t in range(6, 11)]
    torch.testing.assert_close(out.penalty[0], torch.tensor(penalties), atol=1e-5, rtol=1e-4)


def test_rows_end_at_an_end_token_and_are_padded_after_it():
    model = tiny_model("llama")
    ids, mask = left_pad(PROMPTS, 0)
    free = contrastive_search(model, ids, mask, max_new_tokens=10)
    end = int(free[0, -6])
    ended = contrastive_search(model, ids, mask, max_new_tokens=10, eos_token_id=[end], pad_token_id=0)
    stop = free[0, -10:].tolist().index(end)
    new = ended[0, ids.shape[1] :].tolist()
    assert new[: stop + 1] == free[0, -10:].tolist()[: stop + 1]
    assert set(new[stop + 1 :]) <= {0}


def test_generate_runs_it_and_honours_processors_ends_and_lengths(model):
    class Ban(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.index_fill(1, torch.tensor(banned), -torch.inf)

    ids, mask = left_pad(PROMPTS, 0)
    plain = contrastive_search(model, ids, mask, k=4, alpha=0.5, max_new_tokens=9)
    settings = {"attention_mask": mask, "custom_generate": contrastive_generate, "max_new_tokens": 9, "pad_token_id": 0}
    settings |= {"penalty_alpha": 0.5, "top_k": 4, "eos_token_id": -1}
    assert torch.equal(model.generate(ids, **settings), plain)
    banned = plain[:, ids.shape[1] :].unique().tolist()[:3]
    without = model.generate(ids, logits_processor=[Ban()], **settings)
    assert not torch.isin(without[:, ids.shape[1] :], torch.tensor(banned)).any()
    end = int(plain[0, -5])
    cut = model.generate(ids[:1], **settings | {"attention_mask": mask[:1], "eos_token_id": end})
    assert cut[0, -1] == end
    assert cut.shape[1] <= plain.shape[1]


def test_half_precision_runs(model):
    ids, mask = left_pad(PROMPTS, 0)
    out = contrastive_search(model.to(torch.bfloat16), ids, mask, max_new_tokens=6)
    assert out.shape == (3, 12)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"k": 0}, "k must lie between 1"),
        ({"k": 1000}, "k must lie between 1"),
        ({"alpha": -0.1}, "alpha must lie in"),
        ({"alpha": 1.5}, "alpha must lie in"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"input_ids": torch.empty(1, 0, dtype=torch.long)}, "at least one of each"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "pad prompts on the left"),
        ({"max_new_tokens": 500}, "position table"),
    ],
)
def test_bad_input_is_named(settings, says):
    arguments = {"input_ids": torch.tensor([[1, 2, 3]]), "max_new_tokens": 4} | settings
    with pytest.raises(ValueError, match=says):
        contrastive_search(tiny_model("gpt2"), **arguments)


def test_an_encoder_is_refused():
    with pytest.raises(ValueError, match="does not generate text"):
        contrastive_search(tiny_model("bert"), torch.tensor([[1, 2]]), max_new_tokens=2)


# -- isotropy ----------------------------------------------------------------------------------------------------


def test_isotropy_of_equal_and_of_orthogonal_states():
    assert isotropy_of_states([torch.ones(7, 4)]) == pytest.approx(0.0)
    assert isotropy_of_states([torch.eye(6), 3 * torch.eye(4)]) == pytest.approx(1.0)


def test_isotropy_ignores_length_and_rotation_of_states():
    g = torch.Generator().manual_seed(0)
    states = torch.randn(12, 8, generator=g)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=g)).Q
    scale = torch.rand(12, 1, generator=g) + 0.1
    assert isotropy_of_states([states]) == pytest.approx(isotropy_of_states([scale * states @ rotation]), abs=1e-6)


def test_isotropy_is_pooled_over_pairs_of_different_tokens():
    g = torch.Generator().manual_seed(1)
    texts = [torch.randn(n, 5, generator=g) for n in (2, 9, 4)]
    total = pairs = 0.0
    for states in texts:
        for i in range(len(states)):
            for j in range(len(states)):
                if i != j:
                    total += float(torch.cosine_similarity(states[i], states[j], dim=0))
                    pairs += 1
    assert isotropy_of_states(texts) == pytest.approx(1 - total / pairs, abs=1e-6)


@pytest.mark.parametrize("family", [*CORE, "bert", "roberta"])
def test_isotropy_of_a_model_does_not_depend_on_the_batch(family):
    model = tiny_model(family)
    texts = [[5, 9, 3, 22, 7, 41], [8, 2], [60, 11, 33, 4], [9]]
    states = []
    with torch.no_grad():
        for text in texts[:3]:
            states.append(model.base_model(torch.tensor([text])).last_hidden_state[0])
    expected = isotropy_of_states(states)
    assert isotropy(model, texts) == pytest.approx(expected, abs=1e-5)
    assert isotropy(model, texts, batch_size=1) == pytest.approx(expected, abs=1e-5)


def test_self_similarity_is_the_cosine_matrix_and_hides_padding():
    states = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    matrix = self_similarity_matrix(states, torch.tensor([0, 1, 1, 1, 1]))
    assert matrix[0].abs().sum() == 0
    assert matrix[1, 3] == pytest.approx(float(torch.cosine_similarity(states[1], states[3], dim=0)))
    with pytest.raises(ValueError, match="tokens, width"):
        self_similarity_matrix(states[0])


def test_isotropy_refuses_what_it_cannot_measure():
    with pytest.raises(ValueError, match="two tokens"):
        isotropy_of_states([torch.ones(1, 3)])
    with pytest.raises(ValueError, match="tokenizer"):
        isotropy(tiny_model("gpt2"), ["a text"])
    with pytest.raises(ValueError, match="texts is empty"):
        isotropy(tiny_model("gpt2"), [])


def test_isotropy_reads_no_further_than_the_position_table():
    model = tiny_model("gpt2", n_positions=12)
    ids = torch.randint(5, 40, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    assert isotropy(model, [ids]) == isotropy(model, [ids[:12]])


def test_a_state_space_model_is_run_anew_for_each_candidate():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.5)
    mamba = MambaForCausalLM(config).eval()
    ids = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    both = contrastive_search(mamba, ids, mask, k=4, alpha=0.6, max_new_tokens=5)
    for row, prompt in zip(both, (ids[0, 2:], ids[1]), strict=True):
        assert row[-5:].tolist() == naive(mamba, prompt.tolist(), 4, 0.6, 5)[-5:]


def test_an_encoder_decoder_is_refused():
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 40}
    with pytest.raises(ValueError, match="does not generate text: give a decoder"):
        contrastive_search(T5ForConditionalGeneration(T5Config(**sizes)), torch.ones(1, 3).long(), max_new_tokens=2)


def test_a_dial_is_bisected_towards_its_target():
    tried = []

    def diversity(value):
        tried.append(value)
        return {"diversity": 100 * value}

    found = bisect(diversity, 0.2, 0.8, 57.0, 6, whole=False)
    assert tried == pytest.approx([0.5, 0.65, 0.575, 0.5375, 0.55625, 0.565625])
    assert min(found, key=lambda v: abs(found[v]["diversity"] - 57.0)) == pytest.approx(0.565625)
    assert list(bisect(lambda k: {"diversity": k}, 2, 200, 9.0, 20, whole=True)) == [20, 6, 11, 8, 9]


def test_the_experiment_fits_into_a_short_position_table(tmp_path):
    parameters = {"prefix_tokens": 32, "new_tokens": 96}
    trial = Trial("contrastive_search", "smoke", 0, parameters, scratch=tmp_path)

    def lengths(positions):
        return _lengths(trial, SimpleNamespace(model=tiny_model("gpt2", n_positions=positions)))

    assert lengths(512) == (32, 128)
    assert lengths(64) == (16, 64)
    with pytest.raises(ValueError, match="holds 12 positions"):
        lengths(12)
