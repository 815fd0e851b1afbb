"""Pages of papers: spans of days, orders, and cursors that say where a page ended."""

import base64
import json
import re
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import sqlalchemy as sa

from papertrial.errors import UsageError
from papertrial.feed import schema
from papertrial.feed.records import Paper

MAX_LIMIT = 1000


@dataclass(frozen=True, slots=True)
class Page:
    """Some papers, and the cursor of those that follow; None at the end."""

    papers: tuple[Paper, ...]
    next_cursor: str | None


def page_order(order: str, narrowed: bool) -> tuple[sa.Column[Any], ...]:
    """The columns of an order, each descending, the last one unique; without narrowing every order has its index."""
    papers = schema.papers
    orders: dict[str, tuple[sa.Column[Any], ...]] = {
        "votes": (papers.c.feed_day, papers.c.upvotes, papers.c.id),
        "trending": (papers.c.heat, papers.c.id),
        "top": (papers.c.upvotes, papers.c.feed_day, papers.c.id),
    }
    if order not in orders:
        raise UsageError(f"order is {order!r}; write one of {', '.join(orders)}")
    if order == "top" and not narrowed:
        raise UsageError("order 'top' is for a day, week, month, organisation or family; 'trending' is for all papers")
    return orders[order]


def period_bounds(period: str) -> tuple[date, date, bool]:
    """First and last day of a day, ISO week or month, and whether it is a month.

    Raises
    ------
    UsageError
        Naming what was given and the three forms.
    """
    text = period.strip()
    try:
        if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text, re.ASCII):
            day = date.fromisoformat(text)
            return day, day, False
        if match := re.fullmatch(r"(\d{4})-W(\d{2})", text, re.ASCII | re.IGNORECASE):
            monday = date.fromisocalendar(int(match[1]), int(match[2]), 1)
            return monday, monday + timedelta(days=6), False
        if match := re.fullmatch(r"(\d{4})-(\d{2})", text, re.ASCII):
            first = date(int(match[1]), int(match[2]), 1)
            return first, (first + timedelta(days=31)).replace(day=1) - timedelta(days=1), True
    except (ValueError, OverflowError):
        pass
    raise UsageError(f"{period[:40]!r} is not a day (2025-10-03), a week (2025-W40) or a month (2025-10)")


def checked_limit(limit: int) -> int:
    """A page length from 1 to `MAX_LIMIT`, or an error."""
    if not 1 <= limit <= MAX_LIMIT:
        raise UsageError(f"limit is {limit}; a page holds 1 to {MAX_LIMIT} papers")
    return limit


def write_cursor(order: str, *values: Any) -> str:
    """An opaque cursor: where a page ended."""
    text = json.dumps([order, *(v.isoformat() if isinstance(v, date) else v for v in values)])
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def read_cursor(cursor: str, order: str) -> list[Any]:
    """The values of a cursor that `write_cursor` made for the same order."""
    kinds = {"votes": (str, int, int), "trending": (float, int), "top": (int, str, int), "topic": (str, int)}[order]
    try:
        if len(cursor) > 400:
            raise ValueError("too long")
        made_for, *values = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        if made_for != order or [type(v) for v in values] != list(kinds):
            raise ValueError("another order")
        if any(isinstance(v, int) and abs(v) >= 2**63 for v in values):
            raise ValueError("too large")
        return [date.fromisoformat(v) if isinstance(v, str) else v for v in values]
    except (ValueError, TypeError, RecursionError):
        raise UsageError(f"the cursor {cursor[:40]!r} is not one that a page of this listing gave") from None
