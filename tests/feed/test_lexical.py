"""Words: what counts as one, which of them select papers, and BM25 against its formula."""

import datetime
import math
from pathlib import Path

import pytest

from papertrial.feed.lexical import Document, Filters, LexicalIndex, normal_arxiv_id, query_words, readable, words

PAPERS = [
    Document(1, "Sparse attention", "attention heads attend to few tokens", ("Ann Long", "Bo Rich")),
    Document(2, "Long context", "a long context of many tokens makes long prompts slow", ("Cy Vaswani",)),
    Document(3, "Token pruning", "tokens that nobody attends to are dropped early", ("Dee Long",)),
    Document(4, "Long documents", "reading long documents in a long window", ("Eve Ohm",)),
]


@pytest.fixture
def index(tmp_path: Path) -> LexicalIndex:
    made = LexicalIndex(tmp_path)
    made.add(PAPERS)
    made.commit("first")
    return made


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("1706.03762", "1706.03762"),
        (" arXiv:1706.03762v7 ", "1706.03762"),
        ("arxiv : 2301.00001", "2301.00001"),
        ("https://arxiv.org/abs/1706.03762", "1706.03762"),
        ("arxiv.org/pdf/1706.03762v2.pdf", "1706.03762"),
        ("https://export.arxiv.org/abs/1706.03762?context=cs", "1706.03762"),
        ("https://arxiv.org/html/2401.00001v1#S2", "2401.00001"),
        ("https://huggingface.co/papers/2401.00001", "2401.00001"),
        ("https://hf.co/papers/2401.00001.md", "2401.00001"),
        ("cs.CL/9901001v2", "cs.cl/9901001"),
        ("hep-th/9901001", "hep-th/9901001"),
        ("attention", None),
        ("see 1706.03762 for more", None),
        ("1706.037", None),
        ("1706.037621234", None),
        ("2020", None),
    ],
)
def test_arxiv_ids_are_recognised_in_every_usual_form(query: str, wanted: str | None):
    assert normal_arxiv_id(query) == wanted


def test_words_are_folded_and_stemmed():
    assert words("Self-Attention, NAÏVE Heads!") == ["self", "attent", "naiv", "head"]
    assert words("Tokenizers tokenizer") == [words("tokenizer")[0]] * 2
    assert words("\x00a\x1fb \ud800") == ["a", "b"]
    assert words("ﬁne") == words("fine")


def test_function_words_select_nothing_unless_they_are_all_there_is():
    assert query_words("how do the models attend to it") == words("models attend")
    assert query_words("to be or not to be") == ["to", "be", "or", "not"]
    assert query_words("long long LONG") == ["long"]
    assert query_words("?!") == []


def test_readable_text_has_no_control_characters_and_can_be_utf8():
    text = readable("a\tb\x00c\x9f\ud83d e\u0301")
    assert text.encode("utf-8")
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in text)


def test_scores_are_bm25(index: LexicalIndex):
    """Okapi BM25 with k1 = 1.2, b = 0.75; tantivy's idf, and its count of documents includes the state's."""
    snapshot = index.snapshot()
    texts = {paper.key: words(f"{paper.title} {paper.abstract}") for paper in PAPERS}
    count, mean = len(texts) + 1, sum(map(len, texts.values())) / (len(texts) + 1)
    for word in ("tokens", "prompts"):
        stem = words(word)[0]
        holding = [key for key, text in texts.items() if stem in text]
        idf = math.log(1 + (count - len(holding) + 0.5) / (len(holding) + 0.5))
        wanted = {}
        for key in holding:
            frequency, length = texts[key].count(stem), len(texts[key])
            wanted[key] = idf * 2.2 * frequency / (frequency + 1.2 * (0.25 + 0.75 * length / mean))
        assert dict(snapshot.search(word, 10, Filters())) == pytest.approx(wanted, rel=1e-5)


def test_a_name_is_searched_among_authors_only_where_it_is_no_common_word(index: LexicalIndex):
    snapshot = index.snapshot()
    assert [key for key, _ in snapshot.search("Vaswani", 10, Filters())] == [2]
    assert {key for key, _ in snapshot.search("Rich", 10, Filters())} == {1}
    # two papers speak of "long" and two authors are called so: the word wins
    assert {key for key, _ in snapshot.search("long", 10, Filters())} == {2, 4}


def test_hits_are_best_first_and_limited(index: LexicalIndex):
    found = index.snapshot().search("tokens attend attention long", 10, Filters())
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
    assert index.snapshot().search("tokens attend attention long", 2, Filters()) == found[:2]


def test_only_the_rarest_words_of_a_very_long_query_count(index: LexicalIndex):
    query = " ".join(f"unknown{number}" for number in range(500)) + " pruning"
    assert [key for key, _ in index.snapshot().search(query, 10, Filters())] == [3]


def test_exact_names_do_not_match_in_part(index: LexicalIndex):
    snapshot = index.snapshot()
    assert snapshot.exact("sparse ATTENTION", 5, Filters()) == [1]
    assert snapshot.exact("sparse", 5, Filters()) == []
    assert snapshot.exact("sparse attention heads", 5, Filters()) == []


def test_snapshots_do_not_change_and_uncommitted_work_is_forgotten(index: LexicalIndex):
    before = index.snapshot()
    index.remove([1])
    assert len(index.snapshot()) == 4
    index.commit("second")
    assert (before.state(), len(before), index.snapshot().state(), len(index.snapshot())) == ("first", 4, "second", 3)
    index.remove([2])
    index.rollback()
    index.commit("third")
    assert len(index.snapshot()) == 3
    index.clear()
    index.commit("fourth")
    assert (len(index.snapshot()), index.snapshot().state()) == (0, "fourth")


def test_undated_papers_pass_no_date_filter(tmp_path: Path):
    index = LexicalIndex(tmp_path)
    index.add([Document(1, "dated", published=datetime.date(2020, 5, 5)), Document(2, "dated")])
    index.commit("")
    snapshot = index.snapshot()
    for filters in (Filters(since=datetime.date(1990, 1, 1)), Filters(until=datetime.date(2020, 5, 5))):
        assert [key for key, _ in snapshot.search("dated", 5, filters)] == [1]
    assert snapshot.search("dated", 5, Filters(until=datetime.date(2020, 5, 4))) == []


@pytest.mark.parametrize("key", [-1, 2**63, 1.0, "1", True, None])
def test_keys_are_whole_numbers_that_fit(key: object):
    with pytest.raises(ValueError, match="key"):
        Document(key, "title")  # type: ignore[arg-type]
