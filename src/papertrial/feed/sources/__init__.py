"""One parser a format, all pure: bytes in, `Parsed` out. The format is found from the content, not from the name."""

import re
from datetime import date

from papertrial.feed.sources.parsed import MAX_BYTES, Parsed, decoded

FORMATS = (
    "a Daily Papers page as text or HTML, papers-API JSON, arXiv Atom or RSS, or OAI-PMH (formats arXiv and arXivRaw)"
)

__all__ = ["FORMATS", "MAX_BYTES", "Parsed", "parse"]


def parse(data: bytes, today: date | None = None) -> Parsed:
    """Read papers from a file's bytes, whatever the format; never raises on bad content.

    Parameters
    ----------
    data
        The file as it is, at most `MAX_BYTES`.
    today
        The day before which a page without dates was saved (default: today).

    Returns
    -------
    Parsed
        The records, and by line what could not be read.
    """
    if len(data) > MAX_BYTES:
        return _refused(f"{len(data):,} bytes; at most {MAX_BYTES:,} are read (split the file)")
    if data.startswith((b"%PDF", b"\x1f\x8b", b"PK\x03\x04")):
        return _refused(f"a PDF or compressed file; give {FORMATS}")
    text = decoded(data)
    start = text.lstrip()[:2000]
    if not start:
        return _refused("the file is empty")
    if start[0] in "{[":
        from papertrial.feed.sources.huggingface import parse_huggingface_json

        return parse_huggingface_json(data)
    if start[0] == "<":
        return _parse_markup(data, start, today)
    from papertrial.feed.sources.listing_text import looks_like_listing, parse_listing_text

    if looks_like_listing(text):
        return parse_listing_text(data, today)
    return _refused(f"not a format that is known; give {FORMATS}")


def _parse_markup(data: bytes, start: str, today: date | None) -> Parsed:
    root = re.search(r"<(?![?!])(?:[\w.-]+:)?([A-Za-z][\w.-]*)", start)
    name = root[1].lower() if root else ""
    if name in ("feed", "rss", "rdf", "oai-pmh"):
        from papertrial.feed.sources.arxiv import parse_arxiv_xml

        return parse_arxiv_xml(data)
    if name in ("html", "head", "body", "main", "div", "article", "section", "script", "meta", "p", "h1", "h2", "h3"):
        from papertrial.feed.sources.listing_html import parse_listing_html

        return parse_listing_html(data, today)
    return _refused(f"markup that begins with <{name[:40]}> is not a format that is known; give {FORMATS}")


def _refused(reason: str) -> Parsed:
    parsed = Parsed("page")
    parsed.problem(None, reason)
    return parsed
