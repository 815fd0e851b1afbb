"""A strip of bars beside a day, week or month: how many papers its neighbours have, each bar leading there."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta

import sqlalchemy as sa

from papertrial.feed.paging import period_bounds
from papertrial.feed.schema import papers
from papertrial.feed.store import Store
from papertrial.site.listing import period_of

#: Bars to each side of the period.
SIDE = 8


@dataclass(frozen=True)
class Bar:
    """One period: where it is, what it is called, how many papers it has, and its height in percent."""

    address: str
    label: str
    name: str
    number: int
    height: float
    current: bool


def strip(store: Store, period: str, today: date) -> Sequence[Bar]:
    """Bars for the periods around one of the same kind; none lies after today, or before dates begin.

    Counting reads an index over the days shown, whatever the size of the catalogue before and after.
    """
    first, last, whole_month = period_bounds(period)
    kind = "month" if whole_month else "day" if first == last else "week"
    starts = _starts(first, kind, today)
    end = _moved(starts[-1], kind, 1) or date.max
    counts: Counter[str] = Counter()
    query = sa.select(papers.c.feed_day, sa.func.count()).where(papers.c.feed_day.between(starts[0], end))
    if kind != "month":
        query = query.where(papers.c.feed_precision == "day")
    with store.reading() as connection:
        for day, number in connection.execute(query.group_by(papers.c.feed_day)):
            counts[period_of(day, kind)] += number
    named = [period_of(start, kind) for start in starts]
    most = max((counts[name] for name in named), default=0)
    return [
        Bar(
            f"/{kind}/{name}",
            _label(start, kind),
            name,
            counts[name],
            round(100 * counts[name] / most, 1) if most else 0.0,
            name == period_of(first, kind),
        )
        for start, name in zip(starts, named, strict=True)
    ]


def _starts(first: date, kind: str, today: date) -> list[date]:
    """The first days of the periods to show: `SIDE` on both sides, moved back where the future begins."""
    found = [first]
    while len(found) <= SIDE:
        after = _moved(found[-1], kind, 1)
        if after is None or after > today:
            break
        found.append(after)
    while len(found) < 2 * SIDE + 1:
        before = _moved(found[0], kind, -1)
        if before is None:
            break
        found.insert(0, before)
    return found


def _moved(start: date, kind: str, step: int) -> date | None:
    """The first day of the next or previous period; None outside of what dates can say."""
    try:
        if kind == "month":
            month = start.year * 12 + start.month - 1 + step
            return date(month // 12, month % 12 + 1, 1)
        return start + timedelta(days=step * (1 if kind == "day" else 7))
    except (ValueError, OverflowError):
        return None


def _label(start: date, kind: str) -> str:
    if kind == "month":
        return f"{start:%b}" if start.month > 1 else f"{start.year}"
    if kind == "week":
        return f"{start.isocalendar()[1]}"
    return f"{start.day}" if start.day > 1 else f"{start:%b}"
