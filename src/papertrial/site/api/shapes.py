"""Papers as JSON, in the shape that the Hugging Face papers API has, with our own part under ``papertrial``.

Two things differ from that API on purpose, and its client gets more for it: the outer object of a list repeats what
the client reads there, and every count is always present.
"""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Any

from papertrial.feed.records import Paper
from papertrial.lab.verdict import Judgement
from papertrial.site.board import Entry, Snapshot
from papertrial.site.context import Context
from papertrial.site.listing import Shown
from papertrial.site.people.submissions import Submitter

Json = dict[str, Any]


def moment(value: date | datetime) -> str:
    """A time as the client parses it: UTC, ending in ``Z``."""
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%dT%H:%M:%S.") + f"{value.microsecond // 1000:03d}Z"
    return f"{value.isoformat()}T00:00:00.000Z"


def object_id(*parts: str) -> str:
    """24 hexadecimal digits that stand for something that has no number of its own."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "replace")).hexdigest()[:24]


def user(submitter: Submitter, here: Context) -> Json:
    """An account as others may see it."""
    return {
        "_id": object_id("user", str(submitter.id)),
        "avatarUrl": "",
        "fullname": submitter.full_name or submitter.name,
        "name": submitter.name,
        "user": submitter.name,
        "type": "user",
        "isPro": False,
        "isHf": False,
        "isMod": False,
        "url": here.settings.url(f"/people/{submitter.name}"),
    }


def organisation(name: str) -> Json:
    """An organisation; it has a name only."""
    return {"_id": object_id("organisation", name), "name": name, "fullname": name, "avatarUrl": ""}


def inner(shown: Shown) -> Json:
    """The paper itself. Keys that are not known are left out, but for counts and lists."""
    paper = shown.paper
    fields: Json = {
        "id": paper.key,
        "authors": [
            {"_id": object_id(paper.key, str(i), name), "name": name, "hidden": False}
            for i, name in enumerate(paper.authors)
        ],
        "publishedAt": moment(paper.published or paper.feed_day),
        "submittedOnDailyAt": moment(paper.feed_day),
        "title": paper.title,
        "summary": paper.abstract or paper.summary or paper.ai_summary or "",
        "upvotes": shown.upvotes,
    }
    known = {"ai_summary": paper.ai_summary, "projectPage": paper.project_url, "githubRepo": paper.code_url}
    fields |= {name: value for name, value in known.items() if value}
    if paper.keywords:
        fields["ai_keywords"] = list(paper.keywords)
    return fields


def entry(shown: Shown, here: Context, submitters: Mapping[int, Submitter]) -> Json:
    """One entry of a list."""
    paper, flat = shown.paper, inner(shown)
    outer: Json = {
        "paper": flat,
        "publishedAt": flat["submittedOnDailyAt"],
        "title": flat["title"],
        "summary": flat["summary"],
        "upvotes": shown.upvotes,
        "numComments": shown.comments,
        "isAuthorParticipating": False,
        "mediaUrls": [],
        "source": paper.source_url,
    }
    outer |= {name: flat[name] for name in ("ai_summary", "ai_keywords", "projectPage", "githubRepo") if name in flat}
    if paper.organisation:
        outer["organization"] = organisation(paper.organisation)
    if submitter := submitters.get(paper.id):
        outer["submittedBy"] = flat["submittedOnDailyBy"] = user(submitter, here)
    outer["papertrial"] = ours(paper, here)
    return outer


def single(shown: Shown, here: Context, submitter: Submitter | None) -> Json:
    """One paper, flat."""
    paper, flat = shown.paper, inner(shown)
    flat |= {
        "numComments": shown.comments,
        "source": paper.source_url,
        "linkedModels": [],
        "numTotalModels": 0,
        "linkedDatasets": [],
        "numTotalDatasets": 0,
        "linkedSpaces": [],
        "numTotalSpaces": 0,
    }
    if paper.organisation:
        flat["organization"] = organisation(paper.organisation)
    if submitter is not None:
        flat["submittedOnDailyBy"] = user(submitter, here)
    flat["papertrial"] = ours(paper, here)
    return flat


def ours(paper: Paper, here: Context) -> Json:
    """What only this service knows of a paper: where it stands here, and the verdict on its headline claim."""
    found: Json = {"url": here.settings.url(f"/papers/{paper.key}"), "slug": paper.slug, "family": paper.family}
    card = here.board.snapshot.get(paper.slug)
    if card is not None:
        found |= {"summary": card.card.summary, "claim": card.card.headline.statement, **verdict(card)}
    return found


def verdict(card: Entry) -> Json:
    """The verdict on a headline claim, always with its scale; both None before there is evidence."""
    judged = card.headline
    return {"verdict": judged.word if judged else None, "scale": judged.scale if judged else None}


def claim_rows(snapshot: Snapshot, cards: Sequence[Entry]) -> list[Json]:
    """Every claim of some papers, with its verdict where there is evidence."""
    rows = []
    for card in cards:
        judged: Sequence[Judgement | None] = card.judgements or [None] * len(card.card.claim)
        for number, (claim, judgement) in enumerate(zip(card.card.claim, judged, strict=True), start=1):
            row: Json = {
                "slug": card.card.slug,
                "title": card.card.title,
                "arxiv": card.card.arxiv,
                "family": card.card.family,
                "claim": number,
                **claim.model_dump(mode="json"),
                "verdict": judgement.word if judgement else None,
                "scale": judgement.scale if judgement else None,
                "reason": judgement.reason if judgement else None,
                "effect": None,
                "effect_unit": claim.effect_unit,
            }
            if judgement and judgement.effect:
                effect = judgement.effect
                row["effect"] = {"mean": effect.mean, "low": finite(effect.low), "high": finite(effect.high)}
            rows.append(row)
    return rows


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if abs(value) != float("inf") else None
