"""Pages from templates (``templates/*.html.j2``): autoescaped, with the reader, a CSRF token and addresses at hand.

Every template gets ``request``, ``settings``, ``reader`` (or None), ``csrf`` (a token for forms), ``static(name)`` (an
address that changes with the file) and ``snapshot`` (the board), beside what the route passes.
"""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from fastapi import Request
from starlette.responses import HTMLResponse

from papertrial.lab import summary
from papertrial.site.context import context, csrf_token, reader_of
from papertrial.site.errors import Problem

TEMPLATES = Path(__file__).resolve().parent / "templates"
STATIC = Path(__file__).resolve().parent / "static"


@lru_cache(maxsize=1)
def environment() -> jinja2.Environment:
    """The one template environment; add filters to it by `environment().filters`."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        auto_reload=False,
    )
    made.filters["number"] = summary.number
    made.globals |= {"static": static_address, "interval": summary.interval_text}
    return made


@lru_cache(maxsize=100)
def static_address(name: str) -> str:
    """The address of a file of ``static/`` with its digest, so that browsers may keep it for ever."""
    content = (STATIC / name).read_bytes()
    return f"/static/{name}?v={hashlib.sha256(content).hexdigest()[:12]}"


def render(
    request: Request,
    template: str,
    *,
    status: int = 200,
    headers: dict[str, str] | None = None,
    media_type: str = "text/html",
    **values: Any,
) -> HTMLResponse:
    """A page. Blocking (a session is looked up): call it from a plain ``def`` route."""
    return HTMLResponse(render_text(request, template, **values), status, headers, media_type)


def render_text(request: Request, template: str, **values: Any) -> str:
    """The text of a page, for those who cache it."""
    here = context(request)
    try:
        reader = reader_of(request)
    except Problem:  # an error page is shown to the holder of a bad token as well
        reader = None
    shared = {
        "request": request,
        "settings": here.settings,
        "snapshot": here.board.snapshot,
        "reader": reader,
        "csrf": csrf_token(request) if reader is not None else "",
    }
    return environment().get_template(template).render(shared | values)
