"""The Hugging Face papers API: daily lists, search lists and single papers, as JSON.

An entry of a list is an outer object with the paper inside (``{"paper": {"id": ..., ...}, "numComments": ...}``); a
single paper is the inner object. A field may stand on either, so both are asked. A list is read entry by entry:
a file that is cut short, or broken in one place, keeps the entries that are whole.
"""

import json
import re
from datetime import date
from typing import Any

from papertrial.feed.records import parse_arxiv_id, parse_day
from papertrial.feed.sources.parsed import MAX_PROBLEMS, Parsed, decoded

_DECODER = json.JSONDecoder()
_LIST_NAMES = ("dailyPapers", "papers", "results", "items")
_ENTRY_START = re.compile(r'\{\s*"paper"\s*:|\{\s*"id"\s*:\s*"\d{4}\.\d{4,5}"')


def parse_huggingface_json(data: bytes, entered: date | None = None) -> Parsed:
    """Read a saved or fetched reply of the papers API.

    Parameters
    ----------
    data
        The reply's body.
    entered
        The feed day whose list this is: then every paper in it entered the feed on that day.
    """
    parsed = Parsed("huggingface")
    text = decoded(data)
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        _read_pieces(parsed, text, error, entered)
        return parsed
    error_text = whole.get("error") if isinstance(whole, dict) else None
    if isinstance(error_text, str) and "id" not in whole:
        parsed.problem(None, f"the reply is an error: {error_text[:200]}")
        return parsed
    add_entries(parsed, entries_of(whole), entered)
    return parsed


def entries_of(whole: Any) -> list[Any]:
    """The entries of a reply: a list, an object that holds one, or a single paper."""
    if isinstance(whole, list):
        return whole
    if isinstance(whole, dict):
        for name in _LIST_NAMES:
            if isinstance(whole.get(name), list):
                return list(whole[name])
    return [whole]


def add_entries(parsed: Parsed, entries: list[Any], entered: date | None = None, line: int | None = None) -> None:
    """Make a record of every entry; what is not one is named by its number."""
    for number, entry in enumerate(entries, start=1):
        before = len(parsed.problems)
        _add_entry(parsed, entry, entered, line)
        if len(entries) > 1:
            for i in range(before, len(parsed.problems)):
                parsed.problems[i] = f"entry {number}: {parsed.problems[i]}"


def _read_pieces(parsed: Parsed, text: str, error: Exception, entered: date | None) -> None:
    """Entry by entry, beginning anew behind a broken one."""
    position, whole_entries, at, counted = 0, 0, 1, 0
    while match := _ENTRY_START.search(text, position):
        at, counted = at + text.count("\n", counted, match.start()), match.start()
        try:
            entry, position = _DECODER.raw_decode(text, match.start())
        except (ValueError, RecursionError) as broken:
            reason = broken.msg if isinstance(broken, json.JSONDecodeError) else "nested too deeply"
            parsed.problem(at, f"an entry that is not whole, left out: {reason}")
            if len(parsed.problems) > MAX_PROBLEMS:
                break
            position = match.end()
            # Not into the broken entry: its inner object begins like an entry of its own.
            if inner := _ENTRY_START.match(text, _skip_space(text, position)):
                position = inner.end()
        else:
            whole_entries += 1
            _add_entry(parsed, entry, entered, at)
    if not whole_entries or not parsed.problems:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        line = error.lineno if isinstance(error, json.JSONDecodeError) else None
        parsed.problem(line, f"not valid JSON: {reason}")


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _add_entry(parsed: Parsed, entry: Any, entered: date | None, line: int | None) -> None:
    if not isinstance(entry, dict):
        parsed.problem(line, f"{type(entry).__name__} where a paper was expected")
        return
    inner = entry.get("paper") if isinstance(entry.get("paper"), dict) else {}
    fields = _fields(inner, entry)
    if not isinstance(fields["title"], str):
        parsed.problem(line, f"an entry without a title, left out (keys: {', '.join(map(str, list(entry)[:6]))})")
        return
    for name, value in (("published", fields.pop("published_text")), ("entered", fields.pop("entered_text"))):
        if isinstance(value, str):
            try:
                fields[name] = parse_day(value)[0]
            except ValueError as error:
                parsed.problem(line, f"{fields['title'][:60]!r}: {name} left out: {error}")
    if entered is not None:
        fields["entered"] = entered
    parsed.add(line, **fields)


def _fields(inner: Any, outer: dict[str, Any]) -> dict[str, Any]:
    def first(*names: str) -> Any:
        for name in names:
            for holder in (inner, outer):
                if holder.get(name) not in (None, ""):
                    return holder[name]
        return None

    name = first("id", "arxivId")
    arxiv = parse_arxiv_id(name) if isinstance(name, str) else None
    # The outer publishedAt of a list is the feed's time only where it differs from the paper's own.
    outer_time = outer.get("publishedAt") if inner and outer.get("publishedAt") != inner.get("publishedAt") else None
    authors = first("authors")
    comments = first("numComments", "comments")
    return {
        "title": first("title"),
        "arxiv_id": arxiv[0] if arxiv else None,
        "source_url": f"https://huggingface.co/papers/{arxiv[0]}" if arxiv else None,
        "abstract": first("summary", "abstract"),
        "ai_summary": first("ai_summary"),
        "authors": _authors(authors),
        "published_text": inner.get("publishedAt") or (None if inner else outer.get("publishedAt")),
        "entered_text": first("submittedOnDailyAt") or outer_time,
        "organisation": _organisation(first("organization", "organisation")),
        "comment_count": len(comments) if isinstance(comments, list) else comments,
        "upvotes": first("upvotes"),
        "keywords": first("ai_keywords") or (),
        "code_url": first("githubRepo"),
        "project_url": first("projectPage"),
    }


def _authors(authors: Any) -> Any:
    """Names of the authors that the site shows."""
    if not isinstance(authors, list):
        return ()
    shown = [a for a in authors if not (isinstance(a, dict) and a.get("hidden") is True)]
    return tuple(a.get("name") if isinstance(a, dict) else a for a in shown)


def _organisation(organisation: Any) -> Any:
    if isinstance(organisation, dict):
        return organisation.get("fullname") or organisation.get("name")
    return organisation
