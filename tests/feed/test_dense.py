"""Vector search against brute force, and the segments' bookkeeping against a plain dictionary."""

import datetime
import random
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("usearch")

from papertrial.feed.dense import DenseCorrupt, DenseSnapshot, DenseStore, SegmentState, describe, quantize
from papertrial.feed.lexical import Document, Filters

D = 48


def unit(count: int, seed: int = 0, clusters: int = 0) -> np.ndarray:
    source = np.random.default_rng(seed)
    vectors = source.normal(size=(count, D)).astype(np.float32)
    if clusters:
        vectors = (
            0.6 * vectors + source.normal(size=(clusters, D)).astype(np.float32)[source.integers(0, clusters, count)]
        )
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def paper(key: int) -> Document:
    published = None if key % 11 == 0 else datetime.date(2020, 1, 1) + datetime.timedelta(days=key % 700)
    family = ("attention", "decoding", None)[key % 3]
    return Document(key, "t", slug="s" if key % 4 == 0 else None, family=family, published=published)


class Grown:
    """A store and, beside it, what it should hold."""

    def __init__(self, folder: Path, **options: int) -> None:
        self.store = DenseStore(folder, D, **options)
        self.states: list[SegmentState] = []
        self.truth: dict[int, np.ndarray] = {}
        self.commits = 0

    @property
    def snapshot(self) -> DenseSnapshot:
        return self.store.open(self.states)

    def advance(self, keys: list[int], vectors: np.ndarray, removed: list[int] = ()) -> None:  # type: ignore[assignment]
        codes = quantize(vectors)
        rows = describe([paper(key) for key in keys], [key * 7 for key in keys])
        self.commits += 1
        self.states = self.store.advance(self.snapshot, rows, codes, removed, f"c{self.commits}")
        self.store.clean(self.states)
        for key in removed:
            self.truth.pop(key, None)
        self.truth.update(zip(keys, codes, strict=True))

    def brute_force(self, query: np.ndarray, limit: int, keep=lambda key: True) -> list[tuple[int, float]]:
        keys = [key for key in self.truth if keep(key)]
        if not keys:
            return []
        vectors = np.stack([self.truth[key] for key in keys]).astype(np.float64)
        scores = vectors @ query / np.linalg.norm(vectors, axis=1)
        return sorted(zip(keys, scores.tolist(), strict=True), key=lambda hit: (-hit[1], hit[0]))[:limit]


def same(found: list[tuple[int, float]], wanted: list[tuple[int, float]]) -> None:
    assert [key for key, _ in found] == [key for key, _ in wanted]
    np.testing.assert_allclose([s for _, s in found], [s for _, s in wanted], atol=2e-6)  # float32 sums


def test_quantized_vectors_keep_their_direction():
    vectors = unit(500)
    codes = quantize(vectors).astype(np.float32)
    cosines = (codes * vectors).sum(axis=1) / np.linalg.norm(codes, axis=1)
    assert cosines.min() > 0.9995
    assert not quantize(np.zeros((1, D), dtype=np.float32)).any()


def test_exact_search_equals_brute_force_while_the_store_grows_and_shrinks(tmp_path: Path):
    grown = Grown(tmp_path)
    source = random.Random(4)
    for step in range(25):
        keys = source.sample(range(2000), source.choice([1, 5, 120, 400]))
        present = sorted(grown.truth)
        removed = source.sample(present, min(len(present), source.choice([0, 3, 150])))
        removed = [key for key in removed if key not in keys] + [99_999]
        grown.advance(keys, unit(len(keys), seed=step), removed)
        snapshot = grown.snapshot
        assert len(snapshot) == len(grown.truth)
        for query in unit(3, seed=1000 + step):
            same(snapshot.search(query, 10, Filters()), grown.brute_force(query, 10))
    assert len(grown.states) <= 8  # merged as they pile up
    files = {path.name for path in tmp_path.iterdir()}
    assert len(files) <= 3 * len(grown.states)  # nothing that no state names is left


def test_ties_come_in_the_order_of_keys(tmp_path: Path):
    grown = Grown(tmp_path)
    vector = unit(1)
    for keys in ([9, 2], [7], [1, 8]):
        grown.advance(keys, np.repeat(vector, len(keys), axis=0))
    assert [key for key, _ in grown.snapshot.search(vector[0], 4, Filters())] == [1, 2, 7, 8]


@pytest.fixture(scope="module")
def with_graph(tmp_path_factory: pytest.TempPathFactory) -> Grown:
    """6,000 vectors in a graph grown by two merges, with deletions on top."""
    grown = Grown(tmp_path_factory.mktemp("graph"), exact_rows=1000)
    vectors = unit(6000, clusters=60)
    for start in range(0, 6000, 2000):
        grown.advance(list(range(start, start + 2000)), vectors[start : start + 2000])
    grown.advance([5, 6], unit(2, seed=9), list(range(100, 600)))
    return grown


