"""How pages are answered: those that are the same for everybody are kept for seconds and carry an ETag."""

from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

from fastapi import Request
from starlette.responses import RedirectResponse, Response

from papertrial.site.context import context
from papertrial.site.people.accounts import Reader
from papertrial.site.templating import render, render_text

PER_PAGE = 30

Values = Callable[[], dict[str, Any]]


def page(request: Request, reader: Reader | None, template: str, values: Values) -> Response:
    """A page; for readers who are not signed in it is kept (see `page_cache`) and revalidated by its ETag.

    Parameters
    ----------
    values
        Makes what the template shows; called only where the page is not at hand. What it shows to somebody who is not
        signed in may depend on the address alone.
    """
    if reader is not None:
        return render(request, template, **values())
    here = context(request)

    def text() -> str:
        with here.store.held():
            return render_text(request, template, **values())

    kept = here.pages.make((request.scope["path"], request.scope["query_string"]), text)
    packed = "gzip" in request.headers.get("accept-encoding", "")
    status, headers, body = kept.answer(request.headers.get("if-none-match", ""), packed)
    response = Response(body, status)
    response.raw_headers = headers
    return response


def see_other(address: str) -> RedirectResponse:
    """Where a form leads once it is done, by GET."""
    return RedirectResponse(address, 303)


def local(address: str | None, fallback: str = "/") -> str:
    """An address on this service that came with a request; anything else is `fallback`."""
    if not address or len(address) > 2000 or not address.isprintable():
        return fallback
    if not address.startswith("/") or address.startswith(("//", "/\\")):
        return fallback
    return address


def with_query(path: str, **parameters: object) -> str:
    """A path with those of the parameters that have a value."""
    kept = {name: str(value) for name, value in parameters.items() if value not in (None, "", 0, False)}
    return f"{path}?{urlencode(kept)}" if kept else path
