"""How several sources make one paper: which source a field believes, and what follows from the fields.

Everything here is pure. A merged row is the same whichever source came first, because a field is decided by the rank
of the source it came from and not by the order of arrival:

============================  ======================================================================
field                         preferred source, best first
============================  ======================================================================
title, abstract, authors,     arXiv, arXiv's RSS, Hugging Face, our card, a saved page
categories, pdf_url
published                     the exact day before the month; then as above; last the month in the arXiv id
organisation                  Hugging Face, a saved page, our card, arXiv
keywords, code_url            our card, Hugging Face, a saved page, arXiv
project_url                   Hugging Face, our card, a saved page, arXiv
summary, slug, family         our card alone
ai_summary                    Hugging Face, a saved page
upvotes, comment_count        the greatest that any source has stated (saved pages carry no order in time)
entered, listed               the earliest that any source has stated
============================  ======================================================================

A card's summary and a real abstract are two fields, so neither can overwrite the other. Between two records of one
source the newer replaces the older, except that an older arXiv version never replaces a newer one, and that of two
saved pages the longer text stands, because pages cut text and have no order. Absence never erases.
"""

import math
from collections.abc import Mapping
from datetime import date, timedelta
from typing import Any

from papertrial.feed.records import SOURCES, Precision, Record, month_of_arxiv_id

Row = dict[str, Any]

_BY_AUTHORITY = ("arxiv", "arxiv_rss", "huggingface", "card", "page", "id")
_BY_CURATION = ("card", "huggingface", "page", "arxiv", "arxiv_rss")
_BY_PLATFORM = ("huggingface", "page", "card", "arxiv", "arxiv_rss")
_PREFERENCE: dict[str, tuple[str, ...]] = {
    "title": _BY_AUTHORITY,
    "abstract": _BY_AUTHORITY,
    "authors": _BY_AUTHORITY,
    "author_count": _BY_AUTHORITY,
    "published": _BY_AUTHORITY,
    "categories": _BY_AUTHORITY,
    "pdf_url": _BY_AUTHORITY,
    "organisation": _BY_PLATFORM,
    "ai_summary": _BY_PLATFORM,
    "project_url": ("huggingface", "card", "page", "arxiv", "arxiv_rss"),
    "keywords": _BY_CURATION,
    "code_url": _BY_CURATION,
    "summary": _BY_CURATION,
    "slug": _BY_CURATION,
    "family": _BY_CURATION,
}
_RANK = {field: {source: -i for i, source in enumerate(order)} for field, order in _PREFERENCE.items()}
_GROWING = ("upvotes", "comment_count")
_EARLIEST = ("entered", "listed")

#: A page's own day is taken for a paper's feed day only this close to the month in which the paper appeared.
LISTED_WITHIN = timedelta(days=62)
#: The feed's interest in a paper halves every so many days.
HALF_LIFE_DAYS = 7.0
#: One comment counts as this many votes.
COMMENT_WEIGHT = 0.5


def blank_row() -> Row:
    """A row that no source has said anything about."""
    row: Row = dict.fromkeys((*_PREFERENCE, *_EARLIEST, "arxiv_id", "arxiv_version", "feed_day"))
    row |= {"authors": [], "categories": [], "keywords": [], "upvotes": 0, "comment_count": 0}
    return row | {"published_precision": "day", "feed_precision": "day", "sources": {}, "origins": {}, "heat": 0.0}


def merge_record(row: Row, record: Record, today: date) -> Row:
    """The row after one more record; equal to `row` where the record says nothing new.

    Parameters
    ----------
    row
        A stored row, or `blank_row()`. Not changed.
    record
        What a source says.
    today
        The feed day of a paper of which no date is known at all.
    """
    said: Row = {name: getattr(record, name) for name in (*_PREFERENCE, *_GROWING, *_EARLIEST)}
    for name in ("authors", "categories", "keywords"):
        said[name] = list(said[name])
    said |= {"arxiv_id": record.arxiv_id, "arxiv_version": record.arxiv_version}
    said["published_precision"] = record.published_precision
    said["sources"] = {record.source: record.source_url}
    said["origins"] = {name: record.source for name in (*_PREFERENCE, *_GROWING) if said[name] not in (None, [])}
    return merge_rows(row, said, today)


