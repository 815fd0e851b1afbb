"""What the tools answer with, and how it is read from the service. Nothing here knows the protocol."""

import math
from datetime import date
from typing import Any

from pydantic import BaseModel, Field

from papertrial.feed.lexical import Filters
from papertrial.feed.records import Paper
from papertrial.lab import summary
from papertrial.lab.claim import FAMILIES
from papertrial.lab.evidence import Evidence
from papertrial.lab.report import repeat_command
from papertrial.site.api import shapes
from papertrial.site.api.markdown import escaped, paper_markdown
from papertrial.site.board import Entry
from papertrial.site.context import Context
from papertrial.site.delivery.watching import shortened
from papertrial.site.errors import Problem
from papertrial.site.fields import checked_line, found_paper
from papertrial.site.listing import Shown, show
from papertrial.site.methods import read_method

#: Characters of a paper's description in a list.
SHORT = 400


class PaperInList(BaseModel):
    """A paper in short. ``verdict`` is about the headline claim; it always goes with its ``scale``."""

    id: str = Field(description="what the tools paper, evidence and run_smoke take")
    title: str
    url: str
    authors: list[str] = Field(description="the first five")
    published: str
    upvotes: int
    summary: str = Field(description=f"at most {SHORT} characters; the tool paper has the whole abstract")
    family: str | None
    slug: str | None = Field(description="only papers in scope have one")
    claim: str | None
    verdict: str | None
    scale: str | None


class SearchAnswer(BaseModel):
    """Papers, best first."""

    papers: list[PaperInList]
    notice: str | None = Field(description="what the search could not do, if anything")


class PaperAnswer(BaseModel):
    """A paper with all that the catalogue has, and the method that can be imported."""

    id: str
    title: str
    url: str
    slug: str | None
    markdown: str = Field(description="metadata, abstract, claims beside their verdicts, limits")
    method: str | None = Field(description="the module of the reusable method")
    example: str | None = Field(description="Python that runs the method on a small model")


class EvidenceAnswer(BaseModel):
    """Verdicts on a paper's claims, and what was recorded at each scale."""

    slug: str
    title: str
    url: str
    state: str = Field(description="fresh, aged, stale, incomplete, or not yet on trial")
    claims: list[dict[str, Any]] = Field(description="each claim with verdict, scale, reason and effect with interval")
    recorded: list[dict[str, Any]] = Field(
        description="by scale: the claimed metrics (or all) of every arm by seed, to six digits; costs, environment"
    )
    left_out: list[str] = Field(description="metrics that were recorded and are not shown; ask with metrics='all'")
    limits: str
    finding: str | None


def search(
    here: Context, query: str, limit: int, family: str | None, since: str | None, in_scope: bool
) -> SearchAnswer:
    """Papers that fit a query.

    Raises
    ------
    Problem
        Naming the argument that is wrong.
    """
    try:
        query = checked_line(query)
    except ValueError as error:
        raise Problem(400, f"query: {error}", field="query") from None
    if not query:
        raise Problem(400, "query: is empty", field="query")
    if family is not None and family not in FAMILIES:
        raise Problem(400, f"family: {family[:40]!r} is unknown; known: {', '.join(FAMILIES)}", field="family")
    filters = Filters(families=[family] if family else None, since=_day(since), in_scope=in_scope or None)
    found = here.search(query, limit, filters=filters)
    listed = [_in_list(here, shown) for shown in show(here.store, found.papers)]
    return SearchAnswer(papers=listed, notice=found.notice.message if found.notice else None)


def _day(text: str | None) -> date | None:
    try:
        return date.fromisoformat(text) if text else None
    except ValueError:
        raise Problem(400, f"since: {(text or '')[:40]!r} is not a day; write YYYY-MM-DD", field="since") from None


def _in_list(here: Context, shown: Shown) -> PaperInList:
    paper = shown.paper
    ours = shapes.ours(paper, here)
    return PaperInList(
        id=paper.key,
        title=paper.title,
        url=ours["url"],
        authors=list(paper.authors[:5]),
        published=paper.published_text or paper.feed_day.isoformat(),
        upvotes=shown.upvotes,
        summary=shortened(_description(paper), SHORT),
        family=paper.family,
        slug=paper.slug,
        claim=ours.get("claim"),
        verdict=ours.get("verdict"),
        scale=ours.get("scale"),
    )


def _description(paper: Paper) -> str:
    return paper.summary or paper.ai_summary or paper.abstract or ""


def paper(here: Context, name: str) -> PaperAnswer:
    """One paper.

    Raises
    ------
    Problem
        404 where there is none.
    """
    shown = show(here.store, [found_paper(here.store, name)])[0]
    entry = here.board.snapshot.get(shown.paper.slug)
    method = read_method(entry.card) if entry else None
    return PaperAnswer(
        id=shown.paper.key,
        title=shown.paper.title,
        url=here.settings.url(f"/papers/{shown.paper.key}"),
        slug=shown.paper.slug,
        markdown=paper_markdown(shown, here),
        method=method.module if method else None,
        example=method.example if method else None,
    )


