"""The new papers that a watch is about.

New are papers that came into the catalogue within a span of time and are shown in the feed not much earlier: a harvest
of old papers is no news. A search wants every telling word of the query (stemmed) in title, abstract, keywords or
authors; words in double quotes must stand side by side. A tag is learned from (`papertrial.site.people.recommend`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa

from papertrial.feed.lexical import query_words, words
from papertrial.feed.records import Paper
from papertrial.feed.schema import papers, topics
from papertrial.site.board import Entry
from papertrial.site.context import Context
from papertrial.site.delivery.subscriptions import Watch
from papertrial.site.listing import Shown, show
from papertrial.site.people import tags
from papertrial.site.people.recommend import Recommender

#: A paper that entered the feed so long before it came into the catalogue is no news.
NEWS_DAYS = 14
#: Papers that one span of time is searched through.
MOST = 5_000
#: What the model of a tag must say at least for a paper to be like those under it.
LIKELY = 0.5


@dataclass(frozen=True, slots=True)
class Pick:
    """A paper for somebody: with its place in the lab, if it has one, and the words that speak for it."""

    shown: Shown
    entry: Entry | None
    because: tuple[str, ...] = ()

    @property
    def paper(self) -> Paper:
        return self.shown.paper

    @property
    def text(self) -> str:
        """The shortest description there is, whole sentences up to some length."""
        paper = self.paper
        return shortened(paper.summary or paper.ai_summary or paper.abstract or "", 400)

    @property
    def verdict(self) -> str:
        """Word and scale, or empty."""
        judged = self.entry.headline if self.entry else None
        return judged.phrase if judged else ""


@dataclass(frozen=True, slots=True)
class Query:
    """What every paper of a search has: words, and phrases of words."""

    words: frozenset[str]
    phrases: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, text: str) -> "Query":
        quoted = [tuple(words(phrase)) for phrase in re.findall(r'"([^"]*)"', text)]
        plain = re.sub(r'"[^"]*"', " ", text)
        wanted = query_words(plain) if plain.strip() else []
        return cls(frozenset(wanted), tuple(phrase for phrase in quoted if phrase))

    def finds(self, paper: Paper) -> bool:
        """Whether a paper has all of it."""
        if not self.words and not self.phrases:
            return False
        parts = (paper.title, paper.abstract or "", paper.summary or "", *paper.keywords, *paper.authors)
        # A word that no language has keeps phrases from running over the end of a part.
        text = words(" \x1f ".join(parts).replace("\x1f", " zzbreakzz "))
        if not self.words <= set(text):
            return False
        joined = f" {' '.join(text)} "
        return all(f" {' '.join(phrase)} " in joined for phrase in self.phrases)


def new_papers(
    here: Context,
    watch: Watch,
    after: datetime,
    until: datetime,
    *,
    user_id: int | None = None,
    recommender: Recommender | None = None,
) -> list[Pick]:
    """The papers of a watch that came in after one moment and until another (UTC, no zone), best first.

    Parameters
    ----------
    user_id
        Whose tag it is; what that account hid is left out of everything.
    recommender
        What learns from a tag (default: the one of the context, which may lag some minutes behind).
    """
    hidden = set(tags.hidden_of(here.store, user_id)) if user_id is not None else set()
    found = [paper for paper in _arrived(here, watch, after, until) if paper.id not in hidden]
    because: dict[int, tuple[str, ...]] = {}
    if watch.kind == "search":
        query = Query.of(watch.value)
        found = [paper for paper in found if query.finds(paper)]
    elif watch.kind == "tag":
        found, because = _like_tagged(here, watch.value, user_id, found, recommender or here.recommender)
    picks = picked(here, found, because)
    if watch.kind != "tag":
        picks.sort(key=lambda pick: (-pick.shown.upvotes, pick.paper.id))
    return picks


def picked(here: Context, found: Sequence[Paper], because: dict[int, tuple[str, ...]] | None = None) -> list[Pick]:
    """Papers in the given order with all that is shown of them."""
    snapshot, why = here.board.snapshot, because or {}
    return [
        Pick(shown, snapshot.get(shown.paper.slug), why.get(shown.paper.id, ())) for shown in show(here.store, found)
    ]


def _arrived(here: Context, watch: Watch, after: datetime, until: datetime) -> list[Paper]:
    wanted = [
        papers.c.first_seen > after,
        papers.c.first_seen <= until,
        papers.c.feed_day >= (after - timedelta(days=NEWS_DAYS)).date(),
        papers.c.feed_precision == "day",
    ]
    if watch.family:
        wanted.append(papers.c.family == watch.family)
    if watch.kind == "topic":
        wanted.append(papers.c.id.in_(sa.select(topics.c.paper_id).where(topics.c.topic == watch.value)))
    query = sa.select(papers.c.id).where(*wanted).order_by(papers.c.upvotes.desc(), papers.c.id).limit(MOST)
    with here.store.reading() as connection:
        ids = list(connection.execute(query).scalars())
    return [paper for paper in here.store.by_ids(ids) if paper is not None]


def _like_tagged(
    here: Context, tag: str, user_id: int | None, found: Sequence[Paper], recommender: Recommender
) -> tuple[list[Paper], dict[int, tuple[str, ...]]]:
    """Those of some papers that are like the ones under a tag, most alike first, and the words that say so."""
    if user_id is None or not found:
        return [], {}
    learned = tags.tagged(here.store, user_id, tag)
    if not learned:
        return [], {}
    candidates = {paper.id: paper for paper in found}
    told = recommender.recommend(learned, limit=MOST)
    like = [item for item in told.items if item.score >= LIKELY and item.paper_id in candidates]
    why = {item.paper_id: tuple(word for word, _ in item.words[:4]) for item in like}
    return [candidates[item.paper_id] for item in like], why


def shortened(text: str, most: int) -> str:
    """The beginning of a text, to the end of a sentence where one ends in time, else to the end of a word."""
    if len(text) <= most:
        return text
    head = text[:most]
    end = max(head.rfind(mark) for mark in (". ", "? ", "! "))
    return head[: end + 1] if end > most // 2 else head.rsplit(" ", 1)[0].rstrip(" ,;:.") + " …"
