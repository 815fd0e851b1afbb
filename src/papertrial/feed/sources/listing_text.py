"""Daily Papers pages saved, or copied, as text.

Two layouts are read. A search or listing page shows a title, an abstract and, unless the copy left it out, a foot line
with authors, date and the number of comments:

    Correlation of Things
                                          (blank)
    We study how things correlate ...
                                          (blank)
      * 4 authors                         or the organisation that the paper belongs to
    .
    Oct 9, 2018 3                         the 3 is the number of comments

A day's page shows no abstract but who submitted the paper, its votes and its comments. Both begin with page furniture
and the page's day ("Oct 3"), which has no year: it is the first such day that is not before the newest paper on the
page, or, where the page shows no dates, the last one that is not after the day given by the caller.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from itertools import pairwise

from papertrial.feed.records import MAX_TITLE
from papertrial.feed.sources.parsed import Parsed, decoded

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = r"(?P<month>Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)[a-z]{0,6}\.?"
_DATE = re.compile(
    rf"(?:published on\s+)?{_MONTH}\s+(?P<day>\d{{1,2}}),?\s+(?P<year>(?:19|20)\d\d)(?:\s+(?P<count>\d{{1,6}}))?",
    re.IGNORECASE | re.ASCII,
)
_DAY_HEADING = re.compile(
    rf"(?:(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*,?\s+)?{_MONTH}\s+(?P<day>\d{{1,2}})(?:,?\s+(?P<year>(?:19|20)\d\d))?",
    re.IGNORECASE | re.ASCII,
)
_AUTHORS = re.compile(r"(\d{1,5})\s+authors?", re.IGNORECASE | re.ASCII)
_NUMBER = re.compile(r"\d{1,7}|\d{1,4}(?:\.\d)?k", re.IGNORECASE | re.ASCII)
_SUBMITTED = re.compile(r"submitted by\b\s*(.*)", re.IGNORECASE)
_BULLETS = "\u2022\u00b7\u2027\u2219*-\u2013 \t\u00a0"
_SEPARATORS = re.compile(r"\s*[\u00b7\u2022\u2027\u2219]\s*")
_FURNITURE = re.compile(
    r"new|hugging face|hugging face's logo|models?|datasets?|spaces?|community|docs|enterprise|pricing|log ?in|sign ?up"
    r"|get trending papers in your email inbox.*|once a day, free!?|subscribe"
    r"|(?:hf )?(?:daily|trending|weekly|monthly) papers"
    r"|by ?\s*ak and the research community|daily|weekly|monthly|previous|next|trending|upvotes?|-|papers"
    r"|search papers(?: with ai)?"
    r"|view all papers|read paper|github|arxiv page|project page",
    re.IGNORECASE,
)
#: A paragraph of so many characters is an abstract wherever it stands; a title may have half as many.
_ABSTRACT_LENGTH = 240


@dataclass
class _Block:
    """Lines without a blank line between them, and what they turned out to be."""

    line: int
    lines: list[str]
    kind: str = "text"

    @property
    def text(self) -> str:
        return " ".join(self.lines)


@dataclass
class _Entry:
    line: int
    title: str
    abstract: list[str] = field(default_factory=list)
    author_count: int | None = None
    organisation: str | None = None
    published: date | None = None
    comments: int | None = None
    upvotes: int | None = None
    submitted: bool = False
    closed: bool = False


def parse_listing_text(data: bytes, today: date | None = None) -> Parsed:
    """Read a saved page.

    Parameters
    ----------
    data
        The file as it is.
    today
        The day before which a page without any dates was saved (default: today).
    """
    parsed = Parsed("page")
    reader = _Reader(parsed)
    blocks = _blocks(decoded(data))
    for i, block in enumerate(blocks):
        reader.take(block, blocks[i + 1 : i + 3])
    entries = reader.finish()
    shown = [entry.published for entry in entries if entry.published]
    for entry in entries:
        day = _page_day(reader.heading_of(entry), shown, today or date.today())
        _add(parsed, entry, day)
    return parsed


def looks_like_listing(text: str) -> bool:
    """Whether text has the furniture or the foot lines of a Daily Papers page."""
    lines = [line.strip() for line in text[:200_000].split("\n")]
    if any(re.fullmatch(r"(?:hf )?daily papers", line, re.IGNORECASE) for line in lines[:200]):
        return True
    return any(_AUTHORS.fullmatch(line.strip(_BULLETS)) for line in lines) or any(map(_SUBMITTED.match, lines))


def _blocks(text: str) -> list[_Block]:
    blocks: list[_Block] = []
    current: list[str] = []
    start = 0
    for number, raw in enumerate([*text.split("\n"), ""], start=1):
        line = " ".join(raw.replace("\x00", " ").replace("\u200b", "").split())
        if line:
            if not current:
                start = number
            current.append(line)
        elif current:
            blocks += _divided(_Block(start, current))
            current = []
    return blocks


def _divided(block: _Block) -> list[_Block]:
    """A block's lines by kind: furniture, day, submitter, votes and foot lines stand alone, text lines stay together.

    A copy may come without blank lines, so a foot is found wherever it is.
    """
    parts: list[_Block] = []
    for offset, line in enumerate(block.lines):
        kind = _kind(line, previous=parts[-1].kind if parts else "")
        joins = parts and kind == parts[-1].kind and kind in ("text", "foot")
        if joins:
            parts[-1].lines.append(line)
        else:
            parts.append(_Block(block.line + offset, [line], kind))
    for before, after in pairwise(parts):
        # A short line right above the separator of a foot is the organisation, which stands where authors would.
        if before.kind == "text" and after.kind == "foot" and len(before.lines) == 1 and len(before.text) <= 120:
            starts_with_separator = not after.lines[0].strip(_BULLETS) or after.lines[0][0] in "\u00b7\u2022"
            if starts_with_separator and not any(_AUTHORS.fullmatch(x.strip(_BULLETS)) for x in after.lines):
                before.kind = "organisation"
    return parts


def _kind(line: str, previous: str) -> str:
    bare = line.strip(_BULLETS)
    if not bare:
        return "foot" if line.strip() in ("\u00b7", "\u2022", "\u2027", "\u2219") else "furniture"
    first, *rest = [part for part in _SEPARATORS.split(bare) if part]
    # All on one line, an organisation may stand in front.
    if all(map(_is_foot, rest)) and (_is_foot(first) or (rest and len(first) <= 120)):
        return "foot"
    if _SUBMITTED.fullmatch(line):
        return "submitted"
    if _NUMBER.fullmatch(bare):
        return "number"
    if _DAY_HEADING.fullmatch(bare):
        return "day"
    return "furniture" if _FURNITURE.fullmatch(bare) else "text"


def _is_foot(part: str) -> bool:
    return bool(_AUTHORS.fullmatch(part) or _DATE.fullmatch(part))


class _Reader:
    """Goes through the blocks with one entry open at a time."""

    def __init__(self, parsed: Parsed) -> None:
        self.parsed = parsed
        self.entries: list[_Entry] = []
        self.headings: list[tuple[int, re.Match[str]]] = []
        self.open: _Entry | None = None
        self.organisation: str | None = None
        self.submitter_due = False
        self.submitted = False
        self.votes: int | None = None

    def take(self, block: _Block, following: Sequence[_Block]) -> None:
        handler = {"text": self._text, "foot": self._foot, "number": self._number, "day": self._day}.get(block.kind)
        if block.kind == "submitted":
            self._close()
            name = _SUBMITTED.fullmatch(block.text)
            self.submitter_due, self.submitted = not (name and name[1]), True
        elif block.kind == "organisation":
            self.organisation = block.text
        elif handler is not None:
            handler(block, following)

    def finish(self) -> list[_Entry]:
        """Close the last entry and say what the page lacks."""
        self._close()
        footed = sum(entry.closed for entry in self.entries)
        last = self.entries[-1] if self.entries else None
        if last is not None:
            text = last.abstract[-1] if last.abstract else ""
            if footed and not last.closed and footed == len(self.entries) - 1:
                self.parsed.problem(
                    last.line, f"the page ends inside the entry {last.title[:60]!r}; kept what is there"
                )
            elif text and not last.closed and not re.search(r"[.!?\u2026)\"'\]]$|https?://\S+$", text):
                self.parsed.problem(last.line, f"the last abstract ({last.title[:60]!r}) may be cut short; kept it")
        if not self.entries:
            self.parsed.problem(None, "no papers found on the page")
        return self.entries

    def heading_of(self, entry: _Entry) -> re.Match[str] | None:
        """The day heading that an entry stands under."""
        return next((match for line, match in reversed(self.headings) if line < entry.line), None)

    def _day(self, block: _Block, _following: Sequence[_Block]) -> None:
        match = _DAY_HEADING.fullmatch(block.text.strip(_BULLETS))
        if match:
            self._close()
            self.headings.append((block.line, match))

    def _number(self, block: _Block, _following: Sequence[_Block]) -> None:
        count = count_of(block.text.strip(_BULLETS))
        if self.open is not None and (self.open.closed or self.open.submitted):
            self.open.comments = count
        elif self.open is None:
            self.votes = count

    def _text(self, block: _Block, following: Sequence[_Block]) -> None:
        if self.submitter_due:
            self.submitter_due = False
            return
        entry = self.open
        if entry is not None and not entry.closed and self._continues(entry, block, following):
            entry.abstract.append(block.text)
            return
        self._close()
        title = block.text
        if self.submitted and len(block.lines) > 1:  # a day's card shows the organisation below the title
            title, self.organisation = " ".join(block.lines[:-1]), block.lines[-1]
        if len(title) > MAX_TITLE:
            self.parsed.problem(block.line, f"an abstract without a title: {block.text[:60]!r}")
            return
        self.open = _Entry(block.line, title, upvotes=self.votes, submitted=self.submitted)
        self.votes, self.submitted = None, False

    def _continues(self, entry: _Entry, block: _Block, following: Sequence[_Block]) -> bool:
        """Whether a text block is (more of) the open entry's abstract, and not the next title."""
        if entry.submitted:
            return False
        after = following[0] if following else None
        before_foot = after is not None and after.kind in ("foot", "organisation")
        if entry.abstract:
            # A second paragraph, unless a title without foot line above it: then an abstract follows it.
            return len(block.text) > _ABSTRACT_LENGTH or (before_foot and block.text.endswith("."))
        if len(block.text) >= _ABSTRACT_LENGTH or before_foot or block.text.endswith("."):
            return True
        return not (after is not None and after.kind == "text" and len(after.text) > len(block.text))

    def _foot(self, block: _Block, _following: Sequence[_Block]) -> None:
        entry = self.open
        parts = [part.strip(_BULLETS) for line in block.lines for part in _SEPARATORS.split(line)]
        if entry is None or self._footed_already(entry, parts):
            self.parsed.problem(block.line, f"a foot line without a paper above it: {block.text[:60]!r}")
            self.organisation = None
            return
        for part in filter(None, parts):
            if match := _AUTHORS.fullmatch(part):
                entry.author_count = int(match[1]) or None
                entry.closed = True
            elif match := _DATE.fullmatch(part):
                entry.published = _calendar_day(match, int(match["year"]))
                if entry.published is None:
                    self.parsed.problem(block.line, f"{entry.title[:60]!r}: {part.strip()!r} is not a day; left out")
                entry.comments = int(match["count"]) if match["count"] else 0
                entry.closed = True
            else:
                self.organisation = part
        entry.organisation = self.organisation or entry.organisation
        self.organisation = None

    def _footed_already(self, entry: _Entry, parts: Sequence[str]) -> bool:
        """Whether the entry has what this foot gives: then the foot belongs to a paper that is missing."""
        authors, days = any(map(_AUTHORS.fullmatch, parts)), any(map(_DATE.fullmatch, parts))
        return (authors and entry.author_count is not None) or (days and entry.published is not None)

    def _close(self) -> None:
        entry, self.open = self.open, None
        if entry is None:
            return
        if entry.organisation is None and self.organisation:
            entry.organisation, self.organisation = self.organisation, None
        if not entry.abstract and not entry.closed and not entry.submitted and entry.upvotes is None:
            self.parsed.problem(entry.line, f"a title without anything below it, left out: {entry.title[:60]!r}")
            return
        self.entries.append(entry)


