"""Feed pages: a day, a week, a month, everything, or what is trending, with what people here did counted in.

Within a day the papers with most votes come first, the votes of other services and of people here added up. Trending
merges two stored orders: the catalogue's heat, and `pulse.heat` of the papers that people here touched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import islice
from typing import Any, Literal

import sqlalchemy as sa

from papertrial.errors import UsageError
from papertrial.feed import people_schema as tables
from papertrial.feed.records import Paper
from papertrial.feed.schema import papers
from papertrial.feed.store import Store, period_bounds
from papertrial.site.people.pulse import Pulse, pulses

Order = Literal["votes", "trending"]
#: How deep trending goes.
DEEPEST = 10_000
_NO_PULSE = Pulse()


@dataclass(frozen=True, slots=True)
class Shown:
    """A paper with what people here did with it."""

    paper: Paper
    pulse: Pulse = _NO_PULSE

    @property
    def upvotes(self) -> int:
        """Votes here and elsewhere."""
        return self.paper.upvotes + self.pulse.votes

    @property
    def comments(self) -> int:
        """Comments here and elsewhere."""
        return self.paper.comment_count + self.pulse.comments


@dataclass(frozen=True, slots=True)
class Selection:
    """Which papers a listing is about; None leaves a side open.

    ``hidden_from`` leaves out what that account hid; ``submitter`` is an account's name.
    """

    period: str | None = None
    submitter: str | None = None
    organisation: str | None = None
    family: str | None = None
    hidden_from: int | None = None

    def conditions(self) -> list[sa.ColumnElement[bool]]:
        """The selection as conditions on `papers`."""
        found: list[sa.ColumnElement[bool]] = []
        if self.period is not None:
            first, last, whole_month = period_bounds(self.period)
            found.append(papers.c.feed_day.between(first, last))
            if not whole_month:
                found.append(papers.c.feed_precision == "day")
        if self.organisation is not None:
            found.append(papers.c.organisation == self.organisation)
        if self.family is not None:
            found.append(papers.c.family == self.family)
        if self.submitter is not None:
            submissions, users = tables.submissions, tables.users
            theirs = sa.select(submissions.c.paper_id).join(users, users.c.id == submissions.c.user_id)
            theirs = theirs.where(users.c.name == self.submitter, submissions.c.for_feed, submissions.c.state == "done")
            found.append(papers.c.id.in_(theirs.where(submissions.c.paper_id.is_not(None))))
        if self.hidden_from is not None:
            hidden = tables.hidden
            mine = sa.select(hidden.c.paper_id).where(hidden.c.user_id == self.hidden_from)
            found.append(papers.c.id.not_in(mine))
        return found


def list_papers(
    store: Store, selection: Selection | None = None, *, order: Order = "votes", limit: int = 50, offset: int = 0
) -> list[Shown]:
    """One page of papers.

    Parameters
    ----------
    order
        ``"votes"``: newest day first, within a day most votes first. ``"trending"``: hottest first.

    Raises
    ------
    UsageError
        The period is not a day, week or month; trending deeper than `DEEPEST`.
    """
    chosen = selection or Selection()
    if order == "trending":
        if offset + limit > DEEPEST:
            raise UsageError(f"trending goes {DEEPEST:,} papers deep; {offset + limit:,} were asked for")
        ids = _trending(store, chosen, limit, offset)
    else:
        ids = _by_day(store, chosen, limit, offset)
    return show(store, [paper for paper in store.by_ids(ids) if paper is not None])


def show(store: Store, found: Sequence[Paper]) -> list[Shown]:
    """Papers with what people here did with them."""
    here = pulses(store, [paper.id for paper in found])
    return [Shown(paper, here.get(paper.id, _NO_PULSE)) for paper in found]


def _by_day(store: Store, selection: Selection, limit: int, offset: int) -> list[int]:
    """Days from the newest on; a day is opened only where the page reaches into it."""
    wanted = selection.conditions()
    days = sa.select(papers.c.feed_day, sa.func.count()).where(*wanted)
    days = days.group_by(papers.c.feed_day).order_by(papers.c.feed_day.desc())
    pulse = tables.pulse
    total = papers.c.upvotes + sa.func.coalesce(pulse.c.votes, 0)
    one_day = sa.select(papers.c.id).select_from(papers.outerjoin(pulse, pulse.c.paper_id == papers.c.id))
    one_day = one_day.where(*wanted).order_by(total.desc(), papers.c.id.desc())
    found: list[int] = []
    with store.reading() as connection:
        for day, count in connection.execute(days, execution_options={"stream_results": True}):
            if offset >= count:
                offset -= count
                continue
            page = one_day.where(papers.c.feed_day == day).limit(limit - len(found)).offset(offset)
            found += connection.execute(page).scalars()
            offset = 0
            if len(found) >= limit:
                break
    return found


def _trending(store: Store, selection: Selection, limit: int, offset: int) -> list[int]:
    wanted, pulse = selection.conditions(), tables.pulse
    touched = sa.select(pulse.c.paper_id)
    deep = offset + limit
    quiet: sa.Select[Any] = sa.select(papers.c.heat, papers.c.id).where(*wanted, papers.c.id.not_in(touched))
    lively: sa.Select[Any] = sa.select(pulse.c.heat, papers.c.id).join(papers, papers.c.id == pulse.c.paper_id)
    with store.reading() as connection:
        quiet = quiet.order_by(papers.c.heat.desc(), papers.c.id.desc()).limit(deep)
        lively = lively.where(*wanted).order_by(pulse.c.heat.desc(), pulse.c.paper_id.desc()).limit(deep)
        rows = [*connection.execute(quiet), *connection.execute(lively)]
    ordered = sorted(((row[0], row[1]) for row in rows), reverse=True)
    return [paper_id for _, paper_id in islice(ordered, offset, deep)]


def count(store: Store, selection: Selection) -> int:
    """How many papers a selection has."""
    if selection == Selection():
        return store.count()
    with store.reading() as connection:
        query = sa.select(sa.func.count()).select_from(papers).where(*selection.conditions())
        return int(connection.execute(query).scalar_one())


def neighbours(store: Store, period: str) -> tuple[str | None, str | None]:
    """The periods before and after one of the same kind that have papers; None where there is none."""
    first, last, whole_month = period_bounds(period)
    exact = [] if whole_month else [papers.c.feed_precision == "day"]
    before = sa.select(sa.func.max(papers.c.feed_day)).where(papers.c.feed_day < first, *exact)
    after = sa.select(sa.func.min(papers.c.feed_day)).where(papers.c.feed_day > last, *exact)
    with store.reading() as connection:
        days = connection.execute(before).scalar(), connection.execute(after).scalar()
    kind = "month" if whole_month else "day" if first == last else "week"
    earlier, later = (period_of(day, kind) if day is not None else None for day in days)
    return earlier, later


def period_of(day: date, kind: str) -> str:
    """The day, ISO week or month that a day is in, as text."""
    if kind == "month":
        return f"{day.year:04d}-{day.month:02d}"
    if kind == "week":
        year, week, _ = day.isocalendar()
        return f"{year:04d}-W{week:02d}"
    return day.isoformat()


def period_days(period: str) -> list[date]:
    """Every day of a period."""
    first, last, _ = period_bounds(period)
    return [first + timedelta(days=i) for i in range((last - first).days + 1)]
