"""Recommendations: against scikit-learn and closed forms, and that the words shown are the reason."""

import math
from datetime import timedelta

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from papertrial.feed.records import Record
from papertrial.feed.store import Store
from papertrial.site.people.recommend import FRESH_SECONDS, STRENGTH, Recommender, fit, terms, tfidf
from site_service import TODAY, Site

TOPICS = {
    "quantization": "We quantize weights of language models to four bits with calibrated scales and small loss.",
    "retrieval": "Dense retrieval of passages helps question answering with an index of documents.",
    "speech": "Acoustic encoders for speech recognition learn phonemes from raw audio waveforms.",
}


def topic_records(n: int) -> list[Record]:
    return [
        Record(
            source="arxiv",
            title=f"Study {i} of {topic}",
            arxiv_id=f"2605.{k}{i:04d}",
            abstract=f"{text} Variant {i}.",
            published=TODAY - timedelta(days=i),
        )
        for k, (topic, text) in enumerate(TOPICS.items(), start=1)
        for i in range(n)
    ]


def test_terms_are_words_and_pairs_without_function_words() -> None:
    assert terms("The Low-Rank adapters of a model") == ["low-rank", "adapters", "model", "low-rank adapters"]


def test_tfidf_is_what_scikit_learn_computes() -> None:
    text = pytest.importorskip("sklearn.feature_extraction.text")
    texts = [record.title + " " + (record.abstract or "") for record in topic_records(6)]
    mine, vocabulary = tfidf(texts)
    peer = text.TfidfVectorizer(analyzer=terms, sublinear_tf=True, min_df=2, max_df=len(texts) // 2)
    theirs = peer.fit_transform(texts)
    assert vocabulary == list(peer.get_feature_names_out())
    np.testing.assert_allclose(mine.toarray(), theirs.toarray(), atol=1e-12)


def test_the_regression_is_what_scikit_learn_fits() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    generator = np.random.default_rng(0)
    dense = generator.normal(size=(60, 8))
    chosen = dense[:, 0] + 0.5 * generator.normal(size=60) > 0.8
    weights, bias = fit(csr_matrix(dense), chosen)
    # Their C stands at the sum of losses, ours at the mean; and "balanced" gives each class weight n / (2 n_class).
    peer = linear.LogisticRegression(C=STRENGTH, class_weight="balanced", tol=1e-10, max_iter=10_000)
    peer.fit(dense, chosen)
    np.testing.assert_allclose(weights, peer.coef_[0], atol=2e-3)  # L-BFGS stops at a gradient of 1e-5
    assert bias == pytest.approx(peer.intercept_[0], abs=2e-3)


def test_the_regression_is_at_a_minimum() -> None:
    generator = np.random.default_rng(1)
    dense = generator.normal(size=(40, 5))
    chosen = generator.random(40) > 0.7
    weights, bias = fit(csr_matrix(dense), chosen)

    def loss(w: np.ndarray, b: float) -> float:
        sign = np.where(chosen, 1.0, -1.0)
        share = np.where(chosen, 0.5 / chosen.sum(), 0.5 / (~chosen).sum())
        return float(share @ np.log1p(np.exp(-sign * (dense @ w + b))) + w @ w / (2 * STRENGTH * 40))

    best = loss(weights, bias)
    for _ in range(50):
        assert loss(weights + 0.01 * generator.normal(size=5), bias + 0.01 * generator.normal()) >= best - 1e-9


@pytest.fixture
def store(home: object) -> Store:
    opened = Store.open()
    opened.upsert(topic_records(30))
    return opened


def ids(store: Store, topic: int, numbers: range) -> list[int]:
    found = [store.find(f"2605.{topic}{i:04d}") for i in numbers]
    return [paper.id for paper in found if paper is not None]


@pytest.mark.parametrize("topic", [1, 2, 3])
def test_papers_of_the_tagged_topic_come_first_and_its_words_are_the_reason(store: Store, topic: int) -> None:
    tagged = ids(store, topic, range(5))
    found = Recommender(store).recommend(tagged, limit=20)
    rest = set(ids(store, topic, range(5, 30)))
    assert {item.paper_id for item in found.items} <= rest
    assert found.learned_from == 5
    name = list(TOPICS)[topic - 1]
    of_topic = set(terms(f"Study of {name} . {TOPICS[name]}"))
    for item in found.items:
        assert item.score > 0.5
        assert item.words
        assert {word for word, _ in item.words} <= of_topic
        assert [adds for _, adds in item.words] == sorted((adds for _, adds in item.words), reverse=True)


def test_a_score_is_the_sum_of_what_its_words_add(store: Store) -> None:
    tagged = ids(store, 1, range(5))
    recommender = Recommender(store)
    found = recommender.recommend(tagged, limit=3, words=10_000)
    features = recommender._features
    assert features is not None
    _, bias = fit(features.matrix, np.isin(features.ids, tagged))
    weights, _ = fit(features.matrix, np.isin(features.ids, tagged))
    for item in found.items:
        row = features.matrix[int(np.flatnonzero(features.ids == item.paper_id)[0])]
        against = sum(min(0.0, v * weights[i]) for i, v in zip(row.indices, row.data, strict=True))
        total = math.fsum(adds for _, adds in item.words) + against + bias
        assert 1 / (1 + math.exp(-total)) == pytest.approx(item.score, abs=0.01)  # words are rounded to 3 digits


def test_hidden_and_tagged_papers_are_not_recommended_and_the_answer_is_always_the_same(store: Store) -> None:
    tagged, hidden = ids(store, 2, range(4)), ids(store, 2, range(4, 10))
    first = Recommender(store).recommend(tagged, limit=50, leave_out=hidden)
    assert not {item.paper_id for item in first.items} & {*tagged, *hidden}
    assert first == Recommender(store).recommend(list(reversed(tagged)), limit=50, leave_out=set(hidden))


def test_nothing_tagged_recommends_nothing(store: Store) -> None:
    assert Recommender(store).recommend([]).items == ()


def test_new_papers_are_seen_after_a_while_and_tagged_ones_at_once(store: Store) -> None:
    now = [0.0]
    recommender = Recommender(store, clock=lambda: now[0])
    tagged = ids(store, 1, range(3))
    recommender.recommend(tagged)
    new = Record(source="arxiv", title="Quantize weights to four bits", arxiv_id="2606.00001", published=TODAY)
    store.upsert([new])
    paper = store.find("2606.00001")
    assert paper is not None
    assert paper.id not in {item.paper_id for item in recommender.recommend(tagged, limit=200).items}
    now[0] += FRESH_SECONDS + 1
    assert paper.id in {item.paper_id for item in recommender.recommend(tagged, limit=200).items}


def test_recommendations_over_the_api(site: Site) -> None:
    site.context.store.upsert(topic_records(12))
    browser = site.sign_in()
    for i in range(3):
        assert browser.client.put(f"/api/papers/2605.1{i:04d}/tags/compression").status_code == 200
    found = browser.client.get("/api/recommendations", params={"tag": "compression", "limit": 5}).json()
    assert found["learned_from"] == 3
    assert all(entry["paper"]["id"].startswith("2605.1") for entry in found["papers"])
    assert all(entry["because"] for entry in found["papers"])
    assert browser.client.get("/api/recommendations", params={"tag": "none"}).status_code == 404
    assert site.client.get("/api/recommendations").status_code == 401
