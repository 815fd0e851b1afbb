"""Trending: its formula in closed form, and what vote farming gains by it."""

import math
from datetime import date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from papertrial.feed.merging import heat as catalogue_heat
from papertrial.site.people import pulse
from papertrial.site.people.pulse import BURST, Pulse, counted, damped, heat, vote_weight

NOW = datetime(2026, 3, 1, 12, 30)


@pytest.mark.parametrize(
    ("days", "cast", "weight"), [(0, 1, 0.1), (0.7, 1, 0.1), (3.5, 1, 0.5), (7, 1, 1.0), (700, 20, 1.0), (700, 40, 0.5)]
)
def test_the_weight_is_age_times_pace(days: float, cast: int, weight: float) -> None:
    assert vote_weight(NOW - timedelta(days=days), NOW, cast) == pytest.approx(weight)


def test_an_account_that_is_not_confirmed_weighs_nothing() -> None:
    assert vote_weight(None, NOW, 1) == 0.0


def test_votes_of_different_hours_add_up_and_bursts_are_damped() -> None:
    slow = [(NOW + timedelta(hours=i), 1.0) for i in range(50)]
    burst = [(NOW + timedelta(seconds=i), 1.0) for i in range(50)]
    assert counted(slow) == pytest.approx(50)
    assert counted(burst) == pytest.approx(BURST * (1 + math.log(10)))


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_damping_never_turns_more_votes_into_less(a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert damped(low) <= damped(high) + 1e-9
    assert damped(high) <= high + 1e-9


def test_damping_has_no_step_and_no_kink_where_it_begins() -> None:
    h = 1e-6
    assert damped(BURST) == pytest.approx(BURST)
    assert (damped(BURST + h) - damped(BURST)) / h == pytest.approx(1.0, rel=1e-3)


@given(st.integers(0, 10_000), st.integers(0, 10_000), st.dates(date(1990, 1, 1), date(2040, 1, 1)))
def test_heat_is_the_catalogues_where_nobody_here_took_part(upvotes: int, comments: int, day: date) -> None:
    assert heat(upvotes, comments, day, Pulse()) == catalogue_heat(upvotes, comments, day)


def test_heat_halves_interest_every_seven_days() -> None:
    day = date(2026, 3, 1)
    younger = heat(9, 0, day + timedelta(days=7), Pulse())  # 1 + 9
    older = heat(19, 0, day, Pulse())  # 1 + 19, seven days older
    assert younger == pytest.approx(older)


def test_a_farm_of_fresh_accounts_gains_less_than_ten_readers_over_a_day() -> None:
    """500 new accounts in one hour against 10 settled ones in ten hours."""
    farm = [(NOW, vote_weight(NOW - timedelta(minutes=5), NOW, 1))] * 500
    readers = [(NOW + timedelta(hours=i), vote_weight(NOW - timedelta(days=90), NOW, 3)) for i in range(10)]
    gains = {name: Pulse(weight=counted(cast)) for name, cast in (("farm", farm), ("readers", readers))}
    assert sum(weight for _, weight in farm) == pytest.approx(50)
    assert gains["farm"].weight == pytest.approx(BURST * (1 + math.log(10)))
    per_account = {"farm": gains["farm"].weight / 500, "readers": gains["readers"].weight / 10}
    assert per_account["readers"] > 25 * per_account["farm"]


def test_the_stated_formula_is_the_code() -> None:
    text = pulse.__doc__ or ""
    for figure in ("/ 7", "0.1 to 1", "20 / their number", "up to 5", "0.5 * (c + commenters)"):
        assert figure in text
    assert (pulse.FULL_WEIGHT_DAYS, pulse.LEAST_AGE_FACTOR, pulse.VOTES_A_DAY, BURST) == (7.0, 0.1, 20, 5.0)
    assert (pulse.COMMENT_WEIGHT, pulse.HALF_LIFE_DAYS) == (0.5, 7.0)
