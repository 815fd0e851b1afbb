"""Bounded types for parameters and bodies: what is out of bounds is refused with the field's name, never cut."""

import re
import unicodedata
from typing import Annotated

from fastapi import Path, Query
from pydantic import AfterValidator, StringConstraints
from starlette.convertors import Convertor, register_url_convertor

from papertrial.feed.records import Paper
from papertrial.feed.store import Store
from papertrial.site.errors import Problem


class _PaperConvertor(Convertor[str]):
    """A paper's name in an address: one segment, or an old arXiv id (``cs/9901001``)."""

    regex = r"[^/]+(?:/\d{7}(?:v\d{1,3})?)?"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("paper", _PaperConvertor())


def checked_line(text: str) -> str:
    """One line of text without control characters; spaces at the ends go."""
    text = unicodedata.normalize("NFC", text).strip()
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text):
        raise ValueError("holds control characters or line breaks")
    return text


def checked_text(text: str) -> str:
    """Text of several lines, line ends as ``\\n``, no other control characters."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n"))
    if any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" for c in text):
        raise ValueError("holds control characters")
    return text.strip()


Line = Annotated[str, AfterValidator(checked_line)]
Text = Annotated[str, AfterValidator(checked_text)]

#: A paper in an address: arXiv id, our key, or slug. The route writes ``{paper_id:paper}``.
PaperName = Annotated[str, Path(max_length=80, description="arXiv id, key or slug of a paper")]
#: The number of a row; the database knows no others.
RowNumber = Annotated[int, Path(ge=1, lt=2**63)]
Query250 = Annotated[str | None, Query(max_length=250, description="words, a title, a sentence or an arXiv id")]
Limit = Annotated[int, Query(ge=1, le=100, description="how many at most")]
Offset = Annotated[int, Query(ge=0, le=1_000_000, description="how many to leave out before")]
TagName = Annotated[str, StringConstraints(min_length=1, max_length=40), AfterValidator(checked_line)]


def found_paper(store: Store, name: str) -> Paper:
    """The paper of an address.

    Raises
    ------
    Problem
        404 where there is none.
    """
    paper = store.find(name) if name.isprintable() else None
    if paper is None:
        raise Problem(404, f"no paper here has the id {name[:80]!r}", field="paper_id")
    return paper


def checked_slug(text: str, fallback: str) -> str:
    """A part of an address made from a title."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60].strip("-") or fallback