def evidence(here: Context, name: str, scale: str | None, all_metrics: bool = False) -> EvidenceAnswer:
    """The verdicts on a paper's claims and the evidence behind them; without `all_metrics` of claimed metrics only.

    Raises
    ------
    Problem
        404 for a paper that is not in scope, or has nothing at that scale.
    """
    entry = in_scope(here, name)
    recorded = entry.evidence
    if scale is not None and scale not in recorded:
        known = ", ".join(recorded) or "none yet"
        raise Problem(404, f"scale: {entry.card.slug} has no evidence at {scale}; recorded: {known}", field="scale")
    wanted = recorded if scale is None else {scale: recorded[scale]}
    card = entry.card
    claimed = {claim.metric for claim in card.claim}
    held = {metric for found in wanted.values() for metric in found.metrics}
    kept = held if all_metrics else held & claimed
    return EvidenceAnswer(
        slug=card.slug,
        title=card.title,
        url=here.settings.url(f"/papers/{card.arxiv or card.slug}"),
        state=entry.standing.state,
        claims=shapes.claim_rows(here.board.snapshot, [entry]),
        recorded=[_recording(entry, found, kept) for found in wanted.values()],
        left_out=sorted(held - kept),
        limits=card.limits,
        finding=card.finding or None,
    )


def _recording(entry: Entry, found: Evidence, kept: set[str]) -> dict[str, Any]:
    """What was recorded at one scale, without the trials themselves."""
    whole = summary.as_json(entry.card, found)
    arms = {
        arm: {metric: _rounded(values) for metric, values in measured.items() if metric in kept}
        for arm, measured in whole["arms"].items()
    }
    costs = ("wall_seconds", "cpu_seconds", "peak_memory_mb")
    told = ("scale", "model", "recorded", *costs, "environment", "parameters")
    return {name: whole[name] for name in told} | {
        "seeds": found.seeds,
        "arms": {arm: measured for arm, measured in arms.items() if measured},
        "command": repeat_command(found),
    }


def _rounded(value: Any) -> Any:
    """Six digits of every figure: more say nothing, and fill the window of whoever reads them."""
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


def evidence_markdown(told: EvidenceAnswer) -> str:
    """An evidence answer as text: the verdicts, and a table of the claimed pair's metrics at each scale."""
    lines = [f"# {escaped(told.title)}", "", f"<{told.url}> ({told.state})"]
    for claim in told.claims:
        lines += ["", f"{claim['claim']}. {escaped(claim['statement'])}"]
        pair = f"`{claim['method']}` against `{claim['baseline']}`, {escaped(claim['metric'])}"
        if claim["verdict"] is None:
            lines.append(f"   - {pair}. Verdict: none yet, there is no evidence")
            continue
        lines.append(f"   - {pair}. Verdict: **{claim['verdict']}** at {claim['scale']}: {escaped(claim['reason'])}")
        if claim["effect"] is not None:
            lines.append(f"   - Effect: {_interval(claim['effect'])} {escaped(claim['effect_unit'])}".rstrip())
    for recording in told.recorded:
        lines += ["", f"## At {recording['scale']} ({len(recording['seeds'])} seeds)", ""]
        lines += ["| metric | arm | mean [interval] |", "|---|---|---|"]
        metrics = dict.fromkeys(metric for measured in recording["arms"].values() for metric in measured)
        for metric in metrics:
            for arm, measured in recording["arms"].items():
                if metric in measured:
                    lines.append(f"| {escaped(metric)} | {escaped(arm)} | {_interval(measured[metric])} |")
        lines += ["", f"To repeat: `{recording['command']}`"]
    lines += ["", f"Limits: {escaped(told.limits)}"]
    if told.finding:
        lines += ["", f"Our reading: {escaped(told.finding)}"]
    if told.left_out:
        lines += ["", f"Recorded as well (metrics='all' shows them): {escaped(', '.join(told.left_out))}"]
    return "\n".join(lines) + "\n"


def _interval(value: dict[str, Any]) -> str:
    mean = summary.number(value["mean"])
    if value["low"] is None or value["high"] is None:
        return f"{mean} (no interval)"
    return f"{mean} [{summary.number(value['low'])}, {summary.number(value['high'])}]"


def in_scope(here: Context, name: str) -> Entry:
    """A paper in scope, by slug, arXiv id or key.

    Raises
    ------
    Problem
        404 where there is none.
    """
    snapshot = here.board.snapshot
    entry = snapshot.find(name)
    if entry is None and name.isprintable() and (known := here.store.find(name)) is not None:
        entry = snapshot.get(known.slug)
        if entry is None:
            raise Problem(404, f"paper: {known.key} is in the catalogue, but not in scope: it has no claims here")
    if entry is None:
        raise Problem(404, f"paper: no paper here has the id {name[:80]!r}; the tool search finds ids", field="paper")
    return entry
