"""``/mcp``: the tools over streamable HTTP, without sessions, so that any worker can answer."""

import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from papertrial.site.context import Context
from papertrial.site.errors import Problem, answer
from papertrial.site.keys import token_hash
from papertrial.site.limits import credential_of
from papertrial.site.mcp.server import make_server
from papertrial.site.people.accounts import reader_of_token

log = logging.getLogger("papertrial.site.mcp")

PATH = "/mcp"


class Endpoint:
    """The ASGI application at `PATH`. What serves it is made when the first client comes."""

    def __init__(self, here: Context) -> None:
        self._here = here
        self._group: anyio.abc.TaskGroup | None = None
        self._starting: anyio.Lock | None = None
        self._manager: Any = None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """While the application serves."""
        async with anyio.create_task_group() as group:
            self._group, self._starting, self._manager = group, anyio.Lock(), None
            try:
                yield
            finally:
                self._group = None
                group.cancel_scope.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            self._check(request)
            body = await _message(request)
            manager = await self._served()
        except Problem as problem:
            response = await anyio.to_thread.run_sync(answer, request, problem)
            await response(scope, receive, send)
            return
        except ClientDisconnect:
            return
        await manager.handle_request(scope, _once(body, receive), send)

    def _check(self, request: Request) -> None:
        if request.method != "POST":
            # Without sessions there is nothing to listen to (GET) and nothing to end (DELETE).
            raise Problem(405, "this address speaks the Model Context Protocol: POST to it", headers={"Allow": "POST"})
        origin, own = request.headers.get("origin"), self._here.settings.base_url
        if origin is not None and origin != "/".join(own.split("/")[:3]):
            # Of browsers only our own pages: another site could point its name at a service inside a network.
            raise Problem(403, "this request came from another site")

    async def _served(self) -> Any:
        if self._manager is None:
            if self._group is None or self._starting is None:
                raise Problem(503, "the service is starting or stopping; try again in a minute")
            async with self._starting:
                if self._manager is None:
                    self._manager = await self._group.start(self._serve)
        return self._manager

    async def _serve(self, *, task_status: anyio.abc.TaskStatus[Any]) -> None:
        server = await anyio.to_thread.run_sync(make_server, self._here, self._may_run)
        server.streamable_http_app()  # makes the manager
        async with server.session_manager.run():
            task_status.started(server.session_manager)
            await anyio.sleep_forever()

    def _may_run(self, request: Request | None) -> None:
        """A run costs processor time: who starts one has an account.

        Raises
        ------
        Problem
            401 or 403.
        """
        here = self._here
        if not here.settings.smoke_runs:
            raise Problem(403, "smoke runs are switched off here")
        credential = credential_of(request.headers, "") if request is not None else None
        reader = reader_of_token(here.store, token_hash(credential)) if credential else None
        if reader is None:
            where = here.settings.url("/profile")
            raise Problem(401, f"run_smoke needs an API token with the scope 'write' as a bearer token; see {where}")
        if reader.scope != "write":
            raise Problem(403, "this API token may read only; make one with the scope 'write'")


async def _message(request: Request) -> bytes:
    """The body, which is JSON: the SDK takes some of what is not for an error of its own."""
    body = await request.body()
    try:
        json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError):
        raise Problem(400, "the body is not a JSON message") from None
    return body


def _once(body: bytes, receive: Receive) -> Receive:
    """A body that was read already, then whatever comes."""
    waiting = [body]

    async def replayed() -> Message:
        if waiting:
            return {"type": "http.request", "body": waiting.pop(), "more_body": False}
        return await receive()

    return replayed


def mount(app: FastAPI, here: Context) -> None:
    """Put the tools at `PATH`."""
    app.state.mcp = Endpoint(here)
    app.add_route(PATH, app.state.mcp, include_in_schema=False)


def lifespan(app: FastAPI, here: Context) -> Any:
    """Serve clients of the tools while the application serves."""
    return app.state.mcp.open()
