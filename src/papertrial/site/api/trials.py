"""What only this service has: claims, methods, evidence and verdicts of the papers in scope, as JSON."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from starlette.responses import JSONResponse

from papertrial.errors import UsageError
from papertrial.lab import summary
from papertrial.lab.claim import FAMILIES
from papertrial.lab.report import repeat_command
from papertrial.site.api import shapes
from papertrial.site.board import Entry, Snapshot
from papertrial.site.context import Here
from papertrial.site.errors import Problem
from papertrial.site.fields import Offset, PaperName
from papertrial.site.methods import Method, read_method

router = APIRouter(tags=["trials"])

Family = Annotated[str | None, Query(max_length=40, description=f"one of {', '.join(FAMILIES)}")]
Verdict = Annotated[
    Literal["upheld", "contradicted", "undecided", "none"] | None,
    Query(description="verdict on the claim; none: there is no evidence yet"),
]
Many = Annotated[int, Query(ge=1, le=1000, description="how many at most")]
Scale = Literal["small", "gpu", "paper"]


@router.get("/api/claims")
def claims(
    here: Here, family: Family = None, verdict: Verdict = None, limit: Many = 200, offset: Offset = 0
) -> JSONResponse:
    """Every claim of the papers in scope with its verdict; ``X-Total-Count`` says how many there are."""
    snapshot = here.board.snapshot
    rows = shapes.claim_rows(snapshot, _of_family(snapshot, family))
    if verdict is not None:
        rows = [row for row in rows if (row["verdict"] or "none") == verdict]
    return JSONResponse(rows[offset : offset + limit], headers={"X-Total-Count": str(len(rows))})


@router.get("/api/claims/{paper_id:paper}")
def claims_of(paper_id: PaperName, here: Here) -> JSONResponse:
    """The claims of one paper."""
    return JSONResponse(shapes.claim_rows(here.board.snapshot, [_entry(here.board.snapshot, paper_id)]))


@router.get("/api/verdicts")
def verdicts(here: Here, family: Family = None, verdict: Verdict = None) -> JSONResponse:
    """The board: one row a paper in scope, with the verdict on its headline claim and its state."""
    snapshot = here.board.snapshot
    rows = [_board_row(entry) for entry in _of_family(snapshot, family)]
    return JSONResponse([row for row in rows if verdict in (None, row["verdict"] or "none")])


@router.get("/api/methods")
def methods(here: Here, family: Family = None) -> JSONResponse:
    """The methods that can be imported, with what each offers."""
    found = [(entry, read_method(entry.card)) for entry in _of_family(here.board.snapshot, family)]
    return JSONResponse([_method(entry, method, short=True) for entry, method in found if method is not None])


@router.get("/api/methods/{paper_id:paper}")
def method_of(paper_id: PaperName, here: Here) -> JSONResponse:
    """One paper's method: module, signatures, documentation, example."""
    entry = _entry(here.board.snapshot, paper_id)
    method = read_method(entry.card)
    if method is None:
        raise Problem(404, f"{entry.card.slug} has no method here yet")
    return JSONResponse(_method(entry, method, short=False))


@router.get("/api/evidence")
def evidence(here: Here) -> JSONResponse:
    """Which papers have evidence, at which scales, and when it was recorded."""
    rows = []
    for entry in here.board.snapshot:
        for scale, found in entry.standing.evidence.items():
            rows.append(
                {
                    "slug": entry.card.slug,
                    "scale": scale,
                    "seeds": len(found.seeds),
                    "recorded": found.recorded.isoformat(),
                    "state": entry.standing.state,
                    "url": here.settings.url(f"/api/evidence/{entry.card.slug}/{scale}"),
                }
            )
    return JSONResponse(rows)


@router.get("/api/evidence/{paper_id}")
def evidence_of(paper_id: PaperName, here: Here) -> JSONResponse:
    """The evidence of one paper at every scale that was recorded, without curves and figures."""
    entry = _entry(here.board.snapshot, paper_id)
    return JSONResponse([_evidence(entry, scale, full=False) for scale in entry.standing.evidence])


@router.get("/api/evidence/{paper_id}/{scale}")
def evidence_at(
    paper_id: PaperName,
    scale: Scale,
    here: Here,
    full: Annotated[bool, Query(description="with curves and figures")] = False,
) -> JSONResponse:
    """The evidence of one paper at one scale."""
    entry = _entry(here.board.snapshot, paper_id)
    if scale not in entry.standing.evidence:
        raise Problem(404, f"{entry.card.slug} has no evidence at {scale}", field="scale")
    return JSONResponse(_evidence(entry, scale, full=full))


def _entry(snapshot: Snapshot, name: str) -> Entry:
    entry = snapshot.find(name)
    if entry is None:
        raise Problem(404, f"no paper in scope has the id {name[:80]!r}", field="paper_id")
    return entry


def _of_family(snapshot: Snapshot, family: str | None) -> list[Entry]:
    if family is not None and family not in FAMILIES:
        raise UsageError(f"family: {family[:40]!r} is unknown; known: {', '.join(FAMILIES)}")
    return [entry for entry in snapshot if family in (None, entry.card.family)]


def _board_row(entry: Entry) -> dict[str, Any]:
    card, judged = entry.card, entry.headline
    row: dict[str, Any] = {
        "slug": card.slug,
        "title": card.title,
        "arxiv": card.arxiv,
        "family": card.family,
        "published": str(card.published),
        "state": entry.standing.state,
        **shapes.verdict(entry),
        "claims": len(card.claim),
        "method": card.headline.method,
        "baseline": card.headline.baseline,
        "metric": card.headline.metric,
        "effect": None,
        "effect_unit": card.headline.effect_unit,
        "margin": card.headline.threshold,
        "seeds": len(judged.effects) if judged else 0,
    }
    if judged and judged.effect:
        effect = judged.effect
        row["effect"] = {"mean": effect.mean, "low": shapes.finite(effect.low), "high": shapes.finite(effect.high)}
    return row


def _method(entry: Entry, method: Method, *, short: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "slug": entry.card.slug,
        "title": entry.card.title,
        "family": entry.card.family,
        "module": method.module,
        "line": " ".join(method.doc.split("\n\n")[0].split()),
        "members": [{"name": m.name, "kind": m.kind, "signature": m.signature, "line": m.line} for m in method.members],
    }
    if not short:
        found |= {"doc": method.doc, "example": method.example}
        for row, member in zip(found["members"], method.members, strict=True):
            row["doc"] = member.doc
    return found


def _evidence(entry: Entry, scale: str, *, full: bool) -> dict[str, Any]:
    found = entry.standing.evidence[scale]
    shown = summary.as_json(entry.card, found, full=full)
    return shown | {"state": entry.standing.state, "command": repeat_command(found)}