def merge_rows(row: Row, other: Row, today: date) -> Row:
    """Two rows of one paper as one; `other` is the newer where both speak for the same source."""
    merged = dict(row)
    merged["origins"] = dict(row["origins"])
    older_version = bool(other["arxiv_version"]) and other["arxiv_version"] < (row["arxiv_version"] or 0)
    for name in _PREFERENCE:
        if name in other["origins"] and _replaces(name, row, other, older_version):
            merged[name] = other[name]
            merged["origins"][name] = other["origins"][name]
            if name == "published":
                merged["published_precision"] = other["published_precision"]
    for name in _GROWING:
        if name in other["origins"] and _stated(name, other) > _stated(name, row):
            merged[name] = other[name]
            merged["origins"][name] = other["origins"][name]
    for name in _EARLIEST:
        merged[name] = min((day for day in (row[name], other[name]) if day is not None), default=None)
    merged["arxiv_id"] = row["arxiv_id"] or other["arxiv_id"]
    merged["arxiv_version"] = max(row["arxiv_version"] or 0, other["arxiv_version"] or 0) or None
    merged["sources"] = row["sources"] | {
        source: url or row["sources"].get(source) for source, url in other["sources"].items()
    }
    return derive(merged, today)


def _replaces(name: str, row: Row, other: Row, older_version: bool) -> bool:
    """Whether `other`'s value of a field stands instead of `row`'s."""
    if name not in row["origins"]:
        return True
    mine, theirs = row["origins"][name], other["origins"][name]
    if name == "published" and row["published_precision"] != other["published_precision"]:
        return bool(other["published_precision"] == "day")
    if mine != theirs:
        return _RANK[name].get(theirs, -99) > _RANK[name].get(mine, -99)
    if mine == "page":
        return _page_order(other[name]) > _page_order(row[name])
    return not (older_version and mine in ("arxiv", "arxiv_rss"))


def _stated(name: str, row: Row) -> tuple[int, int]:
    """A count for comparison: unstated below 0, and of equal counts the stronger source's."""
    source = row["origins"].get(name)
    return (row[name], SOURCES.index(source)) if source else (-1, -1)


def _page_order(value: Any) -> tuple[int, str]:
    """Saved pages have no order in time: the longer text stands, and of equals the later in the alphabet."""
    return (len(value) if isinstance(value, (str, list)) else 0, str(value))


def derive(row: Row, today: date) -> Row:
    """Fill in what follows from the other fields: the month in the id, the author count, feed day and heat."""
    if row["published"] is None and row["arxiv_id"]:
        row["published"], row["published_precision"] = month_of_arxiv_id(row["arxiv_id"]), "month"
        row["origins"] = row["origins"] | {"published": "id"}
    if row["authors"]:
        row["author_count"] = len(row["authors"])
        row["origins"] = row["origins"] | {"author_count": row["origins"]["authors"]}
    row["feed_day"], row["feed_precision"] = feed_day(row, today)
    row["heat"] = heat(row["upvotes"], row["comment_count"], row["feed_day"])
    return row


def feed_day(row: Mapping[str, Any], today: date) -> tuple[date, Precision]:
    """The day under which the feed shows a paper, and how exact it is.

    In this order: the day it entered a daily feed; its exact publication day; the day of a page that listed it, if
    the paper appeared shortly before (a search page lists papers of any age) or its date is unknown; the month of its
    publication; `today`, or the day that stands already.
    """
    published, exact = row["published"], row["published_precision"] == "day"
    if row["entered"] is not None:
        return row["entered"], "day"
    if published is not None and exact:
        return published, "day"
    if row["listed"] is not None and (published is None or timedelta(0) <= row["listed"] - published <= LISTED_WITHIN):
        return row["listed"], "day"
    if published is not None:
        return published, "month"
    return row["feed_day"] or today, "day"


def heat(upvotes: int, comments: int, day: date) -> float:
    """Where a paper stands in the trending order, at any time: see `papertrial.feed.trending`."""
    return round(math.log2(1.0 + upvotes + COMMENT_WEIGHT * comments) + day.toordinal() / HALF_LIFE_DAYS, 9)
