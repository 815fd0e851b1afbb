"""Papers that people bring in by arXiv id or address.

A paper that the catalogue has is taken at once; of another one arXiv is asked in the background. Only arXiv ids are
ever fetched, from arXiv's own address: an address that somebody types is read for the id in it and never opened, so no
submission can make the service call anything else.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from urllib.parse import urlsplit

import sqlalchemy as sa

from papertrial.errors import PapertrialError
from papertrial.feed import people_schema as tables
from papertrial.feed.records import Record, parse_arxiv_id
from papertrial.feed.store import Store, utc_now
from papertrial.site.errors import Problem
from papertrial.site.people.accounts import Reader

SUBMISSIONS_A_DAY = 20
#: Times that arXiv says it does not have a paper before that is believed, and how long it may be out of reach.
ATTEMPTS = 5
PATIENCE = timedelta(days=1)
#: How long the job waits for another fetch from arXiv to end.
PATIENT_SECONDS = 300.0
ASKED = "arXiv is being asked"
NOT_REACHED = "arXiv cannot be reached just now; it is asked again for a day"
NOT_ASKED = "this service does not go to the network now, so arXiv is not asked"
_HOSTS = frozenset(
    (
        "arxiv.org",
        "www.arxiv.org",
        "export.arxiv.org",
        "huggingface.co",
        "www.huggingface.co",
        "hf.co",
        "alphaxiv.org",
        "www.alphaxiv.org",
        "doi.org",
    )
)
_IN_PATH = re.compile(
    r"^/(?:abs|pdf|html|papers|overview|10\.48550/arxiv\.)/?"
    r"(?P<id>\d{4}\.\d{4,5}|[a-z-]+(?:\.[A-Za-z]{2})?/\d{7})(?:v\d{1,3})?(?:\.pdf|\.md)?/?$",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Submitter:
    """Who brought a paper in."""

    id: int
    name: str
    full_name: str


@dataclass(frozen=True, slots=True)
class Submission:
    """What became of it: ``waiting``, ``done`` or ``refused`` (with the reason)."""

    id: int
    arxiv_id: str
    state: str
    message: str
    paper_id: int | None
    created: datetime


def arxiv_id_of(text: str) -> str:
    """The arXiv id in an id or address.

    Raises
    ------
    Problem
        422 where there is none, or the address is of a site that is not known.
    """
    text = text.strip()
    if len(text) <= 300:
        if parsed := parse_arxiv_id(text):
            return parsed[0]
        try:
            parts = urlsplit(text if "://" in text else f"https://{text}")
            host, path = (parts.hostname or "").lower(), parts.path
        except ValueError:
            host, path = "", ""
        match = _IN_PATH.match(path) if parts_are_web(text) and host in _HOSTS else None
        if match and (parsed := parse_arxiv_id(match["id"])):
            return parsed[0]
    raise Problem(
        422,
        f"url: {text[:80]!r} is not an arXiv id such as 2210.14140, nor an address with one on a site known here",
        field="url",
    )


def parts_are_web(text: str) -> bool:
    """Whether an address is of the web, or has no scheme at all."""
    return "://" not in text or text.lower().startswith(("http://", "https://"))


def submit(
    store: Store, reader: Reader, text: str, *, today: date, for_feed: bool = True, fetch: bool = True
) -> Submission:
    """Bring a paper in.

    Parameters
    ----------
    text
        An arXiv id, or an address that holds one.
    today
        The feed's day, under which the paper is shown if no feed had it before.
    for_feed
        Whether it shall be in the daily feed, or only be indexed.
    fetch
        Whether arXiv may be asked for what the catalogue does not have.

    Raises
    ------
    Problem
        422 for what is not an arXiv id; 429 after `SUBMISSIONS_A_DAY`; 503 where arXiv would have to be asked and may
        not be.
    """
    arxiv_id = arxiv_id_of(text)
    table, now = tables.submissions, utc_now()
    paper = store.by_arxiv_id(arxiv_id)
    if paper is None and not fetch:
        reason = "is not in the catalogue, and this service does not ask arXiv (its setting FETCH is off)"
        raise Problem(503, f"url: {arxiv_id} {reason}", field="url")
    with store.writing() as connection:
        mine = sa.select(table).where(table.c.user_id == reader.id)
        recent = connection.execute(mine.where(table.c.created > now - timedelta(days=1))).all()
        same = next((row for row in recent if row.arxiv_id == arxiv_id and row.state != "refused"), None)
        if same is not None:
            return Submission(same.id, arxiv_id, same.state, same.message, same.paper_id, same.created)
        if len(recent) >= SUBMISSIONS_A_DAY:
            raise Problem(429, f"at most {SUBMISSIONS_A_DAY} papers a day; go on tomorrow", field="url")
        values = {
            "user_id": reader.id,
            "arxiv_id": arxiv_id,
            "url": text.strip()[:300],
            "for_feed": for_feed,
            "state": "waiting" if paper is None else "done",
            "message": "" if paper is not None else ASKED,
            "attempts": 0,
            "paper_id": None if paper is None else paper.id,
            "created": now,
            "finished": None if paper is None else now,
        }
        added = connection.execute(table.insert().values(**values)).inserted_primary_key[0]  # type: ignore[index]
    if paper is not None and for_feed and paper.entered is None:
        _enter(store, arxiv_id, paper.title, today)
    state, message = str(values["state"]), str(values["message"])
    return Submission(added, arxiv_id, state, message, None if paper is None else paper.id, now)


def _enter(store: Store, arxiv_id: str, title: str, today: date) -> None:
    """Put a paper into the feed of a day."""
    store.upsert([Record(source="page", title=title, arxiv_id=arxiv_id, entered=today)])


def waiting(store: Store) -> list[tuple[int, str, bool]]:
    """(number, arXiv id, for the feed) of the submissions that arXiv is still to be asked about, oldest first."""
    table = tables.submissions
    query = sa.select(table.c.id, table.c.arxiv_id, table.c.for_feed).where(table.c.state == "waiting")
    with store.reading() as connection:
        return [
            (row.id, row.arxiv_id, row.for_feed) for row in connection.execute(query.order_by(table.c.id).limit(50))
        ]


def work_off(store: Store, today: date) -> None:
    """Ask arXiv about the submissions that wait, in one request.

    Raises
    ------
    PapertrialError
        arXiv cannot be reached or does not answer; the submissions wait on, for at most a day.
    """
    rows = waiting(store)
    if not rows:
        return
    from papertrial.feed.fetch_arxiv import api_url, polite_client
    from papertrial.feed.sources.arxiv import parse_arxiv_xml

    wanted = list(dict.fromkeys(arxiv_id for _, arxiv_id, _ in rows))
    params = {"id_list": ",".join(wanted), "max_results": str(len(wanted))}
    try:
        with polite_client(PATIENT_SECONDS).session() as session:
            answer = session.get(api_url(), params, whole=lambda body: b"</feed>" in body[-200:])
        if not answer.is_success:
            raise PapertrialError(f"arXiv answered {answer.status_code}")
        store.upsert(record for record in parse_arxiv_xml(answer.content).records if record.arxiv_id in wanted)
    except PapertrialError:
        settle(store, rows, today, answered=False)
        raise
    settle(store, rows, today)


def not_asked(store: Store) -> None:
    """Say of what waits that nobody is asked about it: the service's setting was changed meanwhile."""
    table = tables.submissions
    with store.writing() as connection:
        waits = (table.c.state == "waiting", table.c.message != NOT_ASKED)
        connection.execute(table.update().where(*waits).values(message=NOT_ASKED))


