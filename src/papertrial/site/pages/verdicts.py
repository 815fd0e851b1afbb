"""The verdict board: every paper in scope with its headline claim, the effect against the margin, and the verdict."""

import math
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
from papertrial.site.pages.families import WORDS, families, fared
from papertrial.site.pages.serving import page
from papertrial.site.pages.swarm import Swarm, swarm

router = APIRouter(include_in_schema=False)

STATES = ("fresh", "aged", "stale", "incomplete", "not yet on trial")
SORTS = {
    "verdict": "verdict",
    "effect": "effect, in margins",
    "published": "date",
    "title": "title",
    "family": "family",
    "state": "state of the evidence",
}
#: Columns whose largest values are what one looks for first.
LARGEST_FIRST = frozenset(("effect", "published"))

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

    @property
    def address(self) -> str:
        return f"/papers/{self.card.arxiv or self.card.slug}"


@router.get("/verdicts")
def verdicts(
    request: Request,
    here: Here,
    reader: MaybeReader,
    sort: Choice = "verdict",
    descending: bool | None = None,
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

    turned = sort in LARGEST_FIRST if descending is None else descending
    chosen = {"sort": sort, "descending": turned, "family": family, "verdict": verdict, "state": state, "q": q}

    def values() -> dict[str, Any]:
        snapshot = here.board.snapshot
        every, picture = here.cache.get(("board", snapshot.number), 3600.0, lambda: _board(snapshot))
        words = q.lower().split()
        shown = [
            line
            for line in every
            if (not family or line.card.family == family)
            and (not verdict or line.word == verdict)
            and (not state or line.state == state)
            and all(word in f"{line.card.title} {line.card.headline.statement}".lower() for word in words)
        ]
        return {
            "lines": ordered(shown, sort, turned),
            "total": len(every),
            "fared": fared(snapshot),
            "families": families(snapshot),
            "swarm": picture,
            "chosen": chosen,
            "words": WORDS,
            "states": STATES,
            "sorts": SORTS,
            "largest_first": LARGEST_FIRST,
        }

    return page(request, reader, "verdicts.html.j2", values)


def _board(snapshot: Snapshot) -> tuple[list[Line], Swarm | None]:
    every = [line_of(entry) for entry in snapshot]
    return every, swarm([(line.address, line.card.title, line.judgement) for line in every if line.judgement])


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
