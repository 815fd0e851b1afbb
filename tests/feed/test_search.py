"""The search index: what it finds first, and that it survives whatever happens to it."""

import datetime
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from papertrial.errors import UsageError
from papertrial.feed.search import Document, Filters, SearchIndex, fuse

VOCABULARY = [f"{stem}{tail}" for stem in ("tok", "gra", "lem", "vec", "sor", "pil") for tail in ("ano", "ibe", "uxa")]


class HashedWords:
    """A stand-in encoder: a text's vector is the sum of one fixed random vector per word."""

    name = "hashed-words"

    def encode(self, texts):
        vectors = np.zeros((len(texts), 384), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().split() or ["nothing"]:
                vectors[row] += np.random.default_rng(abs(hash_of(word))).normal(size=384)
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def hash_of(word: str) -> int:
    return int.from_bytes(word.encode("utf-8", "replace")[:12].ljust(12), "little")


def documents(count: int, seed: int = 0) -> list[Document]:
    source = random.Random(seed)
    made = []
    for key in range(count):
        in_scope = source.random() < 0.3
        made.append(
            Document(
                key=key,
                title=" ".join(source.choices(VOCABULARY, k=5)) + f" number{key}",
                abstract=" ".join(source.choices(VOCABULARY, k=60)),
                authors=(f"Ada Person{key}",),
                arxiv_id=f"2301.{key:05d}",
                slug=f"slug_{key}" if in_scope else None,
                family=source.choice(["attention", "decoding", "tokenization"]),
                published=None
                if source.random() < 0.1
                else datetime.date(2020, 1, 1) + datetime.timedelta(days=source.randrange(1500)),
            )
        )
    return made


def passes(document: Document, filters: Filters) -> bool:
    if filters.families is not None and document.family not in filters.families:
        return False
    if filters.since is not None and (document.published is None or document.published < filters.since):
        return False
    if filters.until is not None and (document.published is None or document.published > filters.until):
        return False
    if filters.in_scope is not None and filters.in_scope != (document.slug is not None):
        return False
    return filters.keys is None or document.key in filters.keys


@pytest.fixture
def papers() -> list[Document]:
    return documents(300)


@pytest.fixture
def index(tmp_path: Path, papers: list[Document]) -> SearchIndex:
    made = SearchIndex(tmp_path / "search", HashedWords())
    made.add(papers)
    made.commit(1)
    return made


# --- fusion


def test_fusion_never_ranks_a_paper_below_one_that_is_worse_in_both_halves():
    source = np.random.default_rng(3)
    lexical = dict(enumerate(source.uniform(0, 20, 50).tolist()))
    dense = dict(enumerate(source.uniform(-0.2, 1, 50).tolist()))
    fused = fuse(lexical, dense, 0.4)
    for one in range(50):
        for other in range(50):
            if lexical[one] >= lexical[other] and dense[one] >= dense[other]:
                assert fused[one] >= fused[other]


def test_fusion_with_one_half_alone_keeps_its_order():
    lexical, dense = {1: 3.0, 2: 9.0, 3: 1.0}, {1: 0.9, 2: 0.1, 3: 0.5}
    by_words, by_meaning = fuse(lexical, dense, 1.0), fuse(lexical, dense, 0.0)
    assert sorted(by_words, key=by_words.get) == [3, 1, 2]
    assert sorted(by_meaning, key=by_meaning.get) == [2, 3, 1]


def test_fusion_does_not_depend_on_the_scale_of_bm25():
    lexical, dense = {1: 3.0, 2: 9.0}, {1: 0.9, 3: 0.5}
    scaled = {key: 7.0 * score for key, score in lexical.items()}
    assert fuse(lexical, dense) == pytest.approx(fuse(scaled, dense))


def test_fusion_of_nothing_is_nothing_and_zero_scores_do_not_divide_by_zero():
    assert fuse({}, {}) == {}
    assert fuse({1: 0.0}, {1: -0.5}) == {1: 0.0}
    with pytest.raises(ValueError, match="weight"):
        fuse({}, {}, 1.5)


# --- what comes first


@pytest.mark.parametrize("mode", ["hybrid", "lexical", "dense"])
@pytest.mark.parametrize(
    "query",
    [
        "2301.00042",
        "2301.00042v3",
        "arXiv:2301.00042",
        "ARXIV: 2301.00042v12",
        "https://arxiv.org/abs/2301.00042v2",
        "http://www.arxiv.org/pdf/2301.00042.pdf",
        "https://huggingface.co/papers/2301.00042",
    ],
)
def test_an_arxiv_id_in_any_form_gives_that_paper_alone(index: SearchIndex, query: str, mode: str):
    assert [hit.key for hit in index.search(query, mode=mode).hits] == [42]


def test_an_arxiv_id_that_is_not_here_gives_nothing_and_says_so(index: SearchIndex):
    result = index.search("2301.99999")
    assert result.hits == ()
    assert result.notice is not None
    assert result.notice.code == "unknown-id"


@pytest.mark.parametrize("mode", ["hybrid", "lexical", "dense"])
def test_every_title_finds_its_paper_first(index: SearchIndex, papers: list[Document], mode: str):
    for paper in papers[::7]:
        assert index.search(f"  {paper.title.upper()}. ", mode=mode).hits[0].key == paper.key


def test_a_slug_finds_its_paper_first_however_its_words_are_joined(index: SearchIndex, papers: list[Document]):
    paper = next(paper for paper in papers if paper.slug)
    for query in (paper.slug, paper.slug.replace("_", " "), paper.slug.replace("_", "-").upper()):
        assert index.search(query).hits[0].key == paper.key
        assert index.search(query).hits[0].exact


def test_an_author_is_found(index: SearchIndex):
    assert index.search("Person17", mode="lexical").hits[0].key == 17


# --- modes and degrading


def test_without_encoder_search_goes_by_words_and_says_so(tmp_path: Path, papers: list[Document]):
    index = SearchIndex(tmp_path / "search", None)
    index.add(papers)
    index.commit(1)
    result = index.search(papers[5].title)
    assert result.mode == "lexical"
    assert result.notice is not None
    assert result.notice.code == "encoder-missing"
    assert result.hits[0].key == 5


def test_missing_package_degrades_to_words(tmp_path: Path, papers: list[Document], monkeypatch: pytest.MonkeyPatch):
    from papertrial.feed import encoder

    monkeypatch.setattr(encoder, "MODULE", "no_such_package_here")
    monkeypatch.setattr(encoder, "_shared", None)
    index = SearchIndex(tmp_path / "search")
    index.add(papers[:20])
    index.commit(1)
    result = index.search(papers[5].title)
    assert (result.mode, result.hits[0].key) == ("lexical", 5)
    assert result.notice is not None
    assert "papertrial[encoder]" in result.notice.message


def test_papers_indexed_without_the_encoder_are_still_found_in_hybrid_mode(tmp_path: Path, papers: list[Document]):
    SearchIndex(tmp_path / "search", None).commit(0)
    without = SearchIndex(tmp_path / "search", None)
    without.add(papers[:10])
    without.commit(1)
    index = SearchIndex(tmp_path / "search", HashedWords())
    assert index.search("tokano").notice.code == "not-encoded"
    index.add(papers[10:20])
    index.commit(2)
    assert (len(index), index.encoded) == (20, 10)
    result = index.search(" ".join(papers[3].title.split()[:4]), limit=20)
    assert result.mode == "hybrid"
    assert result.notice.code == "not-encoded"
    assert 3 in [hit.key for hit in result.hits]


def test_vectors_of_another_encoder_are_not_mixed_with_this_ones(index: SearchIndex, papers: list[Document]):
    other = HashedWords()
    other.name = "hashed-words-2"
    reopened = SearchIndex(index.folder, other)
    assert reopened.search("tokano").notice.code == "not-encoded"
    reopened.add(papers[:5])
    reopened.commit(2)
    assert (len(reopened), reopened.encoded) == (300, 5)


def test_an_update_without_encoder_takes_the_old_vector_away(index: SearchIndex, papers: list[Document]):
    without = SearchIndex(index.folder, None)
    without.add([Document(7, "entirely new words")])
    without.commit(2)
    assert index.encoded == 299
    assert 7 not in index.vectors([7])


def test_unchanged_texts_are_not_encoded_again(tmp_path: Path, papers: list[Document]):
    class Counting(HashedWords):
        texts = 0

        def encode(self, texts):
            Counting.texts += len(texts)
            return super().encode(texts)

    index = SearchIndex(tmp_path / "search", Counting())
    index.add(papers)
    index.commit(1)
    assert Counting.texts == 300
    index.add([*papers[:100], Document(7, "entirely new words")])
    index.commit(2)
    assert Counting.texts == 301
    index.clear()
    index.add(papers)
    index.commit(3)
    assert Counting.texts == 302
    assert (len(index), index.encoded) == (300, 300)


# --- filters and pages


FILTERS = [
    Filters(families=["attention"]),
    Filters(families=[]),
    Filters(families=["no such family"]),
    Filters(since=datetime.date(2021, 6, 1)),
    Filters(until=datetime.date(2021, 6, 1)),
    Filters(since=datetime.date(2021, 1, 1), until=datetime.date(2022, 1, 1), in_scope=True),
    Filters(in_scope=False, families=["decoding", "tokenization"]),
    Filters(keys={1, 5, 9, 200, 4000}),
    Filters(keys=set()),
]


@pytest.mark.parametrize("mode", ["lexical", "dense"])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_filters_give_what_filtering_the_whole_ranking_gives(
    index: SearchIndex, papers: list[Document], filters: Filters, mode: str
):
    query = "tokano grauxa lemibe"
    everything = index.search(query, limit=300, mode=mode).hits
    wanted = [hit.key for hit in everything if passes(papers[hit.key], filters)]
    assert [hit.key for hit in index.search(query, limit=300, mode=mode, filters=filters).hits] == wanted


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_hybrid_hits_pass_the_filters(index: SearchIndex, papers: list[Document], filters: Filters):
    found = index.search("tokano grauxa", limit=300, filters=filters).hits
    assert {hit.key for hit in found} == {paper.key for paper in papers if passes(paper, filters)}


def test_filters_hold_for_exact_names_too(index: SearchIndex):
    assert index.search("2301.00042", filters=Filters(keys={7})).hits == ()


def test_pages_are_cut_from_one_ranking(index: SearchIndex):
    whole = [hit.key for hit in index.search("tokano sorano", limit=100).hits]
    pages = [hit.key for start in range(0, 100, 9) for hit in index.search("tokano sorano", limit=9, offset=start).hits]
    assert pages[:100] == whole


def test_ties_are_broken_by_key(tmp_path: Path):
    index = SearchIndex(tmp_path / "search", HashedWords())
    for keys in ((9, 3), (7, 1, 5)):
        index.add([Document(key, "the very same title", "and the same abstract") for key in keys])
        index.commit(max(keys))
    for mode in ("hybrid", "lexical", "dense"):
        assert [hit.key for hit in index.search("same abstract", mode=mode).hits] == [1, 3, 5, 7, 9]


# --- hostile queries


@pytest.mark.parametrize(
    "query",
    [
        '"unbalanced',
        "title:tokano AND (OR NOT",
        "a^b~2 [x TO y] {z} \\ / * ?",
        "\x00\x01\x1b[31m",
        "\ud800 lone surrogate",
        "tokano" * 600,
        "a " * 1900,
        "٣٤ 漢字 ﬁ e\u0301 🧪",
        "the of and",
        "slug  state content current",
        "2301.00042 2301.00043",
        "'; drop table papers; --",
    ],
)
@pytest.mark.parametrize("mode", ["hybrid", "lexical", "dense"])
def test_no_query_is_an_error(index: SearchIndex, query: str, mode: str):
    for hit in index.search(query, mode=mode).hits:
        assert 0 <= hit.key < 300


@pytest.mark.parametrize("query", ["", "   \n", "x" * 4001])
def test_empty_and_endless_queries_are_usage_errors(index: SearchIndex, query: str):
    with pytest.raises(UsageError, match="query"):
        index.search(query)


@pytest.mark.parametrize("arguments", [{"limit": 0}, {"offset": -1}, {"limit": 1001}, {"mode": "best"}, {"weight": 2}])
def test_impossible_arguments_are_usage_errors(index: SearchIndex, arguments: dict):
    with pytest.raises(UsageError):
        index.search("tokano", **arguments)


# --- similar


def test_similar_papers_are_the_nearest_others(index: SearchIndex, papers: list[Document]):
    stored = index.vectors(range(300))
    matrix = np.stack([stored[key] for key in range(300)])
    wanted = [int(key) for key in np.argsort(-(matrix @ matrix[8])) if key != 8][:10]
    assert [hit.key for hit in index.similar(8, 10).hits] == wanted


# --- keeping in step


def ranking(index: SearchIndex, query: str, mode: str) -> dict[int, float]:
    return {hit.key: hit.score for hit in index.search(query, limit=60, mode=mode).hits}


def test_an_index_grown_in_steps_equals_one_made_at_once(tmp_path: Path, papers: list[Document]):
    steps = SearchIndex(tmp_path / "steps", HashedWords())
    steps.add([Document(paper.key, "an earlier version") for paper in papers[:150]])
    steps.commit(1)
    for revision, start in enumerate(range(0, 300, 60), start=2):
        steps.add(papers[start : start + 60])
        steps.commit(revision)
    steps.remove(range(250, 300))
    steps.commit(9)
    once = SearchIndex(tmp_path / "once", HashedWords())
    once.add(papers[:250])
    once.commit(9)
    assert (len(steps), steps.encoded, steps.revision) == (len(once), once.encoded, once.revision) == (250, 250, 9)
    for query in ("tokano number17 sorano", "lemibe pilano", papers[100].abstract):
        one, other = ranking(steps, query, "dense"), ranking(once, query, "dense")
        assert one == other
        # BM25's document counts keep deleted papers until tantivy merges their segments
        one, other = ranking(steps, query, "hybrid"), ranking(once, query, "hybrid")
        assert len(one.keys() & other.keys()) >= 50
        assert all(abs(one[key] - other[key]) < 0.05 for key in one.keys() & other.keys())


def test_changes_are_seen_after_the_commit_only_and_by_every_reader(index: SearchIndex, papers: list[Document]):
    reader = SearchIndex(index.folder, HashedWords())
    index.add([Document(1000, "unheardof subject")])
    index.remove([0])
    assert reader.search("unheardof").hits[0].key != 1000
    assert index.search("unheardof", mode="lexical").hits == ()
    index.commit(2)
    assert reader.search("unheardof").hits[0].key == 1000
    assert (reader.revision, len(reader)) == (2, 300)
    index.add([Document(1001, "unheardof again")])
    index.rollback()
    index.commit(3)
    assert [hit.key for hit in reader.search("unheardof", mode="lexical").hits] == [1000]


def test_the_last_of_two_additions_and_a_removal_count(tmp_path: Path):
    index = SearchIndex(tmp_path / "search", HashedWords())
    index.add([Document(1, "first words"), Document(1, "second words"), Document(2, "other matter")])
    index.add([Document(2, "third words")])
    index.add([Document(3, "gone words")])
    index.remove([3])
    index.commit(1)
    assert (len(index), index.encoded) == (2, 2)
    assert {hit.key for hit in index.search("words", mode="lexical").hits} == {1, 2}
    assert index.search("first other gone", mode="lexical").hits == ()


def test_given_vectors_must_fit_their_documents(tmp_path: Path):
    index = SearchIndex(tmp_path / "search", None)
    for rows in (0, 1, 3):
        with pytest.raises(ValueError, match="vectors"):
            index.add([Document(1, "a"), Document(2, "b")], vectors=np.ones((rows, 384), dtype=np.float32))
    with pytest.raises(ValueError, match="revision"):
        index.commit(-1)
    with pytest.raises(ValueError, match="key"):
        Document(-4, "negative")


WRITER = """
    import sys
    sys.path.insert(0, {tests!r})
    from test_search import Document, HashedWords
    from papertrial.feed.search import SearchIndex
    from pathlib import Path
    index = SearchIndex(Path({folder!r}), HashedWords())
    revision = index.revision
    while True:
        revision += 1
        print(revision, flush=True)
        # every revision replaces all 40 papers and adds and removes one
        index.add([Document(key, f"title{{key}} revision{{revision}}") for key in range(40)])
        index.add([Document(100 + revision, f"only in revision{{revision}}")])
        index.remove([99 + revision])
        index.commit(revision)
"""


def test_a_killed_writer_leaves_the_old_revision_or_the_new_one(tmp_path: Path):
    folder = tmp_path / "search"
    script = textwrap.dedent(WRITER).format(tests=str(Path(__file__).parent), folder=str(folder))
    source = random.Random(11)
    reader = SearchIndex(folder, HashedWords())
    seen = 0
    for _ in range(8):
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(source.randrange(1, 4)):
                announced = int(writer.stdout.readline())
            time.sleep(source.uniform(0, 0.15))
            os.kill(writer.pid, signal.SIGKILL)
            rest = writer.stdout.read().split()
            announced = int(rest[-1]) if rest else announced
        revision = reader.revision
        assert seen <= revision <= announced
        assert revision >= announced - 1
        seen = revision
        if revision:
            assert (len(reader), reader.encoded) == (41, 41)
            current = reader.search(f"revision{revision}", limit=100, mode="lexical").hits
            assert {hit.key for hit in current} == {*range(40), 100 + revision}
            assert reader.search(f"revision{revision - 1} revision{revision + 1}", mode="lexical").hits == ()
            assert {hit.key for hit in reader.search("title", limit=100, mode="dense").hits} == {
                *range(40),
                100 + revision,
            }
    assert seen > 3
    index = SearchIndex(folder, HashedWords())  # the next writer goes on, and cleans up
    index.commit(seen + 1)
    named = {path.name.split("-")[0] for path in (folder / "index" / "dense").glob("*.codes.npy")}
    assert len(list((folder / "index" / "dense").iterdir())) <= 3 * len(named) + 1


# --- damage


def damages() -> list[str]:
    return ["*.term", "*.idx", "*.store", "*.fast", "meta.json", "*.codes.npy", "*.rows.npy"]


@pytest.mark.parametrize("how", ["cut", "empty", "remove"])
@pytest.mark.parametrize("pattern", damages())
def test_a_damaged_index_starts_anew_and_says_so_by_its_revision(
    index: SearchIndex, papers: list[Document], pattern: str, how: str
):
    chosen = list((index.folder / "index").rglob(pattern))
    assert chosen
    for path in chosen:
        content = path.read_bytes()
        path.unlink()
        if how != "remove":
            path.write_bytes(b"" if how == "empty" else content[: len(content) // 2])
    again = SearchIndex(index.folder, HashedWords())
    assert again.revision == 0
    assert again.search("tokano").hits == ()
    again.add(papers)
    again.commit(5)
    assert (again.revision, len(again), again.encoded) == (5, 300, 300)
    assert again.search(papers[3].title).hits[0].key == 3
    assert not list(index.folder.glob("damaged-*"))


def test_vectors_outlive_damage_to_the_words(index: SearchIndex, papers: list[Document]):
    class Refusing(HashedWords):
        def encode(self, texts):
            raise AssertionError("these texts were encoded before")

    (index.folder / "index" / "lexical" / "meta.json").write_text("{")
    again = SearchIndex(index.folder, Refusing())
    again.add(papers)
    again.commit(2)
    assert again.encoded == 300
