import json
from datetime import date
from pathlib import Path

import pytest

from feed_documents import DAILY_PAGE, PLAIN_PAGE, SEARCH_PAGE
from papertrial.feed.sources.listing_text import parse_listing_text

LISTINGS = Path(__file__).resolve().parents[3] / "shared" / "listings"
saved_pages = pytest.mark.skipif(not LISTINGS.is_dir(), reason="the saved pages are not beside this checkout")


def test_search_page_gives_every_title_abstract_author_count_date_comment_count_and_organisation():
    parsed = parse_listing_text(SEARCH_PAGE.encode())
    assert parsed.problems == []
    lighthouse, dream, scaling = parsed.records
    assert lighthouse.title == "Teaching Lighthouses to Whisper: A Study of Very Slow Signals"
    assert lighthouse.abstract.startswith("Lighthouses have long")
    assert lighthouse.abstract.endswith("in the ablations.")
    assert (lighthouse.author_count, lighthouse.published, lighthouse.comment_count) == (4, date(2018, 10, 9), 0)
    assert (dream.title, dream.abstract) == ("Do Umbrellas Dream?", "Short abstracts exist too.")
    assert (dream.author_count, dream.published, dream.comment_count) == (1, date(2026, 1, 31), 12)
    assert scaling.title == "Umbrella Scaling Laws & the 7 < 9 Conjecture"
    assert "all sizes x < y and z > 0" in scaling.abstract
    assert scaling.abstract.endswith("after all corrections were made.")
    assert (scaling.author_count, scaling.organisation) == (None, "meadow Institute of Meadows")
    assert (scaling.published, scaling.comment_count) == (date(2025, 9, 24), 3)


def test_page_day_is_the_first_one_that_is_not_before_the_newest_paper():
    records = parse_listing_text(SEARCH_PAGE.encode(), today=date(2026, 6, 1)).records
    assert {record.listed for record in records} == {date(2026, 2, 2)}
    assert {record.entered for record in records} == {None}


@pytest.mark.parametrize(
    ("today", "day"),
    [
        (date(2025, 11, 1), date(2025, 10, 3)),
        (date(2025, 10, 3), date(2025, 10, 3)),
        (date(2025, 10, 2), date(2024, 10, 3)),
    ],
)
def test_page_without_dates_was_saved_at_the_last_such_day(today, day):
    parsed = parse_listing_text(PLAIN_PAGE.encode(), today=today)
    assert [record.title for record in parsed.records] == [
        "A First Invented Title",
        "A Second Invented Title: Now With a Colon",
    ]
    assert all(record.abstract.startswith("We invent") for record in parsed.records)
    assert {record.listed for record in parsed.records} == {day}
    assert parsed.problems == []


def test_daily_page_gives_votes_comments_and_the_feed_day():
    parsed = parse_listing_text(DAILY_PAGE.encode())
    assert parsed.problems == []
    facts = [(r.title, r.upvotes, r.author_count, r.comment_count, r.organisation) for r in parsed.records]
    assert facts == [
        ("The Unbearable Lightness of Tokens", 128, 15, 9, None),
        ("On Sandwiches as Monoids", 1200, 2, None, "Institute of Lunch"),
        ("Counting Sheep With Transformers", 7, 1, 2, None),
    ]
    assert {record.entered for record in parsed.records} == {date(2025, 10, 3)}
    assert {record.abstract for record in parsed.records} == {None}


def test_line_ends_byte_order_marks_and_missing_blank_lines_do_not_matter():
    expected = parse_listing_text(SEARCH_PAGE.encode()).records
    assert parse_listing_text(SEARCH_PAGE.replace("\n", "\r\n").encode()).records == expected
    assert parse_listing_text(b"\xef\xbb\xbf" + SEARCH_PAGE.encode()).records == expected
    assert parse_listing_text(SEARCH_PAGE.encode("utf-16")).records == expected
    one_line_feet = SEARCH_PAGE.replace("\n\u00b7\n", " \u00b7 ")
    assert parse_listing_text(one_line_feet.encode()).records == expected


