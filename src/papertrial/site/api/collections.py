"""Collections over the API."""

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import StringConstraints
from starlette.responses import Response

from papertrial.site.api.account import Strict
from papertrial.site.context import Context, Here, MaybeReader, Writer
from papertrial.site.errors import Problem
from papertrial.site.fields import Limit, Line, Offset, PaperName, Text, found_paper
from papertrial.site.people import collections
from papertrial.site.people.accounts import Reader
from papertrial.site.people.collections import MAX_NOTE, Collection
from papertrial.site.signing_in import iso

router = APIRouter(tags=["collections"])

Owner = Annotated[str, StringConstraints(max_length=40)]
Slug = Annotated[str, StringConstraints(max_length=80)]
Title = Annotated[Line, StringConstraints(min_length=1, max_length=120)]
Note = Annotated[Text, StringConstraints(max_length=MAX_NOTE)]


class NewCollection(Strict):
    title: Title
    note: Note = ""
    public: bool = False


class ChangedCollection(Strict):
    """What is left out stays. ``order`` names papers in their new order."""

    title: Title | None = None
    note: Note | None = None
    public: bool | None = None
    order: Annotated[list[Annotated[str, StringConstraints(max_length=80)]], Query(max_length=1000)] | None = None


class ItemNote(Strict):
    note: Note = ""


@router.get("/api/collections")
def list_collections(
    here: Here,
    reader: MaybeReader,
    owner: Annotated[str | None, Query(max_length=40, description="an account's name")] = None,
    limit: Limit = 50,
    offset: Offset = 0,
) -> list[dict[str, Any]]:
    """Public collections, last changed first; of one account also its own private ones."""
    if owner is None:
        found = collections.public_collections(here.store, limit, offset)
    else:
        found = collections.collections_of(here.store, owner, reader)[offset : offset + limit]
    return [_collection(collection, here) for collection in found]


@router.post("/api/collections", status_code=201)
def make_collection(body: NewCollection, here: Here, reader: Writer) -> dict[str, Any]:
    """A new collection."""
    made = collections.make_collection(here.store, reader, body.title, body.note, public=body.public)
    return _collection(made, here)


@router.get("/api/collections/{owner}/{slug}")
def one_collection(owner: Owner, slug: Slug, here: Here, reader: MaybeReader) -> dict[str, Any]:
    """One collection with its papers."""
    found = collections.collection(here.store, owner, slug, reader)
    papers = here.store.by_ids([item.paper_id for item in found.items])
    items = [
        {"id": paper.key, "title": paper.title, "note": item.note, "url": here.settings.url(f"/papers/{paper.key}")}
        for item, paper in zip(found.items, papers, strict=True)
        if paper is not None
    ]
    return _collection(found, here) | {"items": items}


@router.patch("/api/collections/{owner}/{slug}")
def change_collection(owner: Owner, slug: Slug, body: ChangedCollection, here: Here, reader: Writer) -> dict[str, Any]:
    """Change a collection."""
    _own(owner, reader)
    changed = collections.change_collection(
        here.store, reader, slug, title=body.title, note=body.note, public=body.public
    )
    if body.order is not None:
        ids = [found_paper(here.store, name).id for name in body.order]
        collections.order_items(here.store, reader, slug, ids)
    return _collection(changed, here)


@router.delete("/api/collections/{owner}/{slug}", status_code=204)
def delete_collection(owner: Owner, slug: Slug, here: Here, reader: Writer) -> Response:
    """Delete a collection; the papers stay."""
    _own(owner, reader)
    collections.delete_collection(here.store, reader, slug)
    return Response(status_code=204)


@router.put("/api/collections/{owner}/{slug}/items/{paper_id:paper}", status_code=204)
def put_item(
    owner: Owner, slug: Slug, paper_id: PaperName, here: Here, reader: Writer, body: ItemNote | None = None
) -> Response:
    """Put a paper into a collection, or change its note."""
    _own(owner, reader)
    note = body.note if body else ""
    collections.put_item(here.store, reader, slug, found_paper(here.store, paper_id).id, note)
    return Response(status_code=204)


@router.delete("/api/collections/{owner}/{slug}/items/{paper_id:paper}", status_code=204)
def remove_item(owner: Owner, slug: Slug, paper_id: PaperName, here: Here, reader: Writer) -> Response:
    """Take a paper out of a collection."""
    _own(owner, reader)
    collections.remove_item(here.store, reader, slug, found_paper(here.store, paper_id).id)
    return Response(status_code=204)


def _own(owner: str, reader: Reader) -> None:
    if owner != reader.name:
        raise Problem(403, "that collection is somebody else's")


def _collection(collection: Collection, here: Context) -> dict[str, Any]:
    return {
        "owner": collection.owner,
        "slug": collection.slug,
        "title": collection.title,
        "note": collection.note,
        "public": collection.public,
        "size": collection.size,
        "created": iso(collection.created),
        "updated": iso(collection.updated),
        "url": here.settings.url(f"/people/{collection.owner}/{collection.slug}"),
    }
