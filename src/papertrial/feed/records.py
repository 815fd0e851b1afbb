"""What the catalogue keeps of a paper: a `Record` is what one source says, a `Paper` what all of them add up to.

Text is stored plain: no markup, no entities, single spaces. Whoever prints it escapes it.
"""

import hashlib
import re
import unicodedata
from dataclasses import dataclass, field, fields
from datetime import date, datetime, timedelta
from typing import Any, Literal
from urllib.parse import urlsplit

Precision = Literal["day", "month"]

#: Every source a record can come from, weakest first; `papertrial.feed.merging` says which one a field prefers.
SOURCES = ("page", "card", "huggingface", "arxiv_rss", "arxiv")

MAX_TITLE = 500
MAX_TEXT = 20_000
MAX_NAME = 200
MAX_URL = 2_000
MAX_AUTHORS = 10_000
MAX_LABELS = 100
MAX_COUNT = 1_000_000_000
EARLIEST = date(1950, 1, 1)

_NEW_ID = re.compile(r"(\d{2})(0[1-9]|1[0-2])\.(\d{4,5})(?:v([1-9]\d{0,2}))?", re.ASCII)
_OLD_ID = re.compile(
    r"([a-z]+(?:-[a-z]+)*)(?:\.[A-Za-z-]{2,})?/(\d{2}(?:0[1-9]|1[0-2])\d{3})(?:v([1-9]\d{0,2}))?", re.ASCII
)
_ID_PREFIX = re.compile(
    r"^(?:arxiv:|oai:arxiv\.org:|(?:https?://)?(?:www\.|export\.)?arxiv\.org/(?:abs|pdf|html)/"
    r"|(?:https?://)?(?:www\.)?huggingface\.co/papers/)",
    re.IGNORECASE,
)
# Only what sources really put into titles and abstracts is markup: one may well say "for all x <y and z> 0", and a
# paper about language models writes of the <s> token.
_MARKUP = re.compile(
    r"</?(?:a|b|blockquote|br|div|em|font|h[1-6]|hr|i|iframe|img|li|ol|p|span|strong|sub|sup|svg|tt|ul)(?:\s[^<>]*)?/?>",
    re.IGNORECASE,
)
_ACTIVE = re.compile(r"<(script|style)\b[^<>]*>", re.IGNORECASE)
# Invisible characters that would let two titles look alike or text run backwards on a page.
_INVISIBLE = dict.fromkeys([0x00AD, 0x200B, 0x2060, 0xFEFF, *range(0x202A, 0x202F), *range(0x2066, 0x206A)])


def plain_text(text: str) -> str:
    """Text without markup, control or invisible characters, in NFC, every run of white space one space."""
    if "<" in text:
        text = _MARKUP.sub(" ", _without_scripts(text))
    if not text.isascii():
        text = unicodedata.normalize("NFC", text).translate(_INVISIBLE)
    if not text.isprintable():
        text = "".join(c if c.isprintable() or c.isspace() else _replacement(c) for c in text)
    return " ".join(text.split())


def _without_scripts(text: str) -> str:
    """Text without whole script and style elements; an opening tag alone is something that the text speaks of."""
    kept, position = [], 0
    while opening := _ACTIVE.search(text, position):
        closing = re.compile(rf"</{opening[1]}\s*>", re.IGNORECASE).search(text, opening.end())
        if closing is None:
            break
        kept += [text[position : opening.start()], " "]
        position = closing.end()
    return "".join([*kept, text[position:]])


def _replacement(character: str) -> str:
    """Lone surrogates cannot be stored as UTF-8; private and unassigned characters can, and stay."""
    category = unicodedata.category(character)
    if category == "Cs":
        return "\N{REPLACEMENT CHARACTER}"
    return " " if category == "Cc" else character


def parse_arxiv_id(text: str) -> tuple[str, int | None] | None:
    """The canonical arXiv id and version in an id, ``arXiv:`` id or abstract/PDF address; None where there is none.

    The id is without version; an old-style id is without its subject class (``cs.CL/9901001`` is ``cs/9901001``).
    """
    text = _ID_PREFIX.sub("", text.strip()).removesuffix(".pdf")
    if match := _NEW_ID.fullmatch(text):
        return f"{match[1]}{match[2]}.{match[3]}", int(match[4]) if match[4] else None
    if match := _OLD_ID.fullmatch(text):
        return f"{match[1]}/{match[2]}", int(match[3]) if match[3] else None
    return None


