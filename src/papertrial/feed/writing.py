"""Upserts: a batch of records becomes inserted, changed, merged and untouched rows in one transaction.

The rows that a batch can touch are read at once, changed in memory and written at once; so a batch costs a handful
of statements however many records it has.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any, Literal

import sqlalchemy as sa

from papertrial.feed import schema
from papertrial.feed.merging import Row, blank_row, derive, merge_record, merge_rows
from papertrial.feed.records import Record, paper_key, title_key

Outcome = Literal["added", "updated", "unchanged"]

#: Rows an upsert looks up with one statement; below the limits on bound values of every SQLite and PostgreSQL.
_CHUNK = 400
_COLUMNS = tuple(column.name for column in schema.papers.columns)


def lock_counters(connection: sa.Connection) -> dict[str, int]:
    """The counters, held until the transaction ends: writers come one after the other and revisions in order."""
    rows = connection.execute(sa.select(schema.counters).with_for_update()).all()
    return {row.name: row.value for row in rows}


def save_counters(connection: sa.Connection, counters: dict[str, int]) -> None:
    """Write the counters back at the end of a batch."""
    for name, value in counters.items():
        table = schema.counters
        connection.execute(table.update().where(table.c.name == name, table.c.value != value).values(value=value))


@dataclass
class Batch:
    """The rows that a set of records can touch, and what has to be written of them."""

    connection: sa.Connection
    now: datetime
    counters: dict[str, int]
    rows: dict[int, Row] = field(default_factory=dict)
    stored: dict[int, Row] = field(default_factory=dict)
    by_arxiv: dict[str, int] = field(default_factory=dict)
    by_slug: dict[str, int] = field(default_factory=dict)
    by_title: dict[str, set[int]] = field(default_factory=dict)
    titles: dict[int, set[str]] = field(default_factory=dict)
    new_titles: set[tuple[str, int]] = field(default_factory=set)
    merged_into: dict[int, int] = field(default_factory=dict)
    dropped: list[int] = field(default_factory=list)

    @property
    def today(self) -> date:
        return self.now.date()

    # -- reading ------------------------------------------------------------------------------------------------------

    def load(self, records: Sequence[Record]) -> None:
        """Read every stored row that one of the records may be about."""
        papers, titles = schema.papers, schema.titles
        for column, values in (
            (papers.c.arxiv_id, {record.arxiv_id for record in records if record.arxiv_id}),
            (papers.c.slug, {record.slug for record in records if record.slug}),
        ):
            for chunk in _chunks(values):
                self._remember(self.connection.execute(sa.select(papers).where(column.in_(chunk))).mappings())
        for chunk in _chunks({title_key(record.title) for record in records}):
            found = sa.select(titles.c.paper_id).where(titles.c.title_key.in_(chunk))
            self._remember(self.connection.execute(sa.select(papers).where(papers.c.id.in_(found))).mappings())
        self._load_titles()

    def load_ids(self, ids: Iterable[int]) -> None:
        """Read rows by their number."""
        for chunk in _chunks(set(ids)):
            query = sa.select(schema.papers).where(schema.papers.c.id.in_(chunk))
            self._remember(self.connection.execute(query).mappings())
        self._load_titles()

    def _remember(self, rows: Iterable[Any]) -> None:
        for stored in rows:
            row = dict(stored)
            if row["id"] not in self.rows:
                self.rows[row["id"]], self.stored[row["id"]] = row, row
                self._point_at(row)

    def _point_at(self, row: Row) -> None:
        if row["arxiv_id"]:
            self.by_arxiv[row["arxiv_id"]] = row["id"]
        if row["slug"]:
            self.by_slug[row["slug"]] = row["id"]

    def _load_titles(self) -> None:
        table = schema.titles
        for chunk in _chunks(set(self.rows) - set(self.titles)):
            for paper_id in chunk:
                self.titles[paper_id] = set()
            for key, paper_id in self.connection.execute(
                sa.select(table.c.title_key, table.c.paper_id).where(table.c.paper_id.in_(chunk))
            ):
                self.titles[paper_id].add(key)
                self.by_title.setdefault(key, set()).add(paper_id)

    # -- deciding -----------------------------------------------------------------------------------------------------

    def put(self, record: Record) -> Outcome:
        """Bring one record in; `load` has read what it may touch."""
        key = title_key(record.title)
        same = self._same_paper(record, key)
        if record.slug:
            self._move_slug(record.slug, same)
        if not same:
            self.counters["paper_id"] += 1
            self.counters["papers"] += 1
            paper_id = self.counters["paper_id"]
            row = merge_record(blank_row(), record, self.today)
            self._keep(row | {"id": paper_id, "first_seen": self.now}, key)
            return "added"
        paper_id, *others = same
        row = self.rows[paper_id]
        for other in others:
            row = self._absorb(row, other)
        merged = merge_record(row, record, self.today)
        if not others and merged == self.rows[paper_id] and key in self.titles[paper_id]:
            return "unchanged"
        self._keep(merged, key)
        return "updated"

    def _same_paper(self, record: Record, key: str) -> list[int]:
        """The rows that are this record's paper, the one to keep first: by arXiv id, by slug, by title.

        A title proves nothing where both sides have an arXiv id and the ids differ.
        """
        by_id = self.by_arxiv.get(record.arxiv_id) if record.arxiv_id else None
        found = [] if by_id is None else [by_id]
        slug_row = self.by_slug.get(record.slug) if record.slug else None
        if slug_row is not None and self._may_be(slug_row, record.arxiv_id):
            found.append(slug_row)
        named = sorted(self.by_title.get(key, ()), key=lambda i: (self.rows[i]["arxiv_id"] or "~", i))
        anchor = record.arxiv_id or next((self.rows[i]["arxiv_id"] for i in found if self.rows[i]["arxiv_id"]), None)
        for row_id in named:
            if self._may_be(row_id, anchor):
                found.append(row_id)
                anchor = anchor or self.rows[row_id]["arxiv_id"]
        unique = list(dict.fromkeys(found))
        # A stored row is kept rather than one of this batch: other tables may point at it.
        return sorted(unique, key=lambda i: (i not in self.stored, self.rows[i]["arxiv_id"] is None, unique.index(i)))

    def _may_be(self, row_id: int, arxiv_id: str | None) -> bool:
        mine = self.rows[row_id]["arxiv_id"]
        return mine is None or arxiv_id is None or mine == arxiv_id

    def _absorb(self, row: Row, other_id: int) -> Row:
        """Merge another row of the same paper into `row`; the other one is dropped."""
        other = self.rows.pop(other_id)
        merged = merge_rows(row, other, self.today)
        merged["first_seen"] = min(row["first_seen"], other["first_seen"])
        for key in self.titles.pop(other_id, set()):
            self.by_title[key].discard(other_id)
            self._add_title(key, row["id"])
        if other_id in self.stored:
            self.merged_into[other_id] = row["id"]
        self.counters["papers"] -= 1
        self._keep(merged, title_key(merged["title"]))
        return merged

    def _move_slug(self, slug: str, same: list[int]) -> None:
        """A slug names one paper: take it from another one that had it (the card's arXiv id was corrected)."""
        holder = self.by_slug.get(slug)
        if holder is not None and holder not in same and holder in self.rows:
            self.out_of_scope(holder)

    def out_of_scope(self, paper_id: int) -> None:
        """Forget what our card said of a paper; a paper that nothing else knows goes altogether."""
        row = dict(self.rows[paper_id])
        self.by_slug.pop(row["slug"] or "", None)
        row["sources"] = {source: url for source, url in row["sources"].items() if source != "card"}
        row["origins"] = dict(row["origins"])
        for name in ("slug", "family", "summary"):
            row[name] = None
            row["origins"].pop(name, None)
        if row["sources"]:
            self.rows[paper_id] = derive(row, self.today)
            return
        del self.rows[paper_id]
        for key in self.titles.pop(paper_id, set()):
            self.by_title[key].discard(paper_id)
        self.dropped.append(paper_id)
        self.counters["papers"] -= 1

    def _keep(self, row: Row, key: str) -> None:
        self.rows[row["id"]] = row
        self._point_at(row)
        self._add_title(key, row["id"])
        self._add_title(title_key(row["title"]), row["id"])

    def _add_title(self, key: str, paper_id: int) -> None:
        held = self.titles.setdefault(paper_id, set())
        if key not in held:
            held.add(key)
            self.by_title.setdefault(key, set()).add(paper_id)
            self.new_titles.add((key, paper_id))

    # -- writing ------------------------------------------------------------------------------------------------------

    def write(self) -> None:
        """Write what changed: first what makes room (merged and dropped rows, slugs given up), then the rest."""
        papers = schema.papers
        gone = {i: self.stored[i] for i in (*self.merged_into, *self.dropped) if i in self.stored}
        changed = [row for i, row in self.rows.items() if row != self.stored.get(i)]
        updates = [row for row in changed if row["id"] in self.stored]
        for old, new in self.merged_into.items():
            self._repoint(old, new)
        for chunk in _chunks(set(gone)):
            self.connection.execute(papers.delete().where(papers.c.id.in_(chunk)))
        lost = [row["id"] for row in updates if self.stored[row["id"]]["slug"] not in (None, row["slug"])]
        for chunk in _chunks(set(lost)):
            self.connection.execute(papers.update().where(papers.c.id.in_(chunk)).values(slug=None))
        for row in changed:
            row |= {"updated": self.now, "revision": self._next_revision()}
        if updates:
            values = [{f"new_{name}": row[name] for name in _COLUMNS} for row in updates]
            bound = {name: sa.bindparam(f"new_{name}", type_=papers.c[name].type) for name in _COLUMNS if name != "id"}
            self.connection.execute(papers.update().where(papers.c.id == sa.bindparam("new_id")).values(bound), values)
        inserts = [{name: row.get(name) for name in _COLUMNS} for row in changed if row["id"] not in self.stored]
        if inserts:
            self.connection.execute(papers.insert(), inserts)
        self._write_titles()
        self._write_topics(changed)
        self._write_removals(gone)

    def _next_revision(self) -> int:
        self.counters["revision"] += 1
        return self.counters["revision"]

    def _repoint(self, old: int, new: int) -> None:
        """Rows elsewhere that hang on a merged paper (votes, comments) move to the one that is kept."""
        for table in schema.metadata.tables.values():
            if table.name in ("titles", "topics"):
                continue  # written below from what the batch knows
            for key in table.foreign_keys:
                if key.column.table is schema.papers:
                    self._move(table, key.parent, old, new)

    def _move(self, table: sa.Table, column: sa.Column[Any], old: int, new: int) -> None:
        """Move row by row; one that the kept paper has already (the same voter's vote) goes with the merged paper."""
        identity = list(table.primary_key.columns)
        for row in self.connection.execute(sa.select(*identity).where(column == old)).all():
            same = [mine == value for mine, value in zip(identity, row, strict=True)]
            try:
                with self.connection.begin_nested():
                    self.connection.execute(table.update().where(*same).values({column.name: new}))
            except sa.exc.IntegrityError:
                self.connection.execute(table.delete().where(*same))

    def _write_titles(self) -> None:
        rows = [{"title_key": key, "paper_id": i} for key, i in sorted(self.new_titles) if i in self.rows]
        if rows:
            self.connection.execute(schema.titles.insert(), rows)

    def _write_topics(self, changed: list[Row]) -> None:
        table = schema.topics
        moved = [row for row in changed if _topics(row) != _topics(self.stored.get(row["id"]))]
        for chunk in _chunks({row["id"] for row in moved if row["id"] in self.stored}):
            self.connection.execute(table.delete().where(table.c.paper_id.in_(chunk)))
        rows = [
            {"topic": topic, "paper_id": row["id"], "feed_day": row["feed_day"]}
            for row in moved
            for topic in dict.fromkeys(row["categories"])
        ]
        if rows:
            self.connection.execute(table.insert(), rows)

    def _write_removals(self, gone: dict[int, Row]) -> None:
        """Note the papers that are no more; numbers are never given twice."""
        rows = [
            {"paper_id": i, "key": paper_key(row["arxiv_id"], row["title"]), "revision": self._next_revision()}
            for i, row in sorted(gone.items())
        ]
        if rows:
            self.connection.execute(schema.removals.insert(), rows)


def _topics(row: Row | None) -> tuple[Any, ...]:
    return (row["feed_day"], *row["categories"]) if row else ()


def _chunks(values: Iterable[Any]) -> Iterable[list[Any]]:
    ordered = sorted(values)
    return (ordered[i : i + _CHUNK] for i in range(0, len(ordered), _CHUNK))
