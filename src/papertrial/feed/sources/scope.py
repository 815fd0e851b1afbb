"""The papers in scope: the cards (``papers/<family>/<slug>/paper.toml``) as records.

A card is validated in full by the lab; here it is read for what a catalogue shows, and one bad card costs itself only.
"""

import os
import tomllib
from datetime import date
from pathlib import Path
from typing import Any

import papertrial
from papertrial.feed.records import parse_day
from papertrial.feed.sources.parsed import Parsed

#: A card has some 6 kB; this keeps a file that strayed into its place from being read.
MAX_CARD_BYTES = 1_000_000


def card_paths(folder: Path | None = None) -> list[Path]:
    """Every card, sorted by slug: under ``folder``, or of the package and of the user's own ``PAPERTRIAL_PAPERS``."""
    roots = [folder] if folder else [Path(papertrial.__file__).resolve().parent / "papers"]
    if folder is None and os.environ.get("PAPERTRIAL_PAPERS"):
        roots.append(Path(os.environ["PAPERTRIAL_PAPERS"]))
    found = [path for root in roots for path in root.glob("*/*/paper.toml")]
    return sorted(found, key=lambda card: card.parent.name)


def parse_scope(folder: Path | None = None) -> Parsed:
    """Read every card under a papers folder (default: the installed one), sorted by slug."""
    parsed = Parsed("card")
    for path in card_paths(folder):
        _read_card(parsed, path)
    return parsed


def slugs_in_scope(folder: Path | None = None) -> set[str]:
    """The slugs of all cards, also of those that cannot be read: a typing error must not take a paper out of scope."""
    return {path.parent.name for path in card_paths(folder)}


def _read_card(parsed: Parsed, path: Path) -> None:
    family, slug = path.parent.parent.name, path.parent.name
    where = f"{family}/{slug}/paper.toml"
    mine = Parsed("card")
    try:
        if path.stat().st_size > MAX_CARD_BYTES:
            raise ValueError(f"more than {MAX_CARD_BYTES:,} bytes")
        card = tomllib.loads(path.read_text(encoding="utf-8"))
        fields = _fields(card)
    except (OSError, ValueError, RecursionError) as error:
        parsed.problem(None, f"{where}: {error}")
        return
    mine.add(None, slug=slug, family=family, **fields)
    parsed.records += mine.records
    for problem in mine.problems:
        parsed.problem(None, f"{where}: {problem}")


def _fields(card: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "title": card.get("title", ""),
        "arxiv_id": card.get("arxiv"),
        "author_count": card.get("authors"),
        "organisation": card.get("organisation"),
        "code_url": card.get("code"),
        "summary": card.get("summary"),
        "keywords": card.get("keywords", []),
    }
    published = card.get("published")
    if isinstance(published, str):
        fields["published"], fields["published_precision"] = parse_day(published)
    elif isinstance(published, date):
        fields["published"] = published
    return fields