def month_of_arxiv_id(arxiv_id: str) -> date:
    """First day of the month that an arXiv id carries (ids began in 1991)."""
    digits = arxiv_id.rpartition("/")[2]
    year = int(digits[:2])
    return date(1900 + year if year >= 91 else 2000 + year, int(digits[2:4]), 1)


def title_key(title: str) -> str:
    """What two spellings of one title share: letters and digits only, case folded, accents off; hashed to 80 bits."""
    folded = unicodedata.normalize("NFKD", title).casefold()
    letters = "".join(c for c in folded if c.isalnum())
    return hashlib.sha256((letters or folded).encode("utf-8", "replace")).hexdigest()[:20]


def parse_day(text: str) -> tuple[date, Precision]:
    """``YYYY-MM-DD``, ``YYYY-MM`` or an RFC 3339 time, as a day and how exact it is.

    Raises
    ------
    ValueError
        Naming the text and the forms that are known.
    """
    match = re.fullmatch(r"(\d{4})-(\d{2})(?:-(\d{2})(?:[T ]\d{2}:\d{2}.{0,40})?)?", text.strip(), re.ASCII)
    try:
        if match and match[3]:
            return date(int(match[1]), int(match[2]), int(match[3])), "day"
        if match:
            return date(int(match[1]), int(match[2]), 1), "month"
    except ValueError:
        pass
    raise ValueError(f"{text[:60]!r} is not a date; write YYYY-MM-DD or YYYY-MM")