def test_the_graph_finds_nearly_all_of_the_ten_nearest(with_graph: Grown):
    assert any(state.graph for state in with_graph.states)
    snapshot, shares = with_graph.snapshot, []
    for query in unit(100, seed=5, clusters=60):
        found = snapshot.search(query, 10, Filters())
        wanted = with_graph.brute_force(query, 10)
        scores = dict(with_graph.brute_force(query, 6000))
        assert all(score == pytest.approx(scores[key], abs=2e-6) for key, score in found)
        shares.append(len({key for key, _ in found} & {key for key, _ in wanted}) / 10)
    assert np.mean(shares) >= 0.97


def test_removed_papers_do_not_come_out_of_the_graph(with_graph: Grown):
    snapshot = with_graph.snapshot
    for query in unit(20, seed=6):
        assert not {key for key, _ in snapshot.search(query, 200, Filters())} & set(range(100, 600))


FILTERS = [
    (Filters(families=["attention"]), lambda p: p.family == "attention"),
    (Filters(in_scope=True, families=["decoding"]), lambda p: p.family == "decoding" and p.slug is not None),
    (Filters(in_scope=False), lambda p: p.slug is None),
    (
        Filters(since=datetime.date(2020, 6, 1), until=datetime.date(2020, 6, 30)),
        lambda p: p.published is not None and datetime.date(2020, 6, 1) <= p.published <= datetime.date(2020, 6, 30),
    ),
    (
        Filters(until=datetime.date(2021, 1, 1)),
        lambda p: p.published is not None and p.published <= datetime.date(2021, 1, 1),
    ),
    (Filters(keys=set(range(0, 6000, 9))), lambda p: p.key % 9 == 0),
    (Filters(families=[]), lambda p: False),
]


@pytest.mark.parametrize(("filters", "keep"), FILTERS, ids=[str(filters)[:60] for filters, _ in FILTERS])
def test_filtered_search_equals_brute_force(with_graph: Grown, filters: Filters, keep):
    snapshot = with_graph.snapshot
    for query in unit(5, seed=7, clusters=60):
        wanted = with_graph.brute_force(query, 10, lambda key: keep(paper(key)))
        same(snapshot.search(query, 10, filters), wanted)


def test_cosines_vectors_and_known_texts_are_looked_up_by_key(with_graph: Grown):
    snapshot, query = with_graph.snapshot, unit(1, seed=8)[0]
    everything = dict(with_graph.brute_force(query, 6000))
    found = snapshot.cosines(query, [3, 5, 150, 5999, 70_000])
    assert found.keys() == {3, 5, 5999}
    assert all(score == pytest.approx(everything[key], abs=2e-6) for key, score in found.items())
    assert snapshot.vector(150) is None
    np.testing.assert_allclose(snapshot.vector(5) @ query, everything[5], atol=2e-6)
    known = snapshot.known([3, 4, 150], [21, 999, 1050])
    assert known.keys() == {3}
    np.testing.assert_array_equal(known[3], with_graph.truth[3])


def test_an_older_snapshot_still_answers_after_its_files_were_cleaned_away(tmp_path: Path):
    grown = Grown(tmp_path)
    vectors = unit(300)
    grown.advance(list(range(300)), vectors)
    before = grown.snapshot
    grown.advance([1], unit(1, seed=3), list(range(2, 300)))
    assert len(before) == 300
    assert before.search(vectors[200], 1, Filters())[0][0] == 200
    assert len(grown.snapshot) == 2


@pytest.mark.parametrize("suffix", ["codes.npy", "rows.npy", "usearch"])
def test_files_that_are_cut_short_are_noticed(tmp_path: Path, suffix: str):
    grown = Grown(tmp_path, exact_rows=100)
    grown.advance(list(range(400)), unit(400))
    (path,) = tmp_path.glob(f"*.{suffix}")
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DenseCorrupt):
        grown.snapshot.search(unit(1)[0], 5, Filters())


def test_a_state_that_does_not_fit_its_files_is_noticed(tmp_path: Path):
    grown = Grown(tmp_path)
    grown.advance(list(range(40)), unit(40))
    with pytest.raises(DenseCorrupt):
        grown.store.open([SegmentState(grown.states[0].name, 41)])
    with pytest.raises(FileNotFoundError):
        grown.store.open([SegmentState("never-written", 40)])


def test_a_key_given_twice_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="twice"):
        Grown(tmp_path).advance([1, 1], unit(2))
