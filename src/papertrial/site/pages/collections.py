"""Collections: everybody's public ones, one's own, and the forms that fill them."""

from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Form, Path, Query, Request
from starlette.responses import Response

from papertrial.site.context import Here, MaybeReader, SignedIn, Writer
from papertrial.site.errors import Problem
from papertrial.site.fields import found_paper
from papertrial.site.listing import Selection, list_papers, show
from papertrial.site.pages.rows import rows
from papertrial.site.pages.serving import local, page, see_other, with_query
from papertrial.site.people import accounts, collections
from papertrial.site.people.collections import Collection
from papertrial.site.templating import render

router = APIRouter(include_in_schema=False)

PER_PAGE = 50
BROUGHT = 20

Owner = Annotated[str, Path(max_length=40)]
Slug = Annotated[str, Path(max_length=80)]
Title = Annotated[str, Form(max_length=400)]
Note = Annotated[str, Form(max_length=20_000)]
Paper = Annotated[str, Form(max_length=80)]


def address(collection: Collection) -> str:
    """Where a collection is shown."""
    return f"/people/{collection.owner}/{collection.slug}"


@router.get("/collections")
def all_collections(
    request: Request, here: Here, reader: MaybeReader, p: Annotated[int, Query(ge=0, le=300)] = 0
) -> Response:
    """Public collections, last changed first, and the reader's own."""

    def values() -> dict[str, Any]:
        found = collections.public_collections(here.store, PER_PAGE + 1, p * PER_PAGE)
        return {
            "collections": [one for one in found[:PER_PAGE] if reader is None or one.owner != reader.name],
            "mine": collections.collections_of(here.store, reader.name, reader) if reader else [],
            "next_page": with_query("/collections", p=p + 1) if len(found) > PER_PAGE and p < 300 else None,
            "previous_page": with_query("/collections", p=p - 1) if p else None,
        }

    return page(request, reader, "collections.html.j2", values)


@router.post("/collections")
def make(
    here: Here,
    reader: Writer,
    title: Title = "",
    note: Note = "",
    public: Annotated[bool, Form()] = False,
    paper: Annotated[str | None, Form(max_length=80)] = None,
) -> Response:
    """A new collection, with a first paper where one is named."""
    first = found_paper(here.store, paper) if paper else None
    made = collections.make_collection(here.store, reader, title, note, public=public)
    if first is not None:
        collections.put_item(here.store, reader, made.slug, first.id)
    return see_other(address(made))


@router.post("/collections/add")
def add(
    here: Here,
    reader: Writer,
    paper: Paper,
    collection: Annotated[str, Form(max_length=80)],
    note: Note = "",
    back: Annotated[str | None, Form(max_length=2000)] = None,
) -> Response:
    """Put a paper into one of the reader's collections."""
    collections.put_item(here.store, reader, collection, found_paper(here.store, paper).id, note)
    return see_other(local(back, f"/people/{reader.name}/{collection}"))


@router.get("/people/{owner}")
def person(request: Request, owner: Owner, here: Here, reader: MaybeReader) -> Response:
    """An account as others see it: its name, its public collections, and the papers it brought into the feed."""

    def values() -> dict[str, Any]:
        found = accounts.reader_by_name(here.store, owner)
        if found is None:
            raise Problem(404, f"nobody here is called {owner[:40]!r}")
        brought = list_papers(here.store, Selection(submitter=owner), limit=BROUGHT)
        return {
            "person": found,
            "collections": collections.collections_of(here.store, owner, reader),
            "rows": rows(here, reader, brought),
        }

    return page(request, reader, "person.html.j2", values)


@router.get("/people/{owner}/{slug}")
def one_collection(request: Request, owner: Owner, slug: Slug, here: Here, reader: MaybeReader) -> Response:
    """One collection with its papers."""

    def values() -> dict[str, Any]:
        found = collections.collection(here.store, owner, slug, reader)
        notes = {item.paper_id: item.note for item in found.items}
        kept = [paper for paper in here.store.by_ids(list(notes)) if paper is not None]
        listed = [replace(row, note=notes[row.paper.id]) for row in rows(here, reader, show(here.store, kept))]
        return {"collection": found, "rows": listed, "mine": reader is not None and reader.id == found.owner_id}

    return page(request, reader, "collection.html.j2", values)


@router.get("/people/{owner}/{slug}/change")
def change_form(request: Request, owner: Owner, slug: Slug, here: Here, reader: SignedIn) -> Response:
    """The form that changes a collection."""
    _own(owner, reader)
    found = collections.collection(here.store, owner, slug, reader)
    return render(request, "collection_form.html.j2", collection=found)


@router.post("/people/{owner}/{slug}/change")
def change(
    owner: Owner,
    slug: Slug,
    here: Here,
    reader: Writer,
    title: Title = "",
    note: Note = "",
    public: Annotated[bool, Form()] = False,
) -> Response:
    """Change a collection's title, note and visibility."""
    _own(owner, reader)
    return see_other(
        address(collections.change_collection(here.store, reader, slug, title=title, note=note, public=public))
    )


@router.post("/people/{owner}/{slug}/delete")
def delete(owner: Owner, slug: Slug, here: Here, reader: Writer) -> Response:
    """Delete a collection; the papers stay."""
    _own(owner, reader)
    collections.delete_collection(here.store, reader, slug)
    return see_other("/collections")


@router.post("/people/{owner}/{slug}/note")
def change_note(owner: Owner, slug: Slug, here: Here, reader: Writer, paper: Paper, note: Note = "") -> Response:
    """Change the note on a paper of a collection."""
    _own(owner, reader)
    found = found_paper(here.store, paper)
    collections.put_item(here.store, reader, slug, found.id, note)
    return see_other(f"/people/{owner}/{slug}#p-{found.id}")


@router.post("/people/{owner}/{slug}/up")
def move_up(owner: Owner, slug: Slug, here: Here, reader: Writer, paper: Paper) -> Response:
    """Let a paper change places with the one above it."""
    _own(owner, reader)
    moved = found_paper(here.store, paper).id
    order = [item.paper_id for item in collections.collection(here.store, owner, slug, reader).items]
    if moved in order[1:]:
        place = order.index(moved)
        order[place - 1], order[place] = order[place], order[place - 1]
        collections.order_items(here.store, reader, slug, order)
    return see_other(f"/people/{owner}/{slug}#p-{moved}")


@router.post("/people/{owner}/{slug}/remove")
def remove(owner: Owner, slug: Slug, here: Here, reader: Writer, paper: Paper) -> Response:
    """Take a paper out of a collection."""
    _own(owner, reader)
    collections.remove_item(here.store, reader, slug, found_paper(here.store, paper).id)
    return see_other(f"/people/{owner}/{slug}")


def _own(owner: str, reader: accounts.Reader) -> None:
    if owner != reader.name:
        raise Problem(403, "this collection is somebody else's")
