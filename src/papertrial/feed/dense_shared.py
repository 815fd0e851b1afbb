"""The dense half of search in PostgreSQL: the vectors that several machines of a service share, by pgvector.

The words stay in a folder of each machine. A vector, which takes ten milliseconds to make, is made by the machine that
first reads a paper's text; the others find it here. The rows hold the same int8 codes as the files of
`papertrial.feed.dense`, exact in half precision, and the table is the same to `papertrial.feed.search` as a folder of
segments; only, it has no commits: a vector is seen as soon as it is stored, and it goes with its paper.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy.dialects import postgresql

from papertrial.feed.database import explained
from papertrial.feed.dense import SegmentState
from papertrial.feed.lexical import Filters
from papertrial.feed.schema import papers

DIMENSIONS = 384
#: Candidates that a walk of the graph keeps at least, as in the files' graph; pgvector keeps 1000 at most.
_KEPT, _MOST_KEPT = 192, 1000


class HalfVector(sa.types.UserDefinedType[NDArray[np.int8]]):
    """``halfvec`` of pgvector, which holds int8 codes exactly."""

    cache_ok = True

    def __init__(self, dimensions: int = DIMENSIONS) -> None:
        self.dimensions = dimensions

    def get_col_spec(self, **_: Any) -> str:
        return f"halfvec({self.dimensions})"

    def bind_processor(self, dialect: sa.Dialect) -> Any:
        return lambda codes: None if codes is None else _written(codes)

    def result_processor(self, dialect: sa.Dialect, coltype: object) -> Any:
        return lambda text: None if text is None else np.array(text[1:-1].split(","), dtype=np.float32).astype(np.int8)


vectors_metadata = sa.MetaData()

#: `digest` stands for the text that was encoded, and for the encoder (see `SearchIndex`). PostgreSQL only.
paper_vectors = sa.Table(
    "paper_vectors",
    vectors_metadata,
    sa.Column(
        "paper_id", sa.BigInteger, sa.ForeignKey(papers.c.id, ondelete="CASCADE"), primary_key=True, autoincrement=False
    ),
    sa.Column("encoder", sa.String(200), nullable=False),
    sa.Column("digest", sa.BigInteger, nullable=False),
    sa.Column("codes", HalfVector, nullable=False),
    sa.Index(
        "ix_paper_vectors_codes",
        "codes",
        postgresql_using="hnsw",
        postgresql_with={"m": 16, "ef_construction": 64},
        postgresql_ops={"codes": "halfvec_cosine_ops"},
    ),
)


class SharedSnapshot:
    """The vectors of one encoder, as they are now."""

    def __init__(self, engine: sa.Engine, encoder: str | None) -> None:
        self._engine, self._encoder = engine, encoder

    def __len__(self) -> int:
        return self._count

    @cached_property
    def _count(self) -> int:
        # counted once for every commit of the words' index: a notice for readers hangs on it, and it reads the table
        query = sa.select(sa.func.count()).where(paper_vectors.c.encoder == self._encoder)
        with _reading(self._engine) as connection:
            return int(connection.execute(query).scalar_one())

    def search(self, query: NDArray[np.float32], limit: int, filters: Filters) -> list[tuple[int, float]]:
        """The best (key, cosine), best first, ties by key: see `DenseSnapshot.search`."""
        wide = 2 * limit + 32  # room for the rounding of the query to half precision
        table, codes = paper_vectors, paper_vectors.c.codes
        near = sa.select(table.c.paper_id, codes).where(table.c.encoder == self._encoder)
        if not filters.empty:
            near = near.join(papers, papers.c.id == table.c.paper_id).where(*_conditions(filters))
        near = near.order_by(codes.op("<=>")(_vector(query, "halfvec"))).limit(wide)
        chosen = near.cte("near").prefix_with("MATERIALIZED", dialect="postgresql")
        score = _cosine(chosen.c.codes, query)
        best = sa.select(chosen.c.paper_id, score).order_by(score.desc(), chosen.c.paper_id).limit(limit)
        with _reading(self._engine) as connection:
            kept = min(_MOST_KEPT, max(_KEPT, wide))
            for setting, value in (("hnsw.ef_search", kept), ("hnsw.iterative_scan", "strict_order"), ("jit", "off")):
                connection.execute(sa.text(f"SET LOCAL {setting} = {value}"))
            found = connection.execute(best).all()
            if len(found) < limit and not filters.empty:
                # a walk gives up where few pass the filters; then all of those that pass are few enough to be scanned
                connection.execute(sa.text("SET LOCAL enable_indexscan = off"))
                found = connection.execute(best).all()
        return [(row[0], float(row[1])) for row in found]

    def cosines(self, query: NDArray[np.float32], keys: Sequence[int]) -> dict[int, float]:
        """Cosines of the query with the papers of these keys that have a vector."""
        table = paper_vectors
        wanted = sa.select(table.c.paper_id, _cosine(table.c.codes, query)).where(table.c.encoder == self._encoder)
        with _reading(self._engine) as connection:
            found = connection.execute(wanted.where(_among(table.c.paper_id, keys))).all() if len(keys) else []
        return {row[0]: float(row[1]) for row in found}

    def vector(self, key: int) -> NDArray[np.float32] | None:
        """The stored unit vector (d,) of a paper, None if it has none."""
        table = paper_vectors
        wanted = sa.select(table.c.codes).where(table.c.paper_id == key, table.c.encoder == self._encoder)
        with _reading(self._engine) as connection:
            codes = connection.execute(wanted).scalar()
        if codes is None:
            return None
        vector: NDArray[np.float32] = codes.astype(np.float32)
        return vector / max(float(np.linalg.norm(vector)), 1e-12)

    def known(self, keys: Sequence[int], digests: Sequence[int]) -> dict[int, NDArray[np.int8]]:
        """Codes of the papers whose text has not changed since any machine encoded it: {key: (d,)}."""
        table, marks = paper_vectors, dict(zip(keys, (_signed(mark) for mark in digests), strict=True))
        query = sa.select(table.c.paper_id, table.c.digest, table.c.codes).where(_among(table.c.paper_id, keys))
        with _reading(self._engine) as connection:
            return {row[0]: row[2] for row in connection.execute(query) if row[1] == marks[row[0]]}


class SharedVectors:
    """The table, in the place of a `DenseStore`.

    Parameters
    ----------
    engine : sqlalchemy.Engine
        Of a PostgreSQL database with pgvector whose schema is at head.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def open(self, states: Iterable[SegmentState], encoder: str | None) -> SharedSnapshot:
        """The vectors of an encoder; the states are those of files, and there are none."""
        return SharedSnapshot(self._engine, encoder)

    def advance(
        self,
        snapshot: object,
        rows: NDArray[Any],
        codes: NDArray[np.int8],
        removed: Iterable[int],
        tag: str,
        encoder: str | None,
    ) -> list[SegmentState]:
        """Store the new rows; see `DenseStore.advance`.

        ``removed`` is not acted on. The vector of a paper that is no more has gone with it, and where this machine
        only lacks the encoder, the vector of an older text is worth more than none.
        """
        table = paper_vectors
        order = np.argsort(rows["key"])  # all machines lock rows in one order
        marked = [(int(rows["key"][i]), _signed(rows["digest"][i]), codes[i]) for i in order]
        new = [{"paper_id": key, "encoder": encoder, "digest": mark, "codes": code} for key, mark, code in marked]
        if not new:
            return []
        insert = postgresql.insert(table)
        given = insert.excluded
        changed = sa.or_(table.c.digest != given.digest, table.c.encoder != given.encoder)
        values = {"encoder": given.encoder, "digest": given.digest, "codes": given.codes}
        upsert = insert.on_conflict_do_update(index_elements=[table.c.paper_id], set_=values, where=changed)
        with explained(self._engine.url), self._engine.begin() as connection:
            # a paper that was merged or removed since its text was read has no row to hang a vector on
            keys = [row["paper_id"] for row in new]
            there = sa.select(papers.c.id).where(_among(papers.c.id, keys)).order_by(papers.c.id)
            alive = set(connection.execute(there.with_for_update(read=True, key_share=True)).scalars())
            kept = [row for row in new if row["paper_id"] in alive]
            if kept:
                connection.execute(upsert, kept)
        return []

    def clean(self, states: Iterable[SegmentState]) -> None:
        """Nothing is left behind by a commit."""


