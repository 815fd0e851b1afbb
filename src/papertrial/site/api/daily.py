"""The routes of the Hugging Face papers API: lists, search, single papers, Markdown, and the few beside them."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, StringConstraints
from starlette.responses import JSONResponse, PlainTextResponse, Response

from papertrial.errors import UsageError
from papertrial.feed.store import period_bounds
from papertrial.site.api import shapes
from papertrial.site.api.markdown import paper_markdown
from papertrial.site.context import Context, Here, SignedIn, Writer
from papertrial.site.errors import Problem
from papertrial.site.fields import Limit, PaperName, Query250, found_paper
from papertrial.site.listing import Selection, Shown, list_papers, show
from papertrial.site.people import submissions

router = APIRouter(tags=["papers"])

Day = Annotated[str | None, Query(max_length=40, description="YYYY-MM-DD; a time after the day is ignored")]
Week = Annotated[str | None, Query(max_length=8, pattern=r"^\d{4}-W\d{2}$", description="ISO week, such as 2025-W09")]
Month = Annotated[str | None, Query(max_length=7, pattern=r"^\d{4}-\d{2}$", description="YYYY-MM")]
PageNumber = Annotated[int, Query(ge=0, le=100_000, description="page, from 0")]
#: Lists are the same for everybody, and may be this old.
FRESH_SECONDS = 2.0


@router.get("/api/daily_papers")
def daily_papers(
    here: Here,
    date: Day = None,
    week: Week = None,
    month: Month = None,
    submitter: Annotated[str | None, Query(max_length=40, description="account that brought the papers in")] = None,
    sort: Annotated[
        Literal["publishedAt", "trending"], Query(description="newest day first, or hottest")
    ] = "publishedAt",
    p: PageNumber = 0,
    limit: Limit = 50,
) -> Response:
    """The daily feed: of a day, a week, a month, or from the newest day on.

    A day is the one on which a paper entered the feed, in the service's time zone (UTC unless set otherwise).
    """
    selection = Selection(period=_period(date, week, month), submitter=submitter)
    order: Literal["votes", "trending"] = "trending" if sort == "trending" else "votes"

    def body() -> bytes:
        found = list_papers(here.store, selection, order=order, limit=limit, offset=p * limit)
        return bytes(JSONResponse(_entries(found, here)).body)

    kept = here.bodies.get(("daily", selection, order, p, limit), FRESH_SECONDS, body)
    return Response(kept, media_type="application/json")


def _period(date: str | None, week: str | None, month: str | None) -> str | None:
    given = {"date": date, "week": week, "month": month}
    named = {name: value for name, value in given.items() if value}
    if len(named) > 1:
        raise Problem(400, f"give one of {', '.join(named)}, not several", field=list(named)[1])
    for name, value in named.items():
        if name == "date" and len(value) > 10 and value[10] in "T ":
            value = value[:10]
        try:
            period_bounds(value)
        except UsageError as error:
            raise Problem(400, f"{name}: {error}", field=name) from None
        if name == "date" and len(value) != 10:
            raise Problem(400, f"date: {value!r} is not a day; write YYYY-MM-DD", field="date")
        return value
    return None


def _entries(found: list[Shown], here: Context) -> list[shapes.Json]:
    who = submissions.submitters(here.store, [shown.paper.id for shown in found])
    return [shapes.entry(shown, here, who) for shown in found]


@router.get("/api/papers")
def papers(
    request: Request,
    here: Here,
    cursor: Annotated[str | None, Query(max_length=400, description="from the Link header of the page before")] = None,
    limit: Limit = 50,
) -> JSONResponse:
    """All papers, newest day first; the next page is in the Link header."""
    page = here.store.listing(limit=limit, cursor=cursor)
    headers = {}
    if page.next_cursor:
        following = here.settings.url(f"/api/papers?limit={limit}&cursor={page.next_cursor}")
        headers["Link"] = f'<{following}>; rel="next"'
    return JSONResponse(_entries(show(here.store, page.papers), here), headers=headers)


@router.get("/api/papers/search")
def search(
    here: Here, q: Query250 = None, limit: Annotated[int, Query(ge=1, le=120, description="how many at most")] = 20
) -> JSONResponse:
    """Papers that fit a query best, best first; without one the newest."""
    if q is None or not q.strip():
        return JSONResponse(_entries(list_papers(here.store, limit=limit), here))
    found = here.search(q, limit)
    headers = {"X-Search-Mode": found.result.mode}
    return JSONResponse(_entries(show(here.store, found.papers), here), headers=headers)


class IndexRequest(BaseModel):
    """What `POST /api/papers/index` takes."""

    model_config = ConfigDict(extra="forbid")

    arxivId: Annotated[str, StringConstraints(pattern=r"^\d{4}\.\d{4,5}$", max_length=10)]  # noqa: N815


@router.post("/api/papers/index")
def index(body: IndexRequest, here: Here, reader: Writer) -> dict[str, Any]:
    """Bring a paper into the catalogue, without putting it into the daily feed."""
    fetch = here.settings.fetch
    submissions.submit(here.store, reader, body.arxivId, today=here.today(), for_feed=False, fetch=fetch)
    return {}


@router.get("/api/papers/{paper_id:paper}")
def paper(paper_id: PaperName, here: Here) -> JSONResponse:
    """One paper."""
    shown = show(here.store, [found_paper(here.store, paper_id)])[0]
    who = submissions.submitters(here.store, [shown.paper.id])
    return JSONResponse(shapes.single(shown, here, who.get(shown.paper.id)))


@router.get("/papers/{paper_id:paper}.md", response_class=PlainTextResponse)
def markdown(paper_id: PaperName, here: Here) -> PlainTextResponse:
    """One paper as Markdown: what the catalogue may repeat of it, and its claims beside the evidence."""
    shown = show(here.store, [found_paper(here.store, paper_id)])[0]
    return PlainTextResponse(paper_markdown(shown, here), media_type="text/markdown; charset=utf-8")


@router.get("/api/arxiv/{paper_id:paper}/repos")
def repos(paper_id: PaperName, here: Here) -> JSONResponse:
    """Repositories of a paper. Models and datasets are not tracked here; the code is."""
    found = found_paper(here.store, paper_id)
    code = [{"url": found.code_url}] if found.code_url else []
    return JSONResponse({"models": [], "datasets": [], "spaces": [], "code": code})


@router.get("/api/whoami-v2")
def whoami(here: Here, reader: SignedIn) -> JSONResponse:
    """Who a token or a session belongs to."""
    return JSONResponse(
        {
            "type": "user",
            "id": shapes.object_id("user", str(reader.id)),
            "name": reader.name,
            "fullname": reader.shown_name,
            "email": reader.email,
            "emailVerified": reader.confirmed is not None,
            "avatarUrl": "",
            "isPro": False,
            "canPay": False,
            "orgs": [],
            "auth": {
                "type": "access_token",
                "accessToken": {"displayName": reader.credential, "role": reader.scope},
            },
        }
    )


@router.get("/api/agent-harnesses")
def agent_harnesses() -> JSONResponse:
    """The registry that clients ask for on every start: empty here."""
    return JSONResponse({"standardEnvVars": [], "harnesses": {}}, headers={"Cache-Control": "public, max-age=86400"})
