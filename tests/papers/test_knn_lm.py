import math

import numpy as np
import pytest
import torch

from families import CORE, left_padded, random_ids, tiny_model
from papertrial.lab.trial import Trial
from papertrial.lm.datastore import ApproximateSearch, Datastore, ExactSearch, KeySite
from papertrial.lm.models import Checkpoint, load
from papertrial.lm.scoring import token_log_probs
from papertrial.papers.decoding.knn_lm import experiment
from papertrial.papers.decoding.knn_lm.method import (
    KEYS,
    NearestNeighbourLM,
    OverparameterizedHead,
    allot_rows,
    build_datastore,
    generalized_log_probs,
    interpolate,
    knn_log_probs,
    knn_target_log_probs,
    train_head,
    values_of,
)

VOCABULARY = 67


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_store(entries=200, width=32, seed=0):
    draw = np.random.default_rng(seed)
    keys = draw.standard_normal((entries, width)).astype(np.float32)
    return Datastore.from_arrays(keys, draw.integers(0, VOCABULARY, entries))


# -- the distribution --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 1.0, 10.0])
def test_the_vote_is_the_sum_over_neighbours_that_say_a_token(temperature):
    store, queries = random_store(), randn(5, 32, seed=1)
    near = ExactSearch(store.keys).search(queries, 40)
    found = knn_log_probs(near.scores, values_of(store, near), VOCABULARY, temperature)
    for row, query in enumerate(queries.double()):
        distance = (query - torch.from_numpy(store.keys).double()).square().sum(1)
        nearest = distance.argsort()[:40]
        votes = (-distance[nearest] / temperature).softmax(0)
        expected = torch.zeros(VOCABULARY, dtype=torch.double)
        for vote, entry in zip(votes, nearest, strict=True):
            expected[store.values[entry]] += vote
        torch.testing.assert_close(found[row].exp().double(), expected, atol=1e-5, rtol=1e-4)  # float32 distances
        assert set(found[row].isfinite().nonzero()[:, 0].tolist()) == set(store.values[nearest].tolist())
    torch.testing.assert_close(found.exp().sum(1), torch.ones(5), atol=1e-6, rtol=0)


def test_one_token_is_the_entry_of_the_whole_distribution():
    scores, values = -randn(6, 30).square(), torch.randint(0, 9, (6, 30), generator=torch.Generator().manual_seed(0))
    whole = knn_log_probs(scores, values, 12, 2.0)
    for token in range(12):
        one = knn_target_log_probs(scores, values, torch.full((6,), token), 2.0)
        torch.testing.assert_close(one, whole[:, token], atol=1e-6, rtol=1e-5)
    assert whole[:, 9:].isneginf().all(), "no neighbour says these"


def test_temperature_goes_from_the_nearest_alone_to_one_vote_each():
    scores = torch.tensor([[-1.0, -1.5, -4.0, -9.0]])
    values = torch.tensor([[3, 1, 1, 0]])
    assert knn_log_probs(scores, values, 5, 1e-3).exp().tolist() == [[0, 0, 0, 1, 0]]
    even = knn_log_probs(scores, values, 5, 1e6).exp()
    torch.testing.assert_close(even, torch.tensor([[0.25, 0.5, 0, 0.25, 0]]), atol=1e-5, rtol=0)
    far = knn_log_probs(scores - 1e7, values, 5, 1e-3)
    assert far.exp().sum() == 1, "large distances neither overflow nor vanish"


def test_absent_neighbours_have_no_vote():
    scores = torch.tensor([[-1.0, -2.0, -torch.inf]])
    values = torch.tensor([[1, 2, 4]])
    torch.testing.assert_close(
        knn_log_probs(scores, values, 5), knn_log_probs(scores[:, :2], values[:, :2], 5), atol=0, rtol=0
    )


