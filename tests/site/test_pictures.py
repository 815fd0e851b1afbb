"""The pictures of many papers at once: the swarm of verdicts, the strip of periods, the bars of families."""

import itertools
import math
import re
from datetime import date
from pathlib import Path

import pytest

import papertrial.papers
from papers_on_trial import _evidence, write_papers
from papertrial.errors import UsageError
from papertrial.feed.paging import period_bounds
from papertrial.feed.store import Store
from papertrial.lab.claim import FAMILIES, Claim
from papertrial.lab.statistics import Interval
from papertrial.lab.verdict import Judgement, judge
from papertrial.site import templating
from papertrial.site.board import Board
from papertrial.site.pages.families import ABOUT, WORDS, Fared
from papertrial.site.pages.strip import SIDE, strip
from papertrial.site.pages.swarm import FURTHEST, distance, place, swarm
from papertrial.site.pages.trial_view import trial_view
from site_service import TODAY, Site, records


def claim(**changes: object) -> Claim:
    values: dict[str, object] = {
        "statement": "Counting sheep keeps a model awake for longer.",
        "baseline": "no_sheep",
        "method": "sheep",
        "metric": "minutes_awake",
        "unit": "min",
        "margin": 5.0,
        "margin_reason": "it is a round number",
        "paper_figure": "unknown",
    }
    return Claim.model_validate(values | changes)


# -- the swarm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"controls": ["shuffled"]}, {"kind": "no_worse"}, {"better": "lower"}])
def test_the_place_of_a_dot_says_what_the_verdict_says(changes: dict[str, object]) -> None:
    asked, words = claim(**changes), set()
    for case, ahead in enumerate(range(-18, 19)):
        judged = judge(asked, _evidence(f"case {case}", float(ahead), 3.0))
        words.add(judged.word)
        found = distance(judged)
        assert found is not None
        if judged.word == "upheld":
            assert found > 1
        elif judged.word == "contradicted":
            assert found < -1
        else:
            assert -1 <= found <= 1
    assert words == {"upheld", "contradicted", "undecided"}


def test_what_has_no_interval_has_no_place() -> None:
    one_seed = Judgement(claim(), "small", "undecided", "", (6.0,), Interval(6.0, -math.inf, math.inf, 1))
    exact = Judgement(claim(kind="exact", margin=0.0, tolerance=1.0), "small", "upheld", "", (0.0,) * 3)
    nothing = Judgement(claim(), "small", "undecided", "a precondition failed")
    assert [distance(one) for one in (one_seed, exact, nothing)] == [None] * 3
    equal = Judgement(claim(), "small", "upheld", "", (6.0,) * 3, Interval(6.0, 6.0, 6.0, 3))
    assert distance(equal) == math.inf
    drawn = swarm([("/a", "A", equal), ("/b", "B", exact)])
    assert drawn is not None
    assert (len(drawn.dots), drawn.left_out) == (1, 1)
    assert drawn.dots[0].x <= drawn.width - drawn.radius
    assert swarm([("/b", "B", exact)]) is None


def test_places_rise_with_distances_and_end_at_the_edges() -> None:
    values = [-math.inf, -FURTHEST, -5.0, -1.0, -0.2, 0.0, 0.2, 1.0, 5.0, FURTHEST, math.inf]
    placed = [place(value) for value in values]
    assert placed == sorted(placed)
    assert (placed[0], placed[5], placed[-1]) == (-1.0, 0.0, 1.0)


def test_no_dot_covers_another_and_all_are_in_the_picture() -> None:
    judged = [
        (f"/{case}", f"Paper {case}", judge(claim(), _evidence(f"case {case}", 5 + case % 7 - 3, 2.0)))
        for case in range(120)
    ]
    drawn = swarm(judged)
    assert drawn is not None
    assert sorted(dot.address for dot in drawn.dots) == sorted(address for address, _, _ in judged)
    for one, other in itertools.combinations(drawn.dots, 2):
        assert math.hypot(one.x - other.x, one.y - other.y) >= 2 * drawn.radius
    for dot in drawn.dots:
        assert drawn.radius <= dot.x <= drawn.width - drawn.radius
        assert drawn.radius <= dot.y <= drawn.height - drawn.radius
    assert drawn.contradicted_to < drawn.margin_at < drawn.upheld_from


