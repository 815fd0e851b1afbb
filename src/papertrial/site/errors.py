"""Errors as readers and clients see them: JSON under ``/api``, a page elsewhere, always with the right status.

The JSON is ``{"error": "...", "requestId": "..."}``, with ``"field"`` where one field is to blame; the headers
``X-Error-Message`` and ``X-Request-Id`` repeat it, as clients of the Hugging Face Hub expect.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from papertrial.errors import PapertrialError, UsageError

log = logging.getLogger("papertrial.site")

_TITLES = {
    400: "That request cannot be read",
    401: "Please sign in",
    403: "Not allowed",
    404: "Not found",
    405: "Not possible here",
    409: "Conflict",
    413: "Too large",
    422: "Something is missing or wrong",
    429: "Slow down, please",
    500: "Something went wrong here",
    503: "Not ready",
}


_FOR_PROGRAMS = ("/api/", "/feeds/", "/mcp", "/.well-known/", "/openapi.json", "/health")


class Problem(Exception):
    """An answer with an error status: raise it anywhere below a route.

    Parameters
    ----------
    status
        400 to 599.
    message
        One sentence for people; what was wrong and what would work.
    field
        The field of the request that is to blame.
    headers
        Further headers of the answer.
    """

    def __init__(
        self, status: int, message: str, *, field: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.field, self.headers = status, message, field, dict(headers or {})


def not_found(what: str) -> Problem:
    return Problem(404, f"{what} not found")


def answer(request: Request, problem: Problem) -> Response:
    """The response to a problem, in the form that the route's readers expect."""
    request_id = getattr(request.state, "request_id", "")
    headers = problem.headers | {"X-Error-Message": _header_text(problem.message)}
    if wants_json(request):
        body: dict[str, Any] = {"error": problem.message, "requestId": request_id}
        if problem.field:
            body["field"] = problem.field
        return JSONResponse(body, problem.status, headers)
    from papertrial.site.templating import render

    return render(
        request,
        "error.html.j2",
        status=problem.status,
        headers=headers,
        heading=_TITLES.get(problem.status, "Error"),
        message=problem.message,
        field=problem.field,
        request_id=request_id,
    )


def wants_json(request: Request) -> bool:
    """Whether an error is for a program: under /api and the like, or where JSON is asked for and HTML is not."""
    path = request.scope["path"]
    if path.startswith(_FOR_PROGRAMS) or path.endswith(".md"):
        return True
    accept = request.headers.get("accept", "")
    return "json" in accept and "text/html" not in accept


def _header_text(message: str) -> str:
    return " ".join(message.split()).encode("ascii", "replace").decode()[:300]


def install(app: FastAPI) -> None:
    """Give every kind of error its answer."""

    @app.exception_handler(Problem)
    def _problem(request: Request, error: Problem) -> Response:
        return answer(request, error)

    @app.exception_handler(HTTPException)
    def _http(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code == 404 and message == "Not Found":
            message = "there is nothing at this address"
        return answer(request, Problem(error.status_code, message, headers=error.headers))

    @app.exception_handler(RequestValidationError)
    def _validation(request: Request, error: RequestValidationError) -> Response:
        return answer(request, _first_invalid(error))

    @app.exception_handler(UsageError)
    def _usage(request: Request, error: UsageError) -> Response:
        return answer(request, Problem(400, str(error)))

    @app.exception_handler(PapertrialError)
    def _unavailable(request: Request, error: PapertrialError) -> Response:
        log.error("%s %s: %s", request.method, loggable(request.scope["path"]), error)
        return answer(request, Problem(503, "the service cannot do this just now; try again in a minute"))


def unexpected(request: Request, error: Exception) -> Response:
    """The answer to an error of ours: its number, and in the log all of it."""
    log.error("%s %s", request.method, loggable(request.scope["path"]), exc_info=error)
    return answer(request, Problem(500, "an error on our side; it was noted under the request id"))


def loggable(path: str) -> str:
    """A path for the log: no line breaks, and no tokens of sign-in or confirmation links."""
    shown = path[:200].encode("unicode_escape").decode()
    return re.sub(r"[A-Za-z0-9_-]{32,}", "***", shown)


def _first_invalid(error: RequestValidationError) -> Problem:
    """The first field that is wrong, by name. Of bad parameters the client makes 400, as the Hub does."""
    first = error.errors()[0]
    where, *names = [str(part) for part in first["loc"]]
    field = ".".join(names) or where
    message = f"{field}: {first['msg']}"
    given = first.get("input")
    if isinstance(given, str | int | float) and not isinstance(given, bool) and first["type"] != "missing":
        message += f" (given: {str(given)[:60]!r})"
    return Problem(400 if where in ("query", "path", "header") else 422, message, field=field)
