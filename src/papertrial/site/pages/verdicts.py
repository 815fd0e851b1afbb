"""The verdict board: every paper in scope with its headline claim, the effect against the margin, and the verdict."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from markupsafe import Markup
from starlette.responses import Response

from papertrial.lab.claim import FAMILIES, PaperCard
from papertrial.lab.verdict import Judgement
from papertrial.site.board import Entry, Snapshot
from papertrial.site.context import Here, MaybeReader
from papertrial.site.errors import Problem
from papertrial.site.pages import effect_plot
from papertrial.site.pages.serving import page

router = APIRouter(include_in_schema=False)

WORDS = ("upheld", "contradicted", "undecided", "none")
STATES = ("fresh", "aged", "stale", "incomplete", "not yet on trial")
SORTS = ("title", "family", "published", "effect", "verdict", "state")

Choice = Annotated[str, Query(max_length=40)]


@dataclass(frozen=True)
class Line:
    """One paper on the board. ``clearance`` is the effect in units of its margin, which compares across metrics."""

    card: PaperCard
    judgement: Judgement | None
    state: str
    problems: tuple[str, ...]
    plot: Markup
    published: str
    clearance: float | None

    @property
    def word(self) -> str:
        return self.judgement.word if self.judgement else "none"


@router.get("/verdicts")
def verdicts(
    request: Request,
    here: Here,
    reader: MaybeReader,
    sort: Choice = "verdict",
    descending: bool = False,
    family: Choice = "",
    verdict: Choice = "",
    state: Choice = "",
    q: Annotated[str, Query(max_length=100)] = "",
) -> Response:
    """The board, sorted and narrowed down by the address."""
    for name, value, known in (
        ("sort", sort, SORTS),
        ("family", family, ("", *FAMILIES)),
        ("verdict", verdict, ("", *WORDS)),
        ("state", state, ("", *STATES)),
    ):
        if value not in known:
            raise Problem(400, f"{name}: {value!r} is not one of {', '.join(filter(None, known))}", field=name)

    chosen = {"sort": sort, "descending": descending, "family": family, "verdict": verdict, "state": state, "q": q}

    def values() -> dict[str, Any]:
        snapshot = here.board.snapshot
        every = here.cache.get(("board", snapshot.number), 3600.0, lambda: lines(snapshot))
        words = q.lower().split()
        shown = [
            line
            for line in every
            if (not family or line.card.family == family)
            and (not verdict or line.word == verdict)
            and (not state or line.state == state)
            and all(word in f"{line.card.title} {line.card.headline.statement}".lower() for word in words)
        ]
        counts = Counter(line.word for line in every)
        return {
            "lines": ordered(shown, sort, descending),
            "counts": {word: counts.get(word, 0) for word in WORDS},
            "total": len(every),
            "by_family": tally(every),
            "chosen": chosen,
            "families": FAMILIES,
            "words": WORDS,
            "states": STATES,
        }

    return page(request, reader, "verdicts.html.j2", values)


def lines(snapshot: Snapshot) -> list[Line]:
    """Every paper in scope."""
    return [line_of(entry) for entry in snapshot]


def line_of(entry: Entry) -> Line:
    """One paper."""
    judged = entry.headline
    published = entry.card.published
    day = published.isoformat() if isinstance(published, date) else published
    clearance = None
    if judged is not None and judged.effect is not None:
        bound = judged.claim.margin or judged.claim.tolerance or 0.0
        clearance = judged.effect.mean / bound if bound else math.copysign(math.inf, judged.effect.mean)
    standing = entry.standing
    return Line(entry.card, judged, standing.state, standing.problems, effect_plot.mini(judged), day, clearance)


def ordered(found: list[Line], sort: str, descending: bool) -> list[Line]:
    """Sorted by a column; papers without an effect stay behind in both directions, equals are by title."""
    keys: dict[str, Callable[[Line], Any]] = {
        "title": lambda line: line.card.title.lower(),
        "family": lambda line: line.card.family,
        "published": lambda line: line.published,
        "effect": lambda line: line.clearance,
        "verdict": lambda line: WORDS.index(line.word),
        "state": lambda line: STATES.index(line.state),
    }
    by_title = sorted(found, key=keys["title"])
    there = [line for line in by_title if keys[sort](line) is not None]
    return sorted(there, key=keys[sort], reverse=descending) + [line for line in by_title if keys[sort](line) is None]


def tally(found: list[Line]) -> list[tuple[str, dict[str, int], int]]:
    """For each family that has papers: how many of each verdict, and how many in all."""
    counts: dict[str, Counter[str]] = {}
    for line in found:
        counts.setdefault(line.card.family, Counter())[line.word] += 1
    return [
        (name, {w: counts[name].get(w, 0) for w in WORDS}, counts[name].total()) for name in FAMILIES if name in counts
    ]
