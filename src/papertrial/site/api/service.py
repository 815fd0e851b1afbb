"""The service about itself: whether it is well, its OpenAPI under the second address, and what crawlers may read."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import FileResponse

from papertrial.site.context import Here
from papertrial.site.templating import STATIC

router = APIRouter(tags=["service"])


@router.get("/health")
def health(here: Here) -> dict[str, Any]:
    """Whether the service is well: the papers it has, and whether search knows them all."""
    behind = here.store.revision() - here.index.revision
    return {"status": "ok", "papers": here.store.count(), "searchable": len(here.index), "index_behind": behind}


@router.get("/.well-known/openapi.json", include_in_schema=False)
def openapi(request: Request) -> dict[str, Any]:
    schema: dict[str, Any] = request.app.openapi()
    return schema


@router.get("/robots.txt", include_in_schema=False)
def robots() -> FileResponse:
    return FileResponse(STATIC / "robots.txt", media_type="text/plain")