def count_of(text: str) -> int | None:
    """The number that a count shows: ``12`` or ``1.2k``; None where the text is not a count."""
    if not _NUMBER.fullmatch(text):
        return None
    return round(float(text[:-1]) * 1000) if text[-1] in "kK" else int(text)


def day_of(text: str) -> date | None:
    """The day that a foot line such as ``Oct 9, 2018 3`` shows; None where it shows none."""
    parts = (_DATE.fullmatch(part.strip(_BULLETS)) for part in _SEPARATORS.split(text))
    return next((day for match in parts if match and (day := _calendar_day(match, int(match["year"])))), None)


def _calendar_day(match: re.Match[str], year: int) -> date | None:
    try:
        return date(year, _MONTHS.index(match["month"][:3].lower()) + 1, int(match["day"]))
    except ValueError:
        return None


def _page_day(heading: re.Match[str] | None, shown: Sequence[date], today: date) -> date | None:
    """The day of a page, its year found as the module says."""
    if heading is None:
        return None
    if heading["year"]:
        return _calendar_day(heading, int(heading["year"]))
    if shown:
        newest = max(shown)
        later = (_calendar_day(heading, newest.year + ahead) for ahead in range(9))  # 29 February skips up to 8 years
        return next((day for day in later if day and newest <= day <= today + timedelta(days=2)), None)
    earlier = (_calendar_day(heading, today.year - ago) for ago in range(9))
    return next((day for day in earlier if day and day <= today), None)


def _add(parsed: Parsed, entry: _Entry, page_day: date | None) -> None:
    # A day's page is the feed of that day; a page of abstracts lists papers of any age.
    daily = entry.submitted or (entry.upvotes is not None and not entry.abstract)
    parsed.add(
        entry.line,
        title=entry.title,
        abstract=" ".join(entry.abstract) or None,
        author_count=entry.author_count,
        published=entry.published,
        entered=page_day if daily else None,
        listed=page_day,
        organisation=entry.organisation,
        comment_count=entry.comments,
        upvotes=entry.upvotes,
    )
