"""For administrators: the last ingest runs and their errors, background jobs, cards that cannot be read, accounts."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Form, Path, Query, Request
from starlette.responses import Response

from papertrial.feed import people_schema as tables
from papertrial.feed.runs import recent_runs
from papertrial.site import ingesting
from papertrial.site.context import Admin, Context, Here
from papertrial.site.pages.serving import see_other, with_query
from papertrial.site.people import accounts
from papertrial.site.templating import render
from papertrial.site.upkeep import free_space_mb

router = APIRouter(include_in_schema=False)

RUNS = 30
ACCOUNTS = 50


@router.get("/admin")
def admin(request: Request, here: Here, reader: Admin, q: Annotated[str, Query(max_length=254)] = "") -> Response:
    """How the service is doing."""
    store = here.store
    with store.reading() as connection:
        jobs = connection.execute(sa.select(tables.leases).order_by(tables.leases.c.name)).all()
        counts = {
            name: connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
            for name, table in (("accounts", tables.users), ("votes", tables.votes), ("comments", tables.comments))
        }
    facts = {"papers": store.count(), **counts, "changes not yet searchable": store.revision() - here.index.revision}
    return render(
        request,
        "admin.html.j2",
        headers={"Cache-Control": "no-store"},
        runs=recent_runs(store, RUNS),
        planned=ingesting.schedule(here),
        jobs=jobs,
        facts=facts,
        free_mb=free_space_mb(here),
        problems=here.board.snapshot.problems,
        people=_accounts(here, q.strip()),
        q=q,
    )


def _accounts(here: Context, q: str) -> Sequence[Any]:
    """The newest accounts, or those whose address or name holds what was typed."""
    users = tables.users
    query = sa.select(users.c.id, users.c.email, users.c.name, users.c.role, users.c.created, users.c.confirmed)
    if q:
        query = query.where(
            users.c.email.contains(q.lower(), autoescape=True) | users.c.name.contains(q, autoescape=True)
        )
    with here.store.reading() as connection:
        return connection.execute(query.order_by(users.c.id.desc()).limit(ACCOUNTS)).all()


@router.post("/admin/accounts/{user_id}")
def change_role(
    user_id: Annotated[int, Path(ge=1, lt=2**63)],
    here: Here,
    reader: Admin,
    role: Annotated[Literal["reader", "admin", "blocked"], Form()],
    q: Annotated[str, Form(max_length=254)] = "",
) -> Response:
    """Make an account a reader, an administrator, or blocked."""
    accounts.set_role(here.store, user_id, role)
    return see_other(with_query("/admin", q=q) + "#accounts")
