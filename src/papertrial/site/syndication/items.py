"""What a feed holds, before it has a format: the same items go out as RSS, Atom and JSON Feed.

Ids are tag URIs (RFC 4151) of the paper's number, which never changes, not even when an arXiv id becomes known. Votes
are left out, so that an item does not come up as changed whenever somebody votes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from urllib.parse import urlsplit

from markupsafe import Markup

from papertrial.site.board import Entry
from papertrial.site.context import Context
from papertrial.site.delivery.watching import Pick

#: The year that the ids of this service are in, as tag URIs want one.
ID_YEAR = "2025"
_NEVER = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Item:
    """One entry. ``changed`` is when anything about it changed last, ``updated`` when something a reader cares for."""

    id: str
    url: str
    title: str
    text: str
    html: str
    published: datetime
    updated: datetime
    changed: datetime
    authors: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    external_url: str | None = None
    verdict: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Feed:
    """A feed: what it is called, where it and its page are, and its items, newest first."""

    title: str
    description: str
    page: str
    address: str
    id: str
    items: Sequence[Item] = field(default_factory=list)

    @property
    def updated(self) -> datetime:
        """When its newest item was updated; the epoch for an empty feed, so that it does not change by itself."""
        return max((item.updated for item in self.items), default=_NEVER)

    @property
    def changed(self) -> datetime:
        return max((item.changed for item in self.items), default=_NEVER)


def tag_uri(here: Context, name: str) -> str:
    """An id that stays."""
    return f"tag:{urlsplit(here.settings.base_url).hostname},{ID_YEAR}:{name}"


def of_pick(here: Context, pick: Pick) -> Item:
    """A paper as an item."""
    paper = pick.paper
    published = _at(paper.feed_day)
    judged = pick.entry.headline if pick.entry else None
    said = [text for text in (_byline(pick), pick.text) if text] or [paper.title]
    parts = [Markup("<p>{}</p>").format(text) for text in said]
    if judged is not None:
        parts.insert(
            0,
            Markup("<p><strong>{}</strong> at {}: {}</p>").format(
                judged.word.capitalize(), judged.scale, judged.claim.statement
            ),
        )
    if pick.because:
        parts.append(Markup("<p>Because of {}</p>").format(", ".join(pick.because)))
    return Item(
        id=tag_uri(here, f"papers/{paper.id}"),
        url=here.settings.url(f"/papers/{paper.key}"),
        title=paper.title,
        text=pick.text or paper.title,
        html=str(Markup("\n").join(parts)),
        published=published,
        updated=max(published, paper.first_seen),
        changed=paper.updated,
        authors=paper.authors[:20],
        labels=tuple(dict.fromkeys((*paper.categories, *paper.keywords)))[:20],
        external_url=paper.source_url,
        verdict={"verdict": judged.word, "scale": judged.scale} if judged else None,
    )


def _byline(pick: Pick) -> str:
    paper = pick.paper
    names = ", ".join(paper.authors[:5]) + (" and others" if len(paper.authors) > 5 else "")
    return "; ".join(part for part in (names, paper.organisation, paper.published_text) if part)


def of_verdict(here: Context, entry: Entry) -> Item | None:
    """The verdict on a paper's headline claim as an item; None before there is evidence."""
    judged = entry.headline
    evidence = list(entry.evidence.values())
    if judged is None or not evidence:
        return None
    card, recorded = entry.card, evidence[-1].recorded
    moment = recorded.astimezone(UTC) if recorded.tzinfo else recorded.replace(tzinfo=UTC)
    text = f"{judged.word.capitalize()} at {judged.scale}: {judged.claim.statement}"
    html = Markup("<p><strong>{}</strong> at {}: {}</p>\n<p>{}</p>\n<p>{}</p>").format(
        judged.word.capitalize(), judged.scale, judged.claim.statement, judged.reason, card.summary
    )
    return Item(
        # A verdict from other evidence is news, so it has an id of its own.
        id=tag_uri(here, f"verdicts/{card.slug}/{judged.scale}/{moment:%Y%m%dT%H%M%SZ}"),
        url=here.settings.url(f"/papers/{card.arxiv or card.slug}"),
        title=f"{judged.word.capitalize()} at {judged.scale}: {card.title}",
        text=text,
        html=str(html),
        published=moment,
        updated=moment,
        changed=moment,
        labels=(card.family, judged.word),
        external_url=f"https://arxiv.org/abs/{card.arxiv}" if card.arxiv else None,
        verdict={"verdict": judged.word, "scale": judged.scale},
    )


def _at(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)
