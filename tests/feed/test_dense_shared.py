"""The vectors in PostgreSQL against the files: the same answers, made once for all machines."""

import datetime
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

pytest.importorskip("usearch")

from papertrial.errors import PapertrialError
from papertrial.feed import database, schema
from papertrial.feed.catalogue import document, open_index, update_index
from papertrial.feed.dense_shared import SharedVectors, paper_vectors
from papertrial.feed.lexical import Filters
from papertrial.feed.records import Record
from papertrial.feed.search import SearchIndex
from papertrial.feed.store import Store

WORDS = [f"{stem}{tail}" for stem in ("tok", "gra", "lem", "vec", "sor", "pil") for tail in ("ano", "ibe", "uxa")]
FAMILIES = ("attention", "decoding", "tokenization")


class CountingEncoder:
    """A text's vector is drawn from a seed that is the text; it counts what it was given."""

    def __init__(self, name="drawn"):
        self.name, self.texts = name, 0

    def encode(self, texts):
        self.texts += len(texts)
        return np.stack([drawn(text) for text in texts])


def drawn(text):
    vector = np.zeros(384)
    for word in text.lower().split() or ["nothing"]:
        vector += np.random.default_rng(list(word.encode())).normal(size=384)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def record(number, **changes):
    source = np.random.default_rng(number)
    published = datetime.date(2021, 1, 1) + datetime.timedelta(days=number * 3 % 900)
    fields = {
        "source": "card" if number % 4 == 0 else "arxiv",
        "title": " ".join(source.choice(WORDS, 5)) + f" number{number}",
        "abstract": " ".join(source.choice(WORDS, 40)),
        "arxiv_id": f"21{number % 12 + 1:02d}.{number:05d}",
        "published": None if number % 11 == 0 else published,
    }
    if number % 4 == 0:
        fields |= {"slug": f"paper_{number}", "family": FAMILIES[number % 3]}
    return Record(**(fields | changes))


FILTERS = {
    "none": Filters(),
    "one family": Filters(families=["decoding"]),
    "since": Filters(since=datetime.date(2022, 3, 1)),
    "a few days": Filters(since=datetime.date(2021, 5, 1), until=datetime.date(2021, 5, 4)),
    "until": Filters(until=datetime.date(2021, 2, 1)),
    "in scope": Filters(in_scope=True),
    "out of scope": Filters(in_scope=False),
    "keys": Filters(keys=[3, 50, 51, 52, 999]),
    "no keys": Filters(keys=[]),
    "nothing passes": Filters(families=["decoding"], until=datetime.date(1990, 1, 1)),
}


@pytest.fixture(scope="module")
def both(postgresql_server, tmp_path_factory):
    """The same papers indexed in files and in PostgreSQL."""
    from postgresql_server import new_database

    folder = tmp_path_factory.mktemp("indices")
    with new_database(postgresql_server) as url, Store.open(url) as store:
        store.upsert(record(number) for number in range(600))
        files = SearchIndex(folder / "files", CountingEncoder())
        shared = SearchIndex(folder / "shared", CountingEncoder(), vectors=SharedVectors(store.engine))
        update_index(store, files)
        update_index(store, shared)
        yield store, files, shared


def same(mine, theirs):
    assert [hit.key for hit in mine.hits] == [hit.key for hit in theirs.hits]
    for field in ("score", "dense", "lexical"):
        ours = [getattr(hit, field) for hit in mine.hits]
        others = [getattr(hit, field) for hit in theirs.hits]
        assert [value is None for value in ours] == [value is None for value in others]
        pairs = [(a, b) for a, b in zip(ours, others, strict=True) if a is not None]
        # both add up 384 products in single precision, in different orders
        np.testing.assert_allclose([a for a, _ in pairs], [b for _, b in pairs], atol=2e-6)
    assert (mine.mode, mine.notice) == (theirs.mode, theirs.notice)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("mode", ["dense", "hybrid"])
def test_search_finds_what_the_files_find(both, name, mode):
    _, files, shared = both
    for query in ("tokano graibe", "number17", "pilibe vecuxa soribe lemano"):
        for limit, offset in ((10, 0), (5, 20)):
            asked = {"mode": mode, "filters": FILTERS[name], "offset": offset}
            same(shared.search(query, limit, **asked), files.search(query, limit, **asked))


def test_similar_papers_are_those_of_the_files(both):
    store, files, shared = both
    for number in (1, 4, 33, 599):
        paper = store.by_arxiv_id(record(number).arxiv_id)
        same(shared.similar(paper.id, 7), files.similar(paper.id, 7))
        same(shared.similar(paper.id, 7, FILTERS["in scope"]), files.similar(paper.id, 7, FILTERS["in scope"]))
    assert shared.encoded == files.encoded == 600
    keys = [1, 2, 500]
    ours, theirs = shared.vectors([*keys, 10**6]), files.vectors([*keys, 10**6])
    assert sorted(ours) == sorted(theirs) == keys
    for key in keys:
        np.testing.assert_array_equal(ours[key], theirs[key])


