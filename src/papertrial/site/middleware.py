"""What surrounds every answer: a request id, security headers, size limits, quotas, and a line in the log.

Plain ASGI, so that it costs microseconds and leaves streams (MCP) alone.
"""

import json
import logging
import re
import time
import uuid
from http import HTTPStatus

from fastapi import HTTPException, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from papertrial.site.errors import loggable, unexpected
from papertrial.site.limits import Limiter
from papertrial.site.settings import Settings

log = logging.getLogger("papertrial.site.access")

MAX_BODY = 1_000_000
MAX_TARGET = 8_000

#: Nothing but our own files: no inline script or style, no frames, no other hosts.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9=;._:-]{8,100}")


class TooLarge(HTTPException):
    """The body of a request went past `MAX_BODY` while it was read."""

    def __init__(self) -> None:
        super().__init__(413, f"a request may be at most {MAX_BODY:,} bytes")


class Envelope:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, settings: Settings, limiter: Limiter) -> None:
        self.app, self.limiter = app, limiter
        self.headers = dict(_HEADERS)
        if settings.secure:
            self.headers["Strict-Transport-Security"] = "max-age=31536000"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        method, headers = scope["method"], Headers(scope=scope)
        if method == "HEAD":
            scope = {**scope, "method": "GET"}  # answered by the same routes, without a body
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        quota = self.limiter.count(scope, headers)
        extra = self.headers | {"X-Request-Id": request_id} | quota.headers
        status, begun = 0, False

        async def send_with_headers(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                found = MutableHeaders(scope=message)
                for name, value in extra.items():
                    found.setdefault(name, value)
                found.setdefault("Cache-Control", "private, no-cache")
                found.add_vary_header("Cookie")
            elif method == "HEAD" and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        refusal = _refusal(scope, headers) or (None if quota.allowed else (429, quota.message))
        try:
            if refusal is not None:
                await _refuse(send_with_headers, *refusal, request_id)
            else:
                await self.app(scope, _bounded(receive), send_with_headers)
        except TooLarge as error:
            if not begun:
                await _refuse(send_with_headers, 413, error.detail, request_id)
        except Exception as error:
            if begun:
                raise  # too late for another answer: the server closes the connection
            request = Request(scope)
            response = await run_in_threadpool(unexpected, request, error)
            await response(scope, receive, send_with_headers)
        finally:
            took = (time.perf_counter() - started) * 1000
            log.info("%s %s %d %.1f ms %s", method, loggable(scope["path"]), status, took, request_id)


def _request_id(headers: Headers) -> str:
    for name in ("x-request-id", "x-amzn-trace-id"):
        given = headers.get(name, "")
        if _REQUEST_ID.fullmatch(given):
            return given
    return uuid.uuid4().hex


def _refusal(scope: Scope, headers: Headers) -> tuple[int, str] | None:
    """Requests that no route is asked about."""
    query = scope.get("query_string", b"")
    if len(scope.get("raw_path") or b"") + len(query) > MAX_TARGET:
        return 414, f"the address is longer than {MAX_TARGET:,} characters"
    if "\0" in scope["path"] or b"%00" in query or b"\0" in query:
        return 400, "the address holds a NUL character"
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit():
        return 400, "content-length is not a number"
    if int(length) > MAX_BODY:
        return 413, f"a request may be at most {MAX_BODY:,} bytes"
    return None


def _bounded(receive: Receive) -> Receive:
    total = 0

    async def bounded() -> Message:
        nonlocal total
        message = await receive()
        if message["type"] == "http.request":
            total += len(message.get("body", b""))
            if total > MAX_BODY:
                raise TooLarge
        return message

    return bounded


async def _refuse(send: Send, status: int, message: str, request_id: str) -> None:
    body = json.dumps({"error": message, "requestId": request_id}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"x-error-message", message.encode("ascii", "replace")),
    ]
    await send({"type": "http.response.start", "status": HTTPStatus(status).value, "headers": headers})
    await send({"type": "http.response.body", "body": body})
