"""The catalogue as users meet it: the store with the papers in scope already in it, and the search index in step."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from papertrial.errors import PapertrialError
from papertrial.feed.lexical import Document, Filters
from papertrial.feed.records import Paper
from papertrial.feed.search import Encoder, IndexBusy, Mode, Notice, SearchIndex, SearchResult
from papertrial.feed.store import Store
from papertrial.home import home

_BATCH = 1000


@dataclass(frozen=True)
class Found:
    """A search result with the papers themselves, in the order of the hits."""

    result: SearchResult
    papers: tuple[Paper, ...]
    notice: Notice | None


def document(paper: Paper) -> Document:
    """What search needs of a paper: its abstract, or our summary where there is none."""
    return Document(
        key=paper.id,
        title=paper.title,
        abstract="\n".join(part for part in (paper.abstract or paper.summary, ", ".join(paper.keywords)) if part),
        authors=paper.authors,
        arxiv_id=paper.arxiv_id,
        slug=paper.slug,
        family=paper.family,
        published=paper.published,
    )


def update_index(store: Store, index: SearchIndex, on_progress: Callable[[int], None] | None = None) -> int:
    """Bring the index to the store's revision, a batch at a time; returns how many papers changed.

    Killed at any moment, the next call goes on from the last finished batch. ``on_progress`` hears the running count.
    """
    done = 0
    while True:
        changes, revision = store.changes_since(index.revision, _BATCH)
        if not changes:
            return done
        try:
            index.remove([change.id for change in changes if change.paper is None])
            index.add(document(change.paper) for change in changes if change.paper is not None)
            index.commit(revision)
        except BaseException:
            index.rollback()
            raise
        done += len(changes)
        if on_progress:
            on_progress(done)


class Catalogue:
    """Store and index, opened together and kept together.

    Parameters
    ----------
    database
        A URL of SQLAlchemy; default an SQLite file in the home folder.
    """

    def __init__(self, database: str | None = None) -> None:
        self.store = Store.open(database)
        self.index = open_index(self.store, database)

    def prepare(self, on_progress: Callable[[int], None] | None = None) -> Notice | None:
        """Take in papers in scope that are new or changed, and update the index; quick when nothing changed.

        Where another process is writing to the index at this moment, what it holds is used and the notice says so.
        """
        self._take_in_scope()
        if self.index.revision >= self.store.revision():
            return None
        try:
            update_index(self.store, self.index, on_progress)
        except IndexBusy:
            return Notice(
                "not-encoded", "the search index is being updated by another process; newest papers may be missing"
            )
        return None

    def search(
        self, query: str, limit: int = 10, mode: Mode = "hybrid", filters: Filters | None = None, *, offset: int = 0
    ) -> Found:
        """Search, and fetch the papers found; see ``SearchIndex.search``."""
        result = self.index.search(query, limit, mode, filters, offset=offset)
        papers = self.store.by_ids([hit.key for hit in result.hits])
        kept = [(hit, paper) for hit, paper in zip(result.hits, papers, strict=True) if paper is not None]
        shown = SearchResult(tuple(hit for hit, _ in kept), result.mode, result.took_ms, result.notice)
        return Found(shown, tuple(paper for _, paper in kept), result.notice)

    def close(self) -> None:
        self.store.close()

    def _take_in_scope(self) -> None:
        """Ingest the paper folders again when a card was added, changed or removed since the last time."""
        from papertrial.feed.sources.scope import card_paths

        total = hashlib.sha256()
        for path in card_paths():
            state = path.stat()
            total.update(f"{path}\0{state.st_mtime_ns}\0{state.st_size}\n".encode())
        stamp = self.index.folder / "scope.stamp"
        if _read(stamp) == total.hexdigest() and self.store.count():
            return
        from papertrial.feed.ingest import ingest_scope

        ingest_scope(self.store)
        try:
            stamp.write_text(total.hexdigest(), encoding="utf-8")
        except OSError as error:
            raise PapertrialError(f"cannot write {stamp}: {error.strerror or error}") from None


def open_index(
    store: Store, database: str | None = None, encoder: Encoder | Literal["auto"] | None = "auto"
) -> SearchIndex:
    """The search index of a database: in a folder of this machine, but the vectors in PostgreSQL where that is used."""
    if store.engine.url.get_backend_name() != "postgresql":
        return SearchIndex(index_folder(database), encoder)
    from papertrial.feed.dense_shared import SharedVectors

    return SearchIndex(index_folder(database), encoder, vectors=SharedVectors(store.engine))


def index_folder(database: str | None = None) -> Path:
    """Each database has an index of its own."""
    name = "default" if database is None else hashlib.sha256(database.encode()).hexdigest()[:12]
    return home() / "search" / name


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