# -- the strip of periods ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["day", "week", "month"])
def test_a_strip_counts_what_its_periods_list(site: Site, kind: str) -> None:
    store: Store = site.context.store
    period = {"day": f"{TODAY}", "week": f"{TODAY:%G-W%V}", "month": f"{TODAY:%Y-%m}"}[kind]
    bars = strip(store, period, TODAY)
    assert len(bars) == 2 * SIDE + 1
    assert [bar.name for bar in bars if bar.current] == [period]
    assert bars[-1].current, "nothing lies after today"
    for bar in bars:
        first, last, whole_month = period_bounds(bar.name)
        days = [record.entered for record in records() if record.entered and first <= record.entered <= last]
        here = [paper for paper in store.in_scope() if first <= paper.feed_day <= last]
        exact = [paper for paper in here if whole_month or paper.feed_precision == "day"]
        assert bar.number == len(days) + len(exact)
        assert bar.address == f"/{kind}/{bar.name}"
    assert max(bar.height for bar in bars) == 100.0
    assert all(bar.height == pytest.approx(100 * bar.number / max(b.number for b in bars), abs=0.1) for bar in bars)


@pytest.mark.parametrize("period", ["0001-01", "0001-01-01", "9999-11", "9999-12-31", "9999-W51", "2019-W01"])
def test_a_strip_ends_where_dates_end(site: Site, period: str) -> None:
    bars = strip(site.context.store, period, TODAY)
    assert [bar.current for bar in bars].count(True) == 1
    for bar in bars:
        period_bounds(bar.name)  # each is a period that exists


def test_a_strip_is_of_a_period(site: Site) -> None:
    with pytest.raises(UsageError, match="yesterday"):
        strip(site.context.store, "yesterday", date(2026, 1, 1))


# -- families ---------------------------------------------------------------------------------------------------------


def test_every_family_has_a_sign_and_a_line() -> None:
    drawn = set(re.findall(r'<symbol id="(\w+)"', (templating.STATIC / "families.svg").read_text()))
    assert drawn == set(ABOUT) == set(FAMILIES)
    assert all(line.endswith(".") and len(line) < 90 for line in ABOUT.values())


def test_a_bar_of_verdicts_is_full_and_without_gaps() -> None:
    fared = Fared(dict(zip(WORDS, (3, 0, 2, 4), strict=True)))
    assert (fared.total, fared.judged) == (9, 5)
    assert [share.word for share in fared.shares] == ["upheld", "undecided", "none"]
    ends = [share.start + share.width for share in fared.shares]
    assert [share.start for share in fared.shares][1:] == pytest.approx(ends[:-1], abs=0.002)
    assert ends[-1] == pytest.approx(100, abs=0.002)
    assert fared.text == "3 upheld, 2 undecided, 4 without a verdict"
    assert Fared(dict.fromkeys(WORDS, 0)).shares == []


# -- a paper's trial --------------------------------------------------------------------------------------------------


def test_metrics_are_shown_in_the_order_of_the_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The headline's metric comes first, wherever the trial measured it."""
    root = write_papers(tmp_path)
    path = root / "decoding" / "sheep_upheld" / "paper.toml"
    text = path.read_text()
    first = text.index("[[claim]]")
    other = text[first:].replace('"minutes_awake"', '"yawns"')
    path.write_text(f"{text[:first]}{other}\n{text[first:]}")
    monkeypatch.setattr(papertrial.papers, "__path__", [str(root)])
    entry = Board().snapshot.get("sheep_upheld")
    assert entry is not None
    view = trial_view(entry)
    assert [metric.metric for metric in view.claimed] == ["yawns", "minutes_awake"]
    assert [Path(metric.picture.address).stem for metric in view.claimed if metric.picture] == ["arms-0", "arms-1"]
