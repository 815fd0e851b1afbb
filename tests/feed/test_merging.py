import itertools
from dataclasses import replace
from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from papertrial.feed.merging import blank_row, feed_day, merge_record
from papertrial.feed.records import Record

TODAY = date(2026, 1, 1)
DAYS = st.dates(date(2025, 8, 1), date(2025, 12, 1))
TEXTS = st.sampled_from(["short", "a longer text", "another text"])


@st.composite
def records(draw, source):
    return Record(
        source=source,
        title=draw(st.sampled_from(["One Title", "One title!", "ONE TITLE"])),
        arxiv_id=draw(st.sampled_from([None, "2510.00001"])),
        abstract=draw(st.none() | TEXTS) if source != "card" else None,
        summary=draw(st.none() | TEXTS) if source == "card" else None,
        ai_summary=draw(st.none() | TEXTS) if source == "huggingface" else None,
        authors=draw(st.sampled_from([(), ("Ada",), ("Ada", "Bo")])),
        author_count=draw(st.sampled_from([None, 1, 2, 3])),
        published=draw(st.none() | DAYS),
        published_precision=draw(st.sampled_from(["day", "month"])),
        entered=draw(st.none() | DAYS),
        listed=draw(st.none() | DAYS),
        organisation=draw(st.sampled_from([None, "Meadow"])),
        upvotes=draw(st.sampled_from([None, 0, 5, 9])),
        comment_count=draw(st.sampled_from([None, 0, 2])),
        code_url=draw(st.sampled_from([None, "https://example.org/a", "https://example.org/b"])),
    )


@settings(max_examples=60)
@given(st.tuples(*(records(source) for source in ("page", "card", "huggingface", "arxiv"))))
def test_sources_make_the_same_paper_in_every_order(said):
    def merged(order):
        row = blank_row()
        for record in order:
            row = merge_record(row, record, TODAY)
        return row | {"sources": dict(sorted(row["sources"].items()))}

    expected = merged(said)
    for order in itertools.permutations(said):
        assert merged(order) == expected


@settings(max_examples=100)
@given(st.lists(st.sampled_from(["page", "card", "huggingface", "arxiv"]).flatmap(records), min_size=1, max_size=4))
def test_saying_the_last_thing_again_changes_nothing(said):
    row = blank_row()
    for record in said:
        row = merge_record(row, record, TODAY)
    assert merge_record(row, said[-1], TODAY) == row


def test_summary_of_a_card_and_abstract_stand_side_by_side():
    card = Record("card", "One Title", summary="Ours.", slug="one")
    page = Record("page", "One Title", abstract="Theirs.")
    row = merge_record(merge_record(blank_row(), card, TODAY), page, TODAY)
    assert (row["summary"], row["abstract"]) == ("Ours.", "Theirs.")


def test_older_arxiv_version_does_not_replace_a_newer_one():
    new = Record("arxiv", "New Title", arxiv_id="2510.00001v3", abstract="new")
    old = Record("arxiv", "Old Title", arxiv_id="2510.00001v1", abstract="old")
    row = merge_record(merge_record(blank_row(), new, TODAY), old, TODAY)
    assert (row["title"], row["abstract"], row["arxiv_version"]) == ("New Title", "new", 3)
    row = merge_record(merge_record(blank_row(), old, TODAY), new, TODAY)
    assert (row["title"], row["abstract"], row["arxiv_version"]) == ("New Title", "new", 3)


def test_of_two_saved_pages_the_longer_text_and_the_greater_count_stand():
    short = Record("page", "One Title", abstract="cut", upvotes=9)
    whole = Record("page", "One Title", abstract="cut no more", upvotes=5)
    for first, second in ((short, whole), (whole, short)):
        row = merge_record(merge_record(blank_row(), first, TODAY), second, TODAY)
        assert (row["abstract"], row["upvotes"]) == ("cut no more", 9)


BASE = Record("page", "One Title")


@pytest.mark.parametrize(
    ("record", "day", "precision"),
    [
        (replace(BASE, entered=date(2025, 10, 3), published=date(2025, 10, 1)), date(2025, 10, 3), "day"),
        (replace(BASE, published=date(2025, 10, 1), listed=date(2025, 10, 3)), date(2025, 10, 1), "day"),
        (replace(BASE, listed=date(2025, 10, 3)), date(2025, 10, 3), "day"),
        (replace(BASE, arxiv_id="2510.00001", listed=date(2025, 10, 3)), date(2025, 10, 3), "day"),
        (replace(BASE, arxiv_id="1810.00001", listed=date(2025, 10, 3)), date(2018, 10, 1), "month"),
        (replace(BASE, published=date(2018, 10, 7), published_precision="month"), date(2018, 10, 1), "month"),
        (BASE, TODAY, "day"),
    ],
)
def test_feed_day_is_the_best_known_day(record, day, precision):
    row = merge_record(blank_row(), record, TODAY)
    assert (row["feed_day"], row["feed_precision"]) == (day, precision)
    assert feed_day(row, TODAY) == (day, precision)
