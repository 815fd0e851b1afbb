"""All verdicts in one picture: a dot per paper, by how clearly its headline effect lies on one side of its margin.

The position of a paper is the distance from its margin to its mean effect, in half-widths of the 95 % interval; where a
claim has controls, that of the arm that it beats least. So a claim is upheld exactly where this is above 1 and
contradicted where it is below -1, whatever it was measured in. Claims of exact equality are judged seed by seed and
have no such position.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from papertrial.lab.verdict import Judgement

#: Where the axis ends; what lies beyond is drawn at the end.
FURTHEST = 30.0
COLUMNS = 72
WIDTH = 1000
STEP = WIDTH / (COLUMNS + 1)


@dataclass(frozen=True)
class Dot:
    """A paper in the picture; x and y in units of its view box."""

    address: str
    title: str
    word: str
    x: float
    y: float


@dataclass(frozen=True)
class Swarm:
    """The picture: its dots, its height, and the places of the marks on its axis."""

    dots: Sequence[Dot]
    height: float
    width: int
    upheld_from: float
    contradicted_to: float
    margin_at: float
    left_out: int

    @property
    def radius(self) -> float:
        return round(STEP * 0.42, 2)


def distance(judgement: Judgement) -> float | None:
    """Half-widths of the interval from the margin to the mean; None for exact claims and without an effect."""
    claim = judgement.claim
    if claim.kind == "exact" or judgement.effect is None:
        return None
    found = []
    for interval in (judgement.effect, *(interval for _, interval in judgement.controls)):
        half = (interval.high - interval.low) / 2
        ahead = interval.mean - claim.threshold
        if not math.isfinite(half):
            return None  # one seed: its interval is the whole line
        found.append(ahead / half if half > 0 else math.copysign(math.inf, ahead) if ahead else 0.0)
    return min(found)


def place(value: float) -> float:
    """From -1 to 1: linear near the margin, logarithmic further out, so that nobody is lost at the ends."""
    size = min(abs(value), FURTHEST)
    return math.copysign(math.asinh(size) / math.asinh(FURTHEST), value)


def swarm(judged: Sequence[tuple[str, str, Judgement]]) -> Swarm | None:
    """The picture of (address, title, judgement of the headline claim); None where nothing can be placed.

    Dots that would cover each other are stacked.
    """
    placed = [(distance(judgement), address, title, judgement) for address, title, judgement in judged]
    shown = sorted(
        ((value, address, title, judgement.word) for value, address, title, judgement in placed if value is not None),
        key=lambda item: (item[0], item[2]),
    )
    if not shown:
        return None
    columns = [round((place(value) + 1) / 2 * (COLUMNS - 1)) for value, *_ in shown]
    height = (max(Counter(columns).values()) + 0.5) * STEP
    taken: Counter[int] = Counter()
    dots = []
    for column, (_, address, title, word) in zip(columns, shown, strict=True):
        y = height - (taken[column] + 0.75) * STEP
        taken[column] += 1
        dots.append(Dot(address, title, word, round(_x(column), 1), round(y, 1)))
    at = {value: round(_x((place(value) + 1) / 2 * (COLUMNS - 1)), 1) for value in (-1.0, 0.0, 1.0)}
    return Swarm(dots, round(height, 1), WIDTH, at[1.0], at[-1.0], at[0.0], len(judged) - len(shown))


def _x(column: float) -> float:
    return (column + 1) * STEP
