"""The application: every module of `PACKAGES` plugged into one FastAPI.

A module takes part by what it defines, all optional:

- ``router``: an ``APIRouter`` with its routes;
- ``jobs(context) -> list[Job]``: work for the background;
- ``lifespan(app, context)``: an async context manager around the time that the application serves;
- ``mount(app, context)``: for ASGI applications of their own (MCP).

Nothing else is edited to add a page.
"""

import importlib
import logging
import pkgutil
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from types import ModuleType
from typing import Any

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

import papertrial
from papertrial.feed.store import Store
from papertrial.site import errors, templating, upkeep
from papertrial.site.background import Jobs
from papertrial.site.context import Context
from papertrial.site.limits import Limiter
from papertrial.site.middleware import Envelope
from papertrial.site.page_cache import LEVEL, KeptPages
from papertrial.site.settings import Settings, read_settings

log = logging.getLogger("papertrial.site")

PACKAGES = ("api", "pages", "delivery", "syndication", "mcp")
#: Routes are tried one after the other: those that are asked for most come first, in an order that they need.
FIRST = ("pages.feed", "api.daily", "pages.paper")


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application; opens (and where needed makes) the database, and reads no paper's code.

    Raises
    ------
    PapertrialError
        The database or the home folder cannot be used.
    """
    settings = settings or read_settings()
    here = Context(settings, Store.open(settings.database), Limiter(settings))
    upkeep.prepare(here)
    modules = _modules()
    app = FastAPI(
        title=settings.title,
        version=papertrial.__version__,
        description="Papers, and whether their claims hold: a self-hosted papers service with its evidence.",
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        lifespan=_lifespan(here, modules),
    )
    app.state.context = here
    errors.install(app)
    for module in modules:
        if hasattr(module, "router"):
            app.include_router(module.router)
        if hasattr(module, "mount"):
            module.mount(app, here)
    app.mount("/static", _Static(directory=templating.STATIC), name="static")
    app.add_middleware(GZipMiddleware, minimum_size=1024, compresslevel=LEVEL)
    app.add_middleware(KeptPages, pages=here.pages, at_once=1 if here.store.is_sqlite else 8)
    app.add_middleware(Envelope, settings=settings, limiter=here.limiter)
    return app


def _modules() -> list[ModuleType]:
    found = []
    for package in PACKAGES:
        parent = importlib.import_module(f"papertrial.site.{package}")
        names = sorted(module.name for module in pkgutil.iter_modules(parent.__path__))
        found += [importlib.import_module(f"papertrial.site.{package}.{name}") for name in names]
    first = [sys.modules[f"papertrial.site.{name}"] for name in FIRST]
    return [*first, *(module for module in found if module not in first)]


def _lifespan(here: Context, modules: list[ModuleType]) -> Any:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        jobs = upkeep.jobs(here)
        for module in modules:
            if hasattr(module, "jobs"):
                jobs += module.jobs(here)
        app.state.jobs = runner = Jobs(here.store, jobs)
        async with AsyncExitStack() as stack:
            for module in modules:
                if hasattr(module, "lifespan"):
                    await stack.enter_async_context(module.lifespan(app, here))
            runner.start()
            try:
                yield
            finally:
                await run_in_threadpool(runner.stop)
        here.close()

    return lifespan


class _Static(StaticFiles):
    """Files whose address carries their digest may be kept for ever."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        fixed = scope.get("query_string", b"").startswith(b"v=")
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable" if fixed else "public, max-age=3600"
        return response
