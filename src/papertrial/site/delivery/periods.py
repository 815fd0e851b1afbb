"""Days and weeks as digests know them: each ends at an hour of a clock somewhere, and has a name that it keeps.

A daily digest ends every day at its hour, a weekly one on Mondays, in the subscriber's time zone. Ends are found from
the wall clock there, so a day in which clocks change has 23 or 25 hours and no digest is doubled or left out.
"""

from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Literal
from zoneinfo import ZoneInfo

Cadence = Literal["daily", "weekly"]
MONDAY = 0


@dataclass(frozen=True, slots=True)
class Period:
    """A day or week. ``name`` is the date or ISO week that it covers mostly; times are UTC without a zone."""

    name: str
    starts: datetime
    ends: datetime


def period_ending(by: datetime, cadence: Cadence, zone: str, hour: int) -> Period:
    """The newest period that has ended.

    Parameters
    ----------
    by
        The moment to look from, UTC without a zone; a period that ends at this moment has ended.
    zone
        IANA name of the time zone, such as ``Europe/Berlin``.
    hour
        0 to 23, on the clock there.
    """
    there = ZoneInfo(zone)
    day = by.replace(tzinfo=UTC).astimezone(there).date()
    if cadence == "weekly":
        day -= timedelta(days=(day.weekday() - MONDAY) % 7)
    step = timedelta(days=7 if cadence == "weekly" else 1)
    if _moment(day, hour, there) > by:
        day -= step
    return _period(day, step, hour, there)


def end_after(moment: datetime, cadence: Cadence, zone: str, hour: int) -> datetime:
    """When the first period ends that ends after a moment; UTC without a zone."""
    day = period_ending(moment, cadence, zone, hour).ends.replace(tzinfo=UTC).astimezone(ZoneInfo(zone)).date()
    step = timedelta(days=7 if cadence == "weekly" else 1)
    end = _moment(day + step, hour, ZoneInfo(zone))
    # Where the hour does not exist on a day, that day's end lies an hour late on the clock, and may be `moment`'s own.
    return end if end > moment else _moment(day + 2 * step, hour, ZoneInfo(zone))


def _period(day: date, step: timedelta, hour: int, there: ZoneInfo) -> Period:
    covered = day - timedelta(days=1) if hour < 12 else day
    if step.days == 7:
        year, week, _ = (day - timedelta(days=1)).isocalendar()
        name = f"{year:04d}-W{week:02d}"
    else:
        name = covered.isoformat()
    return Period(name, _moment(day - step, hour, there), _moment(day, hour, there))


def _moment(day: date, hour: int, there: ZoneInfo) -> datetime:
    return datetime.combine(day, time(hour), there).astimezone(UTC).replace(tzinfo=None)
