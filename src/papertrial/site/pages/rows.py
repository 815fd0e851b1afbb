"""Papers as rows of a list: each with its verdict and what the reader did with it, from a fixed number of queries."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date

from markupsafe import Markup

from papertrial.feed.records import Paper
from papertrial.site.board import Entry
from papertrial.site.context import Context
from papertrial.site.listing import Shown, show
from papertrial.site.pages import effect_plot
from papertrial.site.pages.excerpts import excerpt, searched_words
from papertrial.site.people import tags, votes
from papertrial.site.people.accounts import Reader

SNIPPET = 280


@dataclass(frozen=True, slots=True)
class Row:
    """What a list shows of a paper.

    `because` are the words that speak for a recommendation, `note` is its owner's, `excerpt` is what a search found.
    """

    shown: Shown
    entry: Entry | None
    plot: Markup
    voted: bool = False
    tags: tuple[str, ...] = ()
    note: str = ""
    because: tuple[tuple[str, float], ...] = ()
    excerpt: Markup | None = None

    @property
    def paper(self) -> Paper:
        return self.shown.paper

    @property
    def description(self) -> str:
        """The shortest description there is."""
        return self.paper.summary or self.paper.ai_summary or self.paper.abstract or ""

    @property
    def snippet(self) -> str:
        """The beginning of the description."""
        text = self.description
        return (
            text if len(text) <= SNIPPET else text[:SNIPPET].rsplit(" ", 1)[0].rstrip(" ,;:.") + "\N{NO-BREAK SPACE}…"
        )


@dataclass(frozen=True, slots=True)
class Day:
    """The rows of one day, or of a month where no more is known."""

    heading: str
    period: str
    rows: tuple[Row, ...]


def rows(here: Context, reader: Reader | None, found: Sequence[Shown]) -> list[Row]:
    """Rows for papers that are about to be shown."""
    snapshot = here.board.snapshot
    ids = [shown.paper.id for shown in found]
    voted = votes.voted_for(here.store, reader.id, ids) if reader and ids else set()
    tagged = tags.tags_on(here.store, reader.id, ids) if reader and ids else {}
    made = []
    for shown in found:
        entry = snapshot.get(shown.paper.slug)
        plot = effect_plot.mini(entry.headline if entry else None)
        own = tuple(tagged.get(shown.paper.id, ()))
        made.append(Row(shown, entry, plot, shown.paper.id in voted, own))
    return made


def rows_of_ids(here: Context, reader: Reader | None, ids: Sequence[int]) -> list[Row]:
    """Rows in the order of the ids; papers that are gone are left out."""
    return rows(here, reader, show(here.store, [paper for paper in here.store.by_ids(ids) if paper is not None]))


def explained(found: Iterable[Row], words: dict[int, tuple[tuple[str, float], ...]]) -> list[Row]:
    """Rows with the words that speak for each."""
    return [replace(row, because=words.get(row.paper.id, ())) for row in found]


def searched(found: Iterable[Row], query: str) -> list[Row]:
    """Rows with the part of their description that a search is about."""
    words = searched_words(query)
    return [replace(row, excerpt=excerpt(row.description, words)) for row in found]


def by_day(found: Iterable[Row]) -> list[Day]:
    """Consecutive rows of one day under one heading."""
    days: list[Day] = []
    for row in found:
        paper = row.paper
        exact = paper.feed_precision == "day"
        period = paper.feed_day.isoformat() if exact else f"{paper.feed_day:%Y-%m}"
        if days and days[-1].period == period:
            days[-1] = replace(days[-1], rows=(*days[-1].rows, row))
        else:
            days.append(Day(day_text(paper.feed_day) if exact else f"{paper.feed_day:%B %Y}", period, (row,)))
    return days


def day_text(day: date) -> str:
    """A day as people read it."""
    return f"{day:%A}, {day.day} {day:%B %Y}"