def test_the_graph_is_walked_and_finds_nearly_all(postgresql_server, tmp_path):
    """Where a scan is dear, as with very many papers, search uses the graph and finds 19 of 20 true neighbours."""
    from postgresql_server import new_database

    count, source, plans = 3_000, np.random.default_rng(0), []
    centres = source.normal(size=(100, 384))
    vectors = centres[source.integers(0, 100, count)] + 0.8 * source.normal(size=(count, 384))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    with new_database(postgresql_server) as url, Store.open(url) as store:
        store.upsert(Record("page", f"Invented paper {number}") for number in range(count))
        papers = [change.paper for change in store.changes_since(0, 20_000)[0]]
        index = SearchIndex(tmp_path / "search", None, vectors=SharedVectors(store.engine))
        index.add([document(paper) for paper in papers], vectors)
        index.commit(store.revision())
        with store.writing() as connection:
            connection.execute(sa.text("ANALYZE paper_vectors"))
            connection.execute(sa.text(f"ALTER DATABASE {store.engine.url.database} SET enable_seqscan = off"))
        store.engine.dispose()  # what comes now has the setting

        @sa.event.listens_for(store.engine, "before_cursor_execute")
        def explain(connection, cursor, statement, parameters, context, executemany):
            if "MATERIALIZED" in statement and not plans:
                cursor.execute(f"EXPLAIN {statement}", parameters)
                plans.append(str(cursor.fetchall()))

        found = 0
        for place in range(0, count, 150):
            truth = np.argsort(-(vectors @ vectors[place]), kind="stable")[1:11]
            wanted = {papers[i].id for i in truth}
            found += len(wanted & {hit.key for hit in index.similar(papers[place].id, 10).hits})
        assert "ix_paper_vectors_codes" in plans[0]
        assert found >= 0.95 * 200


def test_a_second_machine_encodes_nothing_again(postgresql, tmp_path):
    with Store.open(postgresql) as store:
        store.upsert(record(number) for number in range(100))
        first = CountingEncoder()
        update_index(store, SearchIndex(tmp_path / "one", first, vectors=SharedVectors(store.engine)))
        second = CountingEncoder()
        index = SearchIndex(tmp_path / "two", second, vectors=SharedVectors(store.engine))
        update_index(store, index)
        assert (first.texts, second.texts, index.encoded) == (100, 0, 100)
        store.upsert([record(7, source="arxiv", abstract="quite another text")])
        update_index(store, index)
        assert second.texts == 1
        found = index.search("quite another text", 1, "dense").hits[0]
        assert found.key == store.by_arxiv_id(record(7).arxiv_id).id


def test_a_machine_without_the_encoder_leaves_the_vectors_of_the_others(postgresql, tmp_path):
    with Store.open(postgresql) as store:
        store.upsert(record(number) for number in range(20))
        index = SearchIndex(tmp_path / "one", CountingEncoder(), vectors=SharedVectors(store.engine))
        update_index(store, index)
        bare = SearchIndex(tmp_path / "two", None, vectors=SharedVectors(store.engine))
        update_index(store, bare)
        assert bare.search("tokano", 3).mode == "lexical"
        assert index.encoded == 20
        assert index.search("tokano", 3, "dense").mode == "dense"


def test_vectors_of_another_encoder_are_not_searched(postgresql, tmp_path):
    with Store.open(postgresql) as store:
        store.upsert(record(number) for number in range(20))
        update_index(store, SearchIndex(tmp_path / "one", CountingEncoder("old"), vectors=SharedVectors(store.engine)))
        index = SearchIndex(tmp_path / "two", CountingEncoder("new"), vectors=SharedVectors(store.engine))
        papers = [change.paper for change in store.changes_since(0)[0]]
        index.add([document(paper) for paper in papers[:5]])
        index.commit(1)
        assert {hit.key for hit in index.search("tokano", 20, "dense").hits} == {paper.id for paper in papers[:5]}


def test_a_vector_goes_with_its_paper(postgresql, tmp_path):
    with Store.open(postgresql) as store:
        store.upsert([record(number) for number in range(8)] + [Record("page", "Only a page knows it", slug="lonely")])
        index = SearchIndex(tmp_path / "one", CountingEncoder(), vectors=SharedVectors(store.engine))
        update_index(store, index)
        assert index.encoded == 9
        store.upsert([Record("card", "Only a page knows it", arxiv_id=record(3).arxiv_id)])  # they are one paper
        update_index(store, index)
        assert index.encoded == 8
        with store.reading() as connection:
            held = set(connection.execute(sa.select(paper_vectors.c.paper_id)).scalars())
            there = set(connection.execute(sa.select(schema.papers.c.id)).scalars())
        assert held == there


def _index(url, folder, barrier):
    barrier.wait(60)
    with Store.open(url) as store:
        update_index(store, SearchIndex(Path(folder), CountingEncoder(), vectors=SharedVectors(store.engine)))


def test_machines_that_index_at_once_do_not_get_in_each_others_way(postgresql, tmp_path):
    with Store.open(postgresql) as store:
        store.upsert(record(number) for number in range(300))
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    machines = [context.Process(target=_index, args=(postgresql, tmp_path / str(i), barrier)) for i in range(3)]
    for machine in machines:
        machine.start()
    for machine in machines:
        machine.join(120)
    assert [machine.exitcode for machine in machines] == [0] * 3
    with Store.open(postgresql) as store:
        index = SearchIndex(tmp_path / "0", CountingEncoder(), vectors=SharedVectors(store.engine))
        assert index.encoded == 300
        assert index.revision == store.revision()


def test_each_database_has_its_kind_of_vectors(database, tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERTRIAL_HOME", str(tmp_path))
    with Store.open(database) as store:
        store.upsert(record(number) for number in range(5))
        index = open_index(store, database, CountingEncoder())
        update_index(store, index)
        assert index.encoded == 5
        assert index.search("tokano", 3, "dense").mode == "dense"
        shared = store.engine.url.get_backend_name() == "postgresql"
        assert bool(list(tmp_path.rglob("*.codes.npy"))) == (not shared)


def test_postgresql_without_the_extension_is_refused_in_words(postgresql, monkeypatch):
    monkeypatch.setattr(database, "_EXTENSION", "vector_that_nobody_installed")
    with pytest.raises(PapertrialError, match=r"pgvector") as caught:
        Store.open(postgresql)
    assert "\n" not in str(caught.value)