def test_short_titles_that_begin_like_page_furniture_are_titles():
    for title in ("Search Arena", "Models of Rain", "Docs and Dogs", "Oct", "Newest", "42 Umbrellas"):
        page = SEARCH_PAGE.replace("Do Umbrellas Dream?", title)
        assert [record.title for record in parse_listing_text(page.encode()).records][1] == title


def test_foot_without_paper_is_named_by_line_and_the_others_are_kept():
    lines = SEARCH_PAGE.split("\n")
    broken = "\n".join(line for line in lines if not line.startswith(("Do Umbrellas", "Short abstracts")))
    parsed = parse_listing_text(broken.encode())
    assert len(parsed.records) == 2
    (problem,) = parsed.problems
    where = int(problem.removeprefix("line ").split(":")[0])
    assert broken.split("\n")[where - 1] == "  \u2022 1 authors"


@pytest.mark.parametrize("cut", range(600, len(SEARCH_PAGE) - 30, 37))
def test_truncated_page_keeps_whole_entries_and_names_the_cut_one(cut):
    whole = parse_listing_text(SEARCH_PAGE.encode()).records
    parsed = parse_listing_text(SEARCH_PAGE[:cut].encode())
    for mine, theirs in zip(parsed.records[:-1], whole, strict=False):
        assert (mine.title, mine.abstract, mine.published) == (theirs.title, theirs.abstract, theirs.published)
    if parsed.records and parsed.records[-1].published is None and len(parsed.records) > 1:
        assert parsed.problems


def test_impossible_day_is_left_out_and_named():
    parsed = parse_listing_text(SEARCH_PAGE.replace("Oct 9, 2018", "Feb 30, 2018").encode())
    assert parsed.records[0].published is None
    assert any("Feb 30, 2018" in problem for problem in parsed.problems)


@saved_pages
def test_saved_search_page_with_authors_is_read_whole():
    text = (LISTINGS / "search_page_with_authors.txt").read_text(encoding="utf-8")
    parsed = parse_listing_text(text.encode())
    # 31 feet, each with one line that begins with the separator; counted by hand.
    assert sum(line == "\u00b7" for line in text.split("\n")) == 31
    assert (len(parsed.records), parsed.problems) == (31, [])
    assert all(record.abstract and len(record.abstract) > 1000 and record.published for record in parsed.records)
    assert [r.title[:17] for r in parsed.records if r.author_count is None] == ["Mixing Mechanisms"]
    assert [r.organisation for r in parsed.records if r.organisation] == ["tau Tel Aviv University"]
    assert sorted(r.comment_count for r in parsed.records if r.comment_count) == [1, 2, 3, 3]


@saved_pages
def test_saved_search_page_agrees_with_the_facts_noted_by_hand():
    facts_file = LISTINGS.parent / "papers" / "_listing_facts.json"
    if not facts_file.exists():
        pytest.skip("no facts beside the saved pages")
    noted = json.loads(facts_file.read_text())
    data = (LISTINGS / "search_page_with_authors.txt").read_bytes()
    read = {record.title[:20]: record for record in parse_listing_text(data).records}
    for slug, title in {
        "ctx_docnade": "textTOvec: Deep Cont",
        "entity_binding": "Mixing Mechanisms: H",
        "neurally_compressed_text": "Training LLMs over N",
        "large_concept_model": "Large Concept Models",
        "llama_nas": "LLaMA-NAS: Efficient",
    }.items():
        record = read[title]
        said = {"comments": record.comment_count, "date": str(record.published)}
        said |= {"authors": record.author_count} if record.author_count else {}
        said |= {"organisation": record.organisation} if record.organisation else {}
        assert said == noted[slug]


@saved_pages
def test_saved_plain_page_is_read_whole():
    parsed = parse_listing_text((LISTINGS / "search_page_plain.txt").read_bytes())
    assert (len(parsed.records), parsed.problems) == (6, [])
    assert all(len(record.abstract) > 1000 for record in parsed.records)
