from datetime import date, datetime, timedelta

import pytest

from papertrial.feed.records import Record, month_of_arxiv_id, parse_arxiv_id, parse_day, plain_text, title_key


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("2210.14140", ("2210.14140", None)),
        ("arXiv:2210.14140v2", ("2210.14140", 2)),
        ("http://arxiv.org/abs/0704.0001v1", ("0704.0001", 1)),
        ("https://arxiv.org/pdf/2210.14140v3.pdf", ("2210.14140", 3)),
        ("https://huggingface.co/papers/2210.14140", ("2210.14140", None)),
        ("oai:arXiv.org:2510.00001v1", ("2510.00001", 1)),
        ("cs.CL/9901001", ("cs/9901001", None)),
        ("hep-th/9711200v3", ("hep-th/9711200", 3)),
        ("2213.14140", None),
        ("2210.141", None),
        ("\u0662\u0662\u0661\u0660.14140", None),
        ("knn_lm", None),
        ("", None),
    ],
)
def test_arxiv_ids_in_any_spelling(text, parsed):
    assert parse_arxiv_id(text) == parsed


def test_month_in_the_id():
    assert month_of_arxiv_id("2210.14140") == date(2022, 10, 1)
    assert month_of_arxiv_id("hep-th/9108001") == date(1991, 8, 1)


def test_title_key_sees_through_case_punctuation_accents_and_spaces():
    assert title_key("Caf\u00e9  M\u00fcller: A-B testing!") == title_key("cafe muller a b Testing")
    assert title_key("One Title") != title_key("One Titles")
    assert title_key("\u8a9e\u8a00") != title_key("\u8a00\u8a9e")


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("a <b>bold</b> <br/>claim", "a bold claim"),
        ("for x<y and y>z, <x, y> is", "for x<y and y>z, <x, y> is"),
        ("$a < b$ and <p>text</p>", "$a < b$ and text"),
        ("x<script src='u'>evil()</script>y", "x y"),
        ("the <s> token, <pad> and <table>", "the <s> token, <pad> and <table>"),
        ("pages with <script> tags, which we count", "pages with <script> tags, which we count"),
        ("a<style>p{}</style>b<SCRIPT>x</SCRIPT >c", "a b c"),
        ("line\n  one\ttwo\u00a0three", "line one two three"),
        ("e\u0301", "\u00e9"),
        ("zero\u200bwidth", "zerowidth"),
    ],
)
def test_text_is_stored_plain(raw, plain):
    assert plain_text(raw) == plain
    assert plain_text(plain) == plain


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("title", ""),
        ("title", "..."),
        ("title", "x" * 501),
        ("title", 7),
        ("source", "somewhere"),
        ("arxiv_id", "22.1"),
        ("abstract", "x" * 20_001),
        ("authors", "Ada"),
        ("authors", ("x" * 201,)),
        ("author_count", 0),
        ("upvotes", -1),
        ("upvotes", True),
        ("comment_count", 1.5),
        ("published", "2020-01-01"),
        ("published", datetime(2020, 1, 1)),
        ("published", date.today() + timedelta(days=5)),
        ("published", date(1900, 1, 1)),
        ("code_url", "javascript:alert(1)"),
        ("code_url", "https://exa mple.org"),
        ("project_url", "ftp://example.org"),
        ("slug", "../etc"),
        ("published_precision", "year"),
    ],
)
def test_wrong_value_is_refused_with_the_name_of_its_field(field, value):
    with pytest.raises(ValueError, match=rf"^{field}: "):
        Record(**({"source": "page", "title": "A Title"} | {field: value}))


def test_dates_know_how_exact_they_are():
    assert parse_day("2018-10-09") == (date(2018, 10, 9), "day")
    assert parse_day("2018-10-09T23:59:59.000Z") == (date(2018, 10, 9), "day")
    assert parse_day("2018-10") == (date(2018, 10, 1), "month")
    for wrong in ("2018-13", "2018-02-30", "2018", "yesterday", "2018-10-9"):
        with pytest.raises(ValueError, match="is not a date"):
            parse_day(wrong)