def settle(store: Store, rows: Sequence[tuple[int, str, bool]], today: date, *, answered: bool = True) -> None:
    """Note which of the submissions the catalogue has by now, and who waited too long.

    Parameters
    ----------
    answered
        Whether arXiv answered: only then can it be said that it does not have a paper.
    """
    table, now = tables.submissions, utc_now()
    for number, arxiv_id, for_feed in rows:
        paper = store.by_arxiv_id(arxiv_id)
        if paper is not None and for_feed and paper.entered is None:
            _enter(store, arxiv_id, paper.title, today)
        with store.writing() as connection:
            mine = table.update().where(table.c.id == number, table.c.state == "waiting")
            if paper is not None:
                values = {"state": "done", "message": "", "paper_id": paper.id, "finished": now}
                connection.execute(mine.values(**values))
                continue
            if answered:
                connection.execute(mine.values(attempts=table.c.attempts + 1, message=ASKED))
                too_long, reason = table.c.attempts >= ATTEMPTS, "arXiv does not have it"
            else:
                connection.execute(mine.values(message=NOT_REACHED))
                too_long, reason = table.c.created <= now - PATIENCE, "arXiv could not be reached for a day"
            connection.execute(mine.where(too_long).values(state="refused", message=reason, finished=now))


def submissions_of(store: Store, user_id: int, limit: int = 50) -> list[Submission]:
    """What an account brought in, newest first."""
    table = tables.submissions
    query = sa.select(table).where(table.c.user_id == user_id).order_by(table.c.id.desc()).limit(limit)
    with store.reading() as connection:
        return [
            Submission(row.id, row.arxiv_id, row.state, row.message, row.paper_id, row.created)
            for row in connection.execute(query)
        ]


#: Built once: every paper's page asks for it.
_SUBMITTERS = (
    sa.select(tables.submissions.c.paper_id, tables.users.c.id, tables.users.c.name, tables.users.c.full_name)
    .join(tables.users, tables.users.c.id == tables.submissions.c.user_id)
    .where(tables.submissions.c.paper_id.in_(sa.bindparam("papers", expanding=True)), tables.submissions.c.for_feed)
    .order_by(tables.submissions.c.id.desc())
)


def submitters(store: Store, paper_ids: Sequence[int]) -> dict[int, Submitter]:
    """Who first brought papers into the feed, by paper."""
    found: dict[int, Submitter] = {}
    with store.reading() as connection:
        for start in range(0, len(paper_ids), 500):
            for row in connection.execute(_SUBMITTERS, {"papers": list(paper_ids[start : start + 500])}):
                found[row.paper_id] = Submitter(row.id, row.name, row.full_name)
    return found