@dataclass(frozen=True, slots=True)
class Record:
    """One paper as one source describes it. None and () mean that the source does not say.

    Raises
    ------
    ValueError
        From the constructor, naming the first field that is wrong; nothing is cut to fit.

    Notes
    -----
    ``abstract`` is the authors' text, ``summary`` our own words from a paper card, ``ai_summary`` a machine's.
    ``entered`` is the day the paper entered a daily feed; ``listed`` only the day of a page that showed it.
    ``published`` is the first of the month where ``published_precision`` is ``"month"``.
    """

    source: str
    title: str
    source_url: str | None = None
    arxiv_id: str | None = None
    arxiv_version: int | None = None
    abstract: str | None = None
    summary: str | None = None
    ai_summary: str | None = None
    authors: tuple[str, ...] = ()
    author_count: int | None = None
    published: date | None = None
    published_precision: Precision = "day"
    entered: date | None = None
    listed: date | None = None
    organisation: str | None = None
    comment_count: int | None = None
    upvotes: int | None = None
    categories: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    code_url: str | None = None
    project_url: str | None = None
    pdf_url: str | None = None
    slug: str | None = None
    family: str | None = None

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"source: {self.source!r} is not one of {', '.join(SOURCES)}")
        for name, limit in _TEXT_LIMITS.items():
            self._set(name, _checked_text(name, getattr(self, name), limit))
        if self.title is None or not any(c.isalnum() for c in self.title):
            raise ValueError("title: is empty; a paper is known by its title")
        for name, most in _LIST_LIMITS.items():
            self._set(name, _checked_list(name, getattr(self, name), most))
        for name in _COUNTS:
            _check_count(name, getattr(self, name))
        if self.author_count == 0:
            raise ValueError("author_count: is 0; leave it out where it is not known")
        for name in ("published", "entered", "listed"):
            _check_day(name, getattr(self, name))
        for name in ("source_url", "code_url", "project_url", "pdf_url"):
            self._set(name, _checked_url(name, getattr(self, name)))
        self._check_names()

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_names(self) -> None:
        if self.published_precision not in ("day", "month"):
            raise ValueError(f"published_precision: {self.published_precision!r} is neither 'day' nor 'month'")
        if self.published is not None and self.published_precision == "month":
            self._set("published", self.published.replace(day=1))
        if self.arxiv_id is not None:
            parsed = parse_arxiv_id(self.arxiv_id) if isinstance(self.arxiv_id, str) else None
            if parsed is None:
                raise ValueError(f"arxiv_id: {str(self.arxiv_id)[:60]!r} is not an arXiv id such as 2210.14140")
            self._set("arxiv_id", parsed[0])
            if self.arxiv_version is None:
                self._set("arxiv_version", parsed[1])
        for name in ("slug", "family"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[a-z][a-z0-9_]{0,79}", value):
                raise ValueError(f"{name}: {value!r} is not a folder name (small letters, digits, underscores)")


_TEXT_LIMITS = {
    "title": MAX_TITLE,
    "abstract": MAX_TEXT,
    "summary": MAX_TEXT,
    "ai_summary": MAX_TEXT,
    "organisation": MAX_NAME,
}
_LIST_LIMITS = {"authors": MAX_AUTHORS, "categories": MAX_LABELS, "keywords": MAX_LABELS}
_COUNTS = ("author_count", "comment_count", "upvotes", "arxiv_version")
RECORD_FIELDS = frozenset(f.name for f in fields(Record))


def _checked_text(name: str, value: Any, limit: int) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{name}: is {type(value).__name__}, not text")
    if len(value) > 20 * limit:
        raise ValueError(f"{name}: {len(value):,} characters; at most {limit:,} are stored")
    value = plain_text(value)
    if len(value) > limit:
        raise ValueError(f"{name}: {len(value):,} characters; at most {limit:,} are stored")
    return value or None


def _checked_list(name: str, values: Any, most: int) -> tuple[str, ...]:
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{name}: is {type(values).__name__}, not a list of names")
    if len(values) > most:
        raise ValueError(f"{name}: {len(values):,} entries; at most {most:,} are stored")
    texts = [_checked_text(name, value, MAX_NAME) for value in values]
    return tuple(dict.fromkeys(text for text in texts if text)) if name != "authors" else tuple(t for t in texts if t)


def _check_count(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
        raise ValueError(f"{name}: {str(value)[:40]!r} is not a whole number from 0 to {MAX_COUNT:,}")


def _check_day(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, date) or isinstance(value, datetime):
        raise ValueError(f"{name}: {str(value)[:40]!r} is not a date")
    # Two days ahead covers every time zone; later ones would sit on top of the feed for ever.
    if not EARLIEST <= value <= date.today() + timedelta(days=2):
        raise ValueError(f"{name}: {value} is before {EARLIEST} or in the future")


def _checked_url(name: str, value: Any) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str) or len(value) > MAX_URL:
        raise ValueError(f"{name}: is not an address of at most {MAX_URL:,} characters")
    value = value.strip()
    try:
        parts = urlsplit(value)
        host = parts.hostname
    except ValueError:
        host, parts = None, urlsplit("")
    if parts.scheme not in ("http", "https") or not host or not value.isprintable() or re.search(r"[\s<>\"]", value):
        raise ValueError(f"{name}: {value[:80]!r} is not an http or https address")
    return value


@dataclass(frozen=True, slots=True)
class Paper:
    """One paper of the catalogue, as the store returns it.

    Notes
    -----
    ``key`` names it in addresses and indices: the arXiv id where there is one, else ``t-`` and the title's hash.
    ``feed_day`` is the day under which the feed shows it (see `papertrial.feed.merging.feed_day`); with
    ``feed_precision`` ``"month"`` it appears in its month only. ``origins`` says which source each field came from,
    ``sources`` maps every source that knows the paper to its address there. ``first_seen`` and ``updated`` are UTC.
    """

    id: int
    key: str
    title: str
    arxiv_id: str | None
    arxiv_version: int | None
    abstract: str | None
    summary: str | None
    ai_summary: str | None
    authors: tuple[str, ...]
    author_count: int | None
    published: date | None
    published_precision: Precision
    entered: date | None
    listed: date | None
    feed_day: date
    feed_precision: Precision
    organisation: str | None
    comment_count: int
    upvotes: int
    categories: tuple[str, ...]
    keywords: tuple[str, ...]
    code_url: str | None
    project_url: str | None
    pdf_url: str | None
    slug: str | None
    family: str | None
    heat: float
    first_seen: datetime
    updated: datetime
    revision: int
    sources: dict[str, str | None] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """The strongest source that knows the paper."""
        return max(self.sources, key=SOURCES.index)

    @property
    def source_url(self) -> str | None:
        """Where to read about the paper: the strongest source's address, else the arXiv abstract page."""
        for source in sorted(self.sources, key=SOURCES.index, reverse=True):
            if self.sources[source]:
                return self.sources[source]
        return f"https://arxiv.org/abs/{self.arxiv_id}" if self.arxiv_id else None

    @property
    def published_text(self) -> str | None:
        """The date as exactly as it is known: ``2018-10-09`` or ``2018-10``."""
        if self.published is None:
            return None
        return self.published.isoformat()[: 10 if self.published_precision == "day" else 7]


def paper_key(arxiv_id: str | None, title: str) -> str:
    """The public key of a paper, a function of what is known about it and of nothing else."""
    return arxiv_id or f"t-{title_key(title)}"