@pytest.mark.parametrize("lam", [0.0, 0.01, 0.25, 0.5, 0.99, 1.0])
def test_mixtures_are_of_probabilities_and_sum_to_one(lam):
    lm = randn(4, VOCABULARY).log_softmax(1)
    knn = knn_log_probs(-randn(4, 20, seed=1).square(), torch.arange(20).expand(4, 20), VOCABULARY)
    mixed = interpolate(lm, knn, lam)
    torch.testing.assert_close(mixed.exp(), (1 - lam) * lm.exp() + lam * knn.exp(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mixed.exp().sum(1), torch.ones(4), atol=1e-6, rtol=0)
    if lam in (0, 1):
        assert torch.equal(mixed, (lm, knn)[int(lam)])


@pytest.mark.parametrize("k", [7, 200])
def test_neighbour_voting_is_a_softmax_layer_with_a_row_per_entry(k):
    store, queries = random_store(), randn(5, 32, seed=1)
    near = ExactSearch(store.keys).search(queries, k)
    votes = knn_log_probs(near.scores, values_of(store, near), VOCABULARY, 3.0)
    rows, words = torch.from_numpy(store.keys), torch.from_numpy(store.values).long()
    layer = generalized_log_probs(queries, rows, words, VOCABULARY, k=k, temperature=3.0)
    torch.testing.assert_close(votes.exp(), layer.exp(), atol=1e-6, rtol=1e-5)


def test_with_the_unembedding_as_keys_the_common_form_is_the_model_itself():
    model = tiny_model("llama")
    ids = random_ids(1, 12)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        rows = model.get_output_embeddings().weight
        found = generalized_log_probs(
            out.hidden_states[-1][0], rows, torch.arange(VOCABULARY), VOCABULARY, similarity="dot"
        )
    torch.testing.assert_close(found, out.logits[0].log_softmax(-1), atol=1e-5, rtol=1e-5)


# -- the model ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=CORE)
def model(request):
    return tiny_model(request.param)


def mixture(model, ids, store, key, k, lam, temperature):
    """p of the next token after each prefix of one sequence, each prefix run alone."""
    rows = []
    for length in range(1, len(ids)):
        prefix = torch.tensor([ids[:length]])
        own = build_datastore(model, [ids[: length + 1]], keys=[key], window=64, dtype="float32")[key]
        query = torch.from_numpy(np.array(own.keys[-1]))
        with torch.no_grad():
            lm = model(prefix).logits[0, -1].softmax(-1)
        distance = (query - torch.from_numpy(np.array(store.keys, dtype=np.float32))).square().sum(1)
        nearest = distance.argsort()[:k]
        p = torch.zeros(VOCABULARY)
        words = torch.from_numpy(store.values[nearest.numpy()]).long()
        p.index_add_(0, words, (-distance[nearest] / temperature).softmax(0))
        rows.append((1 - lam) * lm + lam * p)
    return torch.stack(rows)


@pytest.mark.parametrize("key", list(KEYS))
def test_scores_of_a_padded_batch_equal_the_definition_prefix_by_prefix(model, key, tmp_path):
    training = [row.tolist() for row in random_ids(4, 30, seed=5)]
    store = build_datastore(model, training, tmp_path, keys=[key], window=64)[key]
    knn = NearestNeighbourLM(model, store, k=20, lam=0.4, temperature=5.0)
    ids, mask = left_padded(3, 9)
    found = knn.token_log_probs(ids, mask)
    for row in range(3):
        real = ids[row][mask[row].bool()].tolist()
        expected = mixture(model, real, store, key, 20, 0.4, 5.0)[torch.arange(len(real) - 1), real[1:]].log()
        torch.testing.assert_close(found[row, -len(expected) :], expected, atol=1e-4, rtol=1e-4)
        assert not found[row, : 8 - len(expected)].any()


def test_weight_zero_is_the_model_bit_for_bit(model):
    ids, mask = left_padded(3, 9)
    knn = NearestNeighbourLM(model, random_store(), k=5, lam=0.0)
    with torch.no_grad():
        assert torch.equal(knn.token_log_probs(ids, mask), token_log_probs(model, ids, mask))


def test_generation_takes_every_step_from_the_mixture(model, tmp_path):
    store = build_datastore(model, random_ids(4, 30, seed=5).tolist(), tmp_path, window=64)["ffn_input"]
    knn = NearestNeighbourLM(model, store, k=20, lam=0.6, temperature=5.0)
    ids, mask = left_padded(2, 6)
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": -1}
    with knn.processor() as processor:
        made = model.generate(
            ids, attention_mask=mask, logits_processor=[processor], output_logits=True, output_scores=True,
            return_dict_in_generate=True, **options,
        )  # fmt: skip
    for row in range(2):
        sequence = made.sequences[row][row:].tolist()  # without the padding
        expected = mixture(model, sequence, store, "ffn_input", 20, 0.6, 5.0)[-6:]
        scores = torch.stack(made.scores, 1)[row]
        torch.testing.assert_close(scores.exp(), expected, atol=1e-4, rtol=1e-3)
        assert scores.argmax(1).tolist() == sequence[-6:]
    plain = model.generate(ids, attention_mask=mask, **options)
    assert not torch.equal(plain, made.sequences), "otherwise the neighbours changed nothing here"


@pytest.mark.parametrize("key", list(KEYS))
def test_queries_of_a_long_text_have_the_contexts_of_the_stores_keys(model, key, tmp_path):
    texts = random_ids(2, 40, seed=5).tolist()
    store = build_datastore(model, texts, tmp_path, keys=[key], window=16, stride=6, dtype="float32")[key]
    padded, mask = torch.tensor([texts[0], [0] * 11 + texts[1][:29]]), torch.ones(2, 40, dtype=torch.long)
    mask[1, :11] = 0
    nearest = NearestNeighbourLM(model, store, k=1, lam=1.0)
    found = nearest.token_log_probs(padded, mask)
    # every query meets its own entry, wherever in the text; without the store's windows only the first 15 do
    assert torch.equal(found, torch.zeros_like(found))
    alone = NearestNeighbourLM(model, store, k=1, lam=0.0).token_log_probs(padded, mask)
    assert (alone[1, :11] == 0).all()
    row = padded[0]
    with torch.no_grad():
        for place in (
            14,
            15,
            20,
            21,
            27,
            38,
        ):  # the window that holds a target first starts at a multiple of the stride
            start = max(0, -(-(place + 2 - 16) // 6) * 6)
            expected = model(row[None, start : place + 1]).logits[0, -1].log_softmax(-1)[row[place + 1]]
            assert float(alone[0, place]) == pytest.approx(float(expected), abs=1e-4)
    short = NearestNeighbourLM(model, store, k=5, lam=0.3)
    torch.testing.assert_close(
        short.token_log_probs(padded)[:1, :15], short.token_log_probs(padded[:1, :16]), atol=1e-5, rtol=1e-5
    )


def test_generation_beyond_the_stores_window_is_refused(tmp_path):
    model = tiny_model("llama")
    store = build_datastore(model, random_ids(2, 30).tolist(), tmp_path, window=12)["ffn_input"]
    knn = NearestNeighbourLM(model, store, k=5)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    with knn.processor() as processor:
        made = model.generate(random_ids(1, 8), logits_processor=[processor], max_new_tokens=4, **options)
        assert made.shape == (1, 12)
        with pytest.raises(ValueError, match="at most 11 tokens of context and the text is 12 long"):
            model.generate(random_ids(1, 8), logits_processor=[processor], max_new_tokens=5, **options)


def test_a_store_of_other_weights_is_refused(tmp_path):
    model = tiny_model("llama")
    store = build_datastore(model, random_ids(2, 30).tolist(), tmp_path, window=64)["ffn_input"]
    NearestNeighbourLM(tiny_model("llama"), store, k=5)  # the same checkpoint loaded again
    for other in (tiny_model("llama", seed=1), tiny_model("llama").to(torch.bfloat16)):
        with pytest.raises(ValueError, match="built with other weights"):
            NearestNeighbourLM(other, store, k=5)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="built with other weights"):
        NearestNeighbourLM(model, store.subset(np.arange(10)), k=5)
    NearestNeighbourLM(model, random_store(), k=5)  # arrays say nothing about where they come from


def test_any_search_serves_and_beams_are_followed(tmp_path):
    model = tiny_model("qwen2")
    store = build_datastore(model, random_ids(12, 40, seed=5).tolist(), tmp_path, window=64)["ffn_input"]
    ids, mask = left_padded(2, 6)
    options = {"do_sample": False, "num_beams": 3, "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": -1}
    outputs = []
    for search in (None, ApproximateSearch.build(store.keys, kind="ivf", lists=4, effort=4)):
        knn = NearestNeighbourLM(model, store, search, k=20, lam=0.6, temperature=5.0)
        with knn.processor() as processor:
            made = model.generate(
                ids, attention_mask=mask, logits_processor=[processor], return_dict_in_generate=True,
                output_scores=True, **options,
            )  # fmt: skip
        outputs.append(made.sequences)
        steps = torch.cat([knn.token_log_probs(row[None])[:, -5:] for row in made.sequences[1:, 1:]])
        # the beam's score is the mean of log p over the sequence; only row 1's own padding is cut above
        assert float(steps.mean()) == pytest.approx(float(made.sequences_scores[1]), abs=1e-4)
    assert torch.equal(*outputs)


def test_a_text_is_queried_without_its_own_entries(tmp_path):
    model = tiny_model("llama")
    store = build_datastore(model, random_ids(3, 30).tolist(), tmp_path, window=64, dtype="float32")["ffn_input"]
    queries = torch.from_numpy(np.array(store.keys))
    own = torch.arange(len(store))
    assert torch.equal(ExactSearch(store.keys).search(queries, 1).indices[:, 0], own)
    assert not (ExactSearch(store.keys).search(queries, 10, exclude=own).indices == own[:, None]).any()


# -- the head ----------------------------------------------------------------------------------------------------


def test_a_row_per_word_is_the_ordinary_head_and_copies_change_nothing():
    weight, states = randn(VOCABULARY, 32), randn(6, 32, seed=1)
    plain = (states @ weight.T).log_softmax(1)
    for counts in (torch.ones(VOCABULARY, dtype=torch.long), torch.arange(VOCABULARY) % 5 + 1):
        head = OverparameterizedHead.from_unembedding(weight, counts)
        assert len(head.weight) == int(counts.sum())
        torch.testing.assert_close(head.log_probs(states), plain, atol=1e-5, rtol=1e-5)


def test_a_word_has_the_mass_of_all_its_rows():
    weight, words = randn(40, 16), torch.arange(40) % 11
    head, states = OverparameterizedHead(weight, words, randn(40, seed=3)), randn(6, 16, seed=1)
    rows = (states @ weight.T + randn(40, seed=3)).softmax(1)
    expected = torch.stack([rows[:, words == word].sum(1) for word in range(11)], 1)
    found = head.log_probs(states)
    torch.testing.assert_close(found.exp(), expected, atol=1e-6, rtol=1e-5)
    targets = torch.tensor([0, 3, 10, 5, 5, 1])
    torch.testing.assert_close(head.target_log_probs(states, targets), found[torch.arange(6), targets])
    far = OverparameterizedHead(weight, words, torch.where(words == 2, -300.0, 0.0)).log_probs(states)
    assert far.isfinite().all(), "a word of vanishing mass keeps its logarithm"
    grads = [torch.autograd.grad(f.sum(), head.weight)[0] for f in (
        head.log_probs(states)[torch.arange(6), targets], head.target_log_probs(states, targets))]  # fmt: skip
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)


def test_rows_are_allotted_in_proportion_and_add_up():
    counts = allot_rows(torch.tensor([0.0, 10.0, 30.0, 60.0]), 24)
    assert counts.tolist() == [1, 3, 7, 13]
    for seed in range(5):
        importance = randn(50, seed=seed).square()
        counts = allot_rows(importance, 173)
        assert int(counts.sum()) == 173
        assert int(counts.min()) >= 1
        exact = importance / importance.sum() * 123 + 1
        assert (counts - exact).abs().max() < 1


def test_more_rows_fit_what_one_row_cannot():
    # two words, each seen on two opposite sides: no single row per word tells them apart
    centres = torch.tensor([[4.0, 0], [-4, 0], [0, 4], [0, -4]])
    keys = centres.repeat(50, 1) + 0.1 * randn(200, 2)
    store = Datastore.from_arrays(keys.numpy(), np.tile([0, 0, 1, 1], 50))
    likelihood = {}
    for rows in (1, 2):
        generator = torch.Generator().manual_seed(0)
        counts = torch.full((2,), rows)
        head = OverparameterizedHead.from_unembedding(randn(2, 2), counts, noise=0.5, generator=generator)
        train_head(head, store, steps=150, batch_size=64, lr=0.1, generator=generator)
        with torch.no_grad():
            likelihood[rows] = float(head.target_log_probs(keys, torch.from_numpy(store.values).long()).mean())
    assert likelihood[1] == pytest.approx(-math.log(2), abs=0.02)
    assert likelihood[2] > -0.05


# -- bad input ---------------------------------------------------------------------------------------------------


def test_bad_input_is_named(tmp_path):
    scores, values = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long)
    for call, message in [
        (lambda: knn_log_probs(scores, values, 5, 0.0), "temperature"),
        (lambda: knn_log_probs(scores, values, 5, math.inf), "temperature"),
        (lambda: knn_log_probs(scores, values[:, :2], 5), "one shape"),
        (lambda: knn_log_probs(scores, values + 5, 5), "values must lie"),
        (lambda: knn_log_probs(torch.full((2, 3), -torch.inf), values, 5), "row 0 has no neighbour"),
        (lambda: knn_log_probs(torch.full((2, 3), torch.nan), values, 5), "no number"),
        (lambda: knn_target_log_probs(scores, values, torch.zeros(3)), "targets"),
        (lambda: interpolate(scores, scores, 1.1), "lam"),
        (lambda: interpolate(scores, scores, -0.1), "lam"),
        (lambda: interpolate(scores, scores[:1], 0.5), "shapes"),
        (lambda: generalized_log_probs(randn(2, 4), randn(5, 4), torch.arange(5), 5, k=6), "k must"),
        (lambda: generalized_log_probs(randn(2, 4), randn(5, 4), torch.arange(5), 5, similarity="cos"), "similarity"),
        (lambda: generalized_log_probs(randn(2, 4), randn(5, 3), torch.arange(5), 5), "rows, word_of_row"),
        (lambda: allot_rows(torch.ones(5), 4), "at least one per word"),
        (lambda: allot_rows(torch.zeros(5), 9), "zero for every word"),
        (lambda: allot_rows(-torch.ones(5), 9), "importance"),
        (lambda: OverparameterizedHead(randn(4, 2), torch.tensor([0, 0, 2, 2])), "word 1 has no row"),
        (lambda: OverparameterizedHead(randn(4, 2), torch.arange(3)), "must be"),
        (lambda: OverparameterizedHead.from_unembedding(randn(2, 2), torch.tensor([0, 2])), "at least 1"),
        (lambda: OverparameterizedHead.from_unembedding(randn(2, 2), torch.ones(2).long(), noise=1.0), "generator"),
        (lambda: OverparameterizedHead(randn(2, 2), torch.arange(2)).log_probs(randn(3, 5)), "width 2"),
        (lambda: build_datastore(tiny_model("gpt2"), [[3, 4]], tmp_path, keys=["other"], window=8), "keys must"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    model, store = tiny_model("gpt2"), random_store(20)
    for settings, message in [
        ({"k": 21}, "20 entries"),
        ({"k": 0}, "k must"),
        ({"lam": 2.0, "k": 5}, "lam"),
        ({"temperature": 0.0, "k": 5}, "temperature"),
        ({"key": "other", "k": 5}, "key must"),
    ]:
        with pytest.raises(ValueError, match=message):
            NearestNeighbourLM(model, store, **settings)
    with pytest.raises(ValueError, match="width 16"):
        NearestNeighbourLM(model, random_store(20, width=16), k=5)
    built = build_datastore(model, [[3, 4, 5]], tmp_path / "s", window=8)["ffn_input"]
    with pytest.raises(ValueError, match="were taken at"):
        NearestNeighbourLM(model, built, key="hidden", k=1)
    assert NearestNeighbourLM(model, built, k=1).site == KeySite("ffn_in", -1)


# -- the experiment ----------------------------------------------------------------------------------------------


def small_trial(**changes):
    reduced = {"training_documents": 2, "document_tokens": 40, "temperatures": [1, 10], "neighbours": [4, 16]}
    return Trial(
        "knn_lm", "smoke", 0, {**experiment.SCALES["smoke"], **reduced, **changes.pop("parameters", {})}, **changes
    )


def test_votes_of_fewer_neighbours_are_those_of_a_search_for_so_many():
    trial, store = small_trial(), random_store()
    splits = [
        experiment.Split({"ffn_input": randn(6, 32, seed=s)}, torch.arange(6) + s, torch.zeros(6)) for s in (1, 2)
    ]
    search = ExactSearch(store.keys)
    found = tuple(search.search(split.states["ffn_input"], 16) for split in splits)
    votes = experiment._votes(trial, store, found, *splits)
    assert set(votes) == {(k, tau) for k in (4, 16) for tau in (1, 10)}
    for (k, tau), log_probs in votes.items():
        for split, got in zip(splits, log_probs, strict=True):
            near = search.search(split.states["ffn_input"], k)
            expected = knn_log_probs(near.scores, values_of(store, near), VOCABULARY, tau)
            torch.testing.assert_close(got, expected[torch.arange(6), split.targets])


def test_training_loss_of_a_word_is_the_sum_over_its_places(tmp_path):
    model, texts = tiny_model("llama"), random_ids(3, 30)
    stores = build_datastore(model, texts.tolist(), tmp_path, keys=["hidden"], window=64, dtype="float32")
    found = experiment._training_loss(Checkpoint(model, None, "tiny", tmp_path), stores["hidden"], VOCABULARY)
    with torch.no_grad():
        nll = -model(texts).logits[:, :-1].log_softmax(-1).gather(2, texts[:, 1:, None])[..., 0]
    expected = torch.zeros(VOCABULARY).index_add_(0, texts[:, 1:].flatten(), nll.flatten())
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_a_trial_on_a_users_model_says_that_the_datastore_may_be_new_to_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERTRIAL_HOME", str(tmp_path / "home"))
    tokenizer = load("house:prose").tokenizer
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "mine")
    tokenizer.save_pretrained(tmp_path / "mine")
    trial = small_trial(model=str(tmp_path / "mine"))
    results = experiment.run(trial)
    assert "need not have been trained on" in trial.notes["datastore"]
    assert {"knn_ffn_input", "overparameterized_head", "head_2_rows_by_loss", "base_continued"} <= set(results)
    assert {"knn_ffn_input: neighbours", "knn_ffn_input: temperature", "base_continued: learning rate"} <= set(
        trial.notes
    )
    one = {"neighbours": [16], "heads": [["overparameterized_head", 3, "frequency", [1e-2]]], "continued_lrs": [1e-3]}
    house = small_trial(parameters=one)
    experiment.run(house)
    assert "datastore" not in house.notes