def _written(codes: NDArray[np.int8]) -> str:
    return "[" + ",".join(map(str, codes.tolist())) + "]"


def _vector(query: NDArray[np.float32], kind: str) -> sa.ColumnElement[Any]:
    text = "[" + ",".join(f"{value:.9g}" for value in query.tolist()) + "]"
    return sa.cast(sa.literal(text), _Named(kind))


class _Named(sa.types.UserDefinedType[Any]):
    """A type of pgvector for a cast."""

    cache_ok = True

    def __init__(self, name: str) -> None:
        self.name = name

    def get_col_spec(self, **_: Any) -> str:
        return self.name


def _cosine(codes: sa.ColumnElement[Any], query: NDArray[np.float32]) -> sa.ColumnElement[Any]:
    """In single precision, from the float query and the stored codes."""
    distance = sa.cast(codes, _Named("vector")).op("<=>", return_type=sa.Float())(_vector(query, "vector"))
    return (sa.literal(1.0) - distance).label("score")


def _among(column: sa.ColumnElement[Any], keys: Collection[int]) -> sa.ColumnElement[bool]:
    """One bound array however many keys there are."""
    wanted = sa.literal([int(key) for key in keys], type_=postgresql.ARRAY(sa.BigInteger))
    return column == sa.func.any(wanted)


def _conditions(filters: Filters) -> Iterator[sa.ColumnElement[bool]]:
    if filters.families is not None:
        yield papers.c.family.in_(list(filters.families))
    if filters.since is not None:
        yield papers.c.published >= filters.since
    if filters.until is not None:
        yield papers.c.published <= filters.until
    if filters.in_scope is not None:
        yield papers.c.slug.is_not(None) if filters.in_scope else papers.c.slug.is_(None)
    if filters.keys is not None:
        yield _among(papers.c.id, filters.keys)


def _signed(mark: Any) -> int:
    """A digest of 64 bits as the number that a database column holds."""
    return int(mark) - 2**64 if int(mark) >= 2**63 else int(mark)


@contextmanager
def _reading(engine: sa.Engine) -> Iterator[sa.Connection]:
    with explained(engine.url), engine.connect() as connection, connection.begin():
        yield connection
