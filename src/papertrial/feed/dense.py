"""The dense half of search: unit vectors in int8 files that are never changed, exact scan or HNSW graph over each.

A store is a list of segments. A commit adds a segment with the new rows and a list of dead rows to older ones; small
segments are merged as they pile up, so there are O(log n) of them. Segments up to :data:`EXACT_ROWS` rows are scanned
whole, larger ones carry a usearch HNSW graph. What an engine proposes is scored again here, from the float query and
the stored codes, so that scores and their order do not depend on the engine.

Which files make up the store is said by a :class:`SegmentState` list that the caller keeps; unnamed files are rubbish.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from papertrial.feed.lexical import Document, Filters

EXACT_ROWS = 100_000  # an exact scan of so many rows takes some 10 ms on one core
GRAPH_OPTIONS: dict[str, Any] = {"connectivity": 16, "expansion_add": 64, "expansion_search": 192}
FEW = 64
_COMPACT_DEAD = 0.25  # a segment with a larger share of dead rows is written anew
_THREADS = 2
ROW = np.dtype(
    [("key", "<i8"), ("published", "<i4"), ("scope", "?"), ("family", "<u8"), ("digest", "<u8")], align=False
)


class DenseCorrupt(Exception):
    """A file that the state names is missing, cut short or not what it says."""


@dataclass(frozen=True, slots=True)
class SegmentState:
    """What the commit records of a segment."""

    name: str
    rows: int
    dead: str | None = None  # file with the dead rows' numbers
    graph: int = 0  # bytes of its graph's file, 0 for none


def digest(text: str) -> int:
    """64 bits that stand for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def quantize(vectors: NDArray[np.float32]) -> NDArray[np.int8]:
    """int8 codes of vectors (n, d), each scaled to its own largest component: cosines need no scale."""
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    return np.rint(vectors * (127.0 / np.where(largest == 0, 1, largest))).astype(np.int8)


def describe(documents: Sequence[Document], digests: Sequence[int]) -> NDArray[Any]:
    """The rows' attributes (n,) of dtype :data:`ROW`, for filters and for finding a text that was encoded before."""
    rows = np.zeros(len(documents), dtype=ROW)
    for row, document, text_digest in zip(rows, documents, digests, strict=True):
        row["key"] = document.key
        row["published"] = document.published.toordinal() if document.published else 0
        row["scope"] = document.slug is not None
        row["family"] = digest(document.family) if document.family else 0
        row["digest"] = text_digest
    return rows


def passing(rows: NDArray[Any], filters: Filters) -> NDArray[np.bool_]:
    """Which rows a search may return, (n,)."""
    mask = np.ones(len(rows), dtype=bool)
    if filters.families is not None:
        mask &= np.isin(rows["family"], np.array([digest(family) for family in filters.families], dtype=np.uint64))
    if filters.since is not None:
        mask &= rows["published"] >= filters.since.toordinal()
    if filters.until is not None:
        mask &= rows["published"] <= filters.until.toordinal()
        mask &= rows["published"] > 0
    if filters.in_scope is not None:
        mask &= rows["scope"] == filters.in_scope
    if filters.keys is not None:
        mask &= np.isin(rows["key"], np.fromiter(filters.keys, dtype=np.int64, count=len(filters.keys)))
    return mask


@dataclass
class Segment:
    """One segment, its files mapped into memory; rows are sorted by key."""

    state: SegmentState
    rows: NDArray[Any]  # (n,) of ROW
    codes: NDArray[np.int8]  # (n, d)
    dead: NDArray[np.int64]
    graph_path: Path = Path()
    _graph: Any = field(default=None, repr=False)

    @cached_property
    def keys(self) -> NDArray[np.int64]:
        return np.ascontiguousarray(self.rows["key"])

    @cached_property
    def alive(self) -> NDArray[np.bool_]:
        alive = np.ones(len(self.rows), dtype=bool)
        alive[self.dead] = False
        return alive

    def find(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row numbers of the keys, -1 where the segment has none alive."""
        places = np.searchsorted(self.keys, keys)
        inside = np.minimum(places, len(self.keys) - 1)
        return np.where((self.keys[inside] == keys) & self.alive[inside], inside, -1)

    def scores(self, query: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Cosines of the query with the stored codes of some rows."""
        codes = self.codes[rows].astype(np.float32)
        lengths = np.sqrt(np.einsum("nd,nd->n", codes, codes))
        # row by row, so that a score does not depend on which rows are asked for together
        return (np.einsum("nd,d->n", codes, query) / np.where(lengths == 0, 1, lengths)).astype(np.float32)

    def propose(self, query: NDArray[np.float32], count: int, filters: Filters) -> NDArray[np.int64]:
        """Row numbers that hold the best ``count`` alive rows that pass, and some more."""
        allowed: NDArray[np.bool_] | None = None
        if not filters.empty:
            allowed = self.alive & passing(self.rows, filters)
        elif len(self.dead):
            allowed = self.alive
        number = len(self.rows) if allowed is None else int(np.count_nonzero(allowed))
        if number == 0:
            return np.empty(0, dtype=np.int64)
        wide = min(number, 2 * count + 32)  # room for the rounding of the query that engines make
        if number <= wide:
            return np.arange(len(self.rows)) if allowed is None else np.flatnonzero(allowed)
        code = quantize(query[None])[0]
        if self.state.graph and number > EXACT_ROWS // 2:
            found = self._through_graph(code, wide, allowed)
            if found is not None:
                return found
        return self._scan(code, wide, allowed)

    def _scan(self, code: NDArray[np.int8], wide: int, allowed: NDArray[np.bool_] | None) -> NDArray[np.int64]:
        from usearch.index import MetricKind, search

        if allowed is None:
            matches = search(self.codes, code, wide, MetricKind.Cos, exact=True, threads=_THREADS)
            return np.asarray(matches.keys, dtype=np.int64)
        best: list[NDArray[np.int64]] = []
        # in slices, so that a filter that lets most of a large segment through does not copy it whole
        chosen = np.flatnonzero(allowed)
        for start in range(0, len(chosen), EXACT_ROWS):
            part = chosen[start : start + EXACT_ROWS]
            matches = search(
                np.ascontiguousarray(self.codes[part]), code, min(wide, len(part)), MetricKind.Cos, exact=True,
                threads=_THREADS,
            )  # fmt: skip
            best.append(part[np.asarray(matches.keys, dtype=np.int64)])
        return np.concatenate(best)

    def _through_graph(
        self, code: NDArray[np.int8], wide: int, allowed: NDArray[np.bool_] | None
    ) -> NDArray[np.int64] | None:
        """The graph's best, twice as many again until enough pass; None where that would cost more than a scan."""
        graph = self.graph()
        asked = wide
        while asked <= 4096:
            # a graph search keeps as many candidates as it is asked for; fewer than the option loses recall, but of
            # the few nearest half as many as the option lose none that could be measured, in half the time
            few = asked <= FEW
            graph.expansion_search = max(asked, GRAPH_OPTIONS["expansion_search"] // (2 if few else 1))
            keys = np.asarray(graph.search(code, asked).keys, dtype=np.int64)
            rows = np.searchsorted(self.keys, keys)
            rows = rows[self.keys[np.minimum(rows, len(self.keys) - 1)] == keys]
            passed = rows if allowed is None else rows[allowed[rows]]
            if len(passed) >= wide // 2 or asked >= len(self.rows):
                return passed
            asked *= 4
        return None

    def graph(self) -> Any:
        """The HNSW graph, mapped, not read."""
        if self._graph is None:
            from usearch.index import Index

            try:
                self._graph = Index.restore(self.graph_path, view=True)
            except Exception as error:  # usearch raises RuntimeError and others for a file it cannot take
                raise DenseCorrupt(f"{self.graph_path}: {error}") from error
            if self._graph is None or len(self._graph) < len(self.rows):
                raise DenseCorrupt(f"{self.graph_path} does not hold the segment's rows")
        return self._graph


class DenseSnapshot:
    """The segments of one commit, open for reading."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = tuple(segments)

    def __len__(self) -> int:
        return sum(len(segment.rows) - len(segment.dead) for segment in self.segments)

    def search(self, query: NDArray[np.float32], limit: int, filters: Filters) -> list[tuple[int, float]]:
        """The best (key, cosine), best first, ties by key.

        Parameters
        ----------
        query : float32 array (d,)
            A unit vector.
        limit : int
        filters : Filters
        """
        keys, scores = [], []
        for segment in self.segments:
            rows = segment.propose(query, limit, filters)
            keys.append(segment.keys[rows])
            scores.append(segment.scores(query, rows))
        if not keys:
            return []
        key, score = np.concatenate(keys), np.concatenate(scores)
        order = np.lexsort((key, -score))[:limit]
        return [(int(key[place]), float(score[place])) for place in order]

    def cosines(self, query: NDArray[np.float32], keys: Sequence[int]) -> dict[int, float]:
        """Cosines of the query with the papers of these keys that have a vector."""
        wanted = np.array(keys, dtype=np.int64)
        found: dict[int, float] = {}
        for segment in self.segments:
            rows = segment.find(wanted)
            present = rows >= 0
            scores = segment.scores(query, rows[present])
            found.update(zip(wanted[present].tolist(), scores.tolist(), strict=True))
        return found

    def vector(self, key: int) -> NDArray[np.float32] | None:
        """The stored unit vector (d,) of a paper, None if it has none."""
        for segment in self.segments:
            row = int(segment.find(np.array([key]))[0])
            if row >= 0:
                vector = segment.codes[row].astype(np.float32)
                return vector / max(float(np.linalg.norm(vector)), 1e-12)
        return None

    def known(self, keys: Sequence[int], digests: Sequence[int]) -> dict[int, NDArray[np.int8]]:
        """Codes of the papers whose text has not changed since it was encoded: {key: (d,)}."""
        wanted, marks = np.array(keys, dtype=np.int64), np.array(digests, dtype=np.uint64)
        found: dict[int, NDArray[np.int8]] = {}
        for segment in self.segments:
            rows = segment.find(wanted)
            for place in np.flatnonzero(rows >= 0):
                if segment.rows["digest"][rows[place]] == marks[place]:
                    found[int(wanted[place])] = np.array(segment.codes[rows[place]])
        return found


class DenseStore:
    """The folder of segment files.

    Parameters
    ----------
    folder : path
        Created if missing.
    dimensions : int
    exact_rows : int
        Segments with more rows get a graph.
    """

    def __init__(self, folder: Path, dimensions: int, exact_rows: int = EXACT_ROWS) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.dimensions, self.exact_rows = folder, dimensions, exact_rows

    def open(self, states: Iterable[SegmentState], encoder: str | None = None) -> DenseSnapshot:
        """The segments of a commit; files are of one encoder, and the caller knows which.

        Raises
        ------
        FileNotFoundError
            A file is gone: the commit is old and was cleaned away, or the folder is damaged.
        DenseCorrupt
            A file is not what the state says.
        """
        return DenseSnapshot([self._open(state) for state in states])

    def _open(self, state: SegmentState) -> Segment:
        try:
            rows = np.load(self.folder / f"{state.name}.rows.npy", mmap_mode="r")
            codes = np.load(self.folder / f"{state.name}.codes.npy", mmap_mode="r")
            dead = np.load(self.folder / state.dead) if state.dead else np.empty(0, dtype=np.int64)
        except FileNotFoundError:
            raise
        except (ValueError, OSError, EOFError) as error:
            raise DenseCorrupt(f"segment {state.name}: {error}") from error
        fits = rows.dtype == ROW and rows.shape == (state.rows,) and codes.dtype == np.int8
        if not fits or codes.shape != (state.rows, self.dimensions):
            raise DenseCorrupt(f"segment {state.name} does not have {state.rows} rows of {self.dimensions}")
        if dead.dtype != np.int64 or (len(dead) and not 0 <= dead.min() <= dead.max() < state.rows):
            raise DenseCorrupt(f"segment {state.name} has impossible dead rows")
        graph_path = self.folder / f"{state.name}.usearch"
        # usearch maps a file that was cut short without a word, and reading past its end kills the process
        if state.graph and graph_path.stat().st_size != state.graph:
            raise DenseCorrupt(f"{graph_path} does not have {state.graph} bytes")
        return Segment(state, rows, codes, dead, graph_path)

    def advance(
        self,
        snapshot: DenseSnapshot,
        rows: NDArray[Any],
        codes: NDArray[np.int8],
        removed: Iterable[int],
        tag: str,
        encoder: str | None = None,
    ) -> list[SegmentState]:
        """Write what turns the snapshot into the next commit; nothing counts until the caller records the result.

        Parameters
        ----------
        snapshot : DenseSnapshot
        rows : array (n,) of ROW
            The new rows; a key that an older segment holds replaces it.
        codes : int8 array (n, d)
        removed : iterable of int
            Keys that go; keys without a row are no error.
        tag : str
            Part of every new file's name: never the same for two commits.
        encoder : str, optional
            What made the vectors; not recorded here.

        Returns
        -------
        list of SegmentState
            Largest first.
        """
        if len(np.unique(rows["key"])) != len(rows):
            raise ValueError("rows hold a key twice")
        gone = np.unique(np.concatenate([rows["key"], np.fromiter(removed, dtype=np.int64)]))
        parts: list[Segment] = []
        for segment in snapshot.segments:
            hit = segment.find(gone)
            dead = np.union1d(segment.dead, hit[hit >= 0])
            parts.append(Segment(segment.state, segment.rows, segment.codes, dead, segment.graph_path))
        if len(rows):
            order = np.argsort(rows["key"])
            parts.append(Segment(SegmentState("", len(rows)), rows[order], codes[order], np.empty(0, dtype=np.int64)))
        groups = _merge_plan([(len(part.rows), len(part.dead)) for part in parts])
        old = {segment.state.name: segment for segment in snapshot.segments}
        states = []
        for number, group in enumerate(groups):
            chosen = [parts[place] for place in group]
            name = f"{tag}-{number}"
            rotten = any(len(part.dead) > _COMPACT_DEAD * len(part.rows) for part in chosen)
            if len(chosen) == 1 and chosen[0].state.name and not rotten:
                states.append(self._with_dead(chosen[0], old[chosen[0].state.name], name))
            elif any(len(part.rows) > len(part.dead) for part in chosen):
                states.append(self._write(chosen, name))
        _sync_folder(self.folder)
        return sorted(states, key=lambda state: (-state.rows, state.name))

    def _with_dead(self, segment: Segment, before: Segment, name: str) -> SegmentState:
        if len(segment.dead) == len(before.dead):
            return segment.state
        file = f"{name}.dead.npy"
        _save(self.folder / file, segment.dead)
        return SegmentState(segment.state.name, segment.state.rows, file, segment.state.graph)

    def _write(self, parts: Sequence[Segment], name: str) -> SegmentState:
        """One segment out of the alive rows of several."""
        kept = [np.flatnonzero(part.alive) for part in parts]
        rows = np.concatenate([np.asarray(part.rows)[keep] for part, keep in zip(parts, kept, strict=True)])
        codes = np.concatenate([np.asarray(part.codes)[keep] for part, keep in zip(parts, kept, strict=True)])
        order = np.argsort(rows["key"])
        rows, codes = rows[order], codes[order]
        _save(self.folder / f"{name}.rows.npy", rows)
        _save(self.folder / f"{name}.codes.npy", codes)
        if len(rows) <= self.exact_rows:
            return SegmentState(name, len(rows))
        graph_path = self.folder / f"{name}.usearch"
        self._write_graph(parts, rows, codes, graph_path)
        return SegmentState(name, len(rows), None, graph_path.stat().st_size)

    def _write_graph(self, parts: Sequence[Segment], rows: NDArray[Any], codes: NDArray[np.int8], path: Path) -> None:
        """The graph of the merged rows: the largest part's graph goes on, where it has one."""
        from usearch.index import Index, MetricKind

        graph: Any = None
        new = np.ones(len(rows), dtype=bool)
        base = max((part for part in parts if part.state.graph), key=lambda part: len(part.rows), default=None)
        if base is not None and len(base.dead) <= _COMPACT_DEAD * len(base.rows):
            graph = Index.restore(base.graph_path, view=False)
        if graph is not None and base is not None:
            if len(base.dead):
                graph.remove(base.keys[base.dead].astype(np.uint64))
            new = ~np.isin(rows["key"], base.keys[base.alive])
        else:
            graph = Index(ndim=self.dimensions, metric=MetricKind.Cos, dtype="i8", **GRAPH_OPTIONS)
        graph.expansion_add = GRAPH_OPTIONS["expansion_add"]
        places = np.flatnonzero(new)
        for start in range(0, len(places), 50_000):  # slices: adding copies its input
            part_rows = places[start : start + 50_000]
            graph.add(rows["key"][part_rows].astype(np.uint64), codes[part_rows], threads=_THREADS)
        graph.save(str(path))
        _sync_file(path)

    def clean(self, states: Sequence[SegmentState]) -> None:
        """Remove every file that the commit does not name, and list those that it names in ``segments.json``.

        Readers that have a removed file open keep it.
        """
        named: set[str] = set()
        for state in states:
            named |= {f"{state.name}.rows.npy", f"{state.name}.codes.npy", f"{state.name}.usearch"}
            if state.dead:
                named.add(state.dead)
        for path in self.folder.iterdir():
            if path.name not in named:
                path.unlink(missing_ok=True)
        listed = json.dumps([asdict(state) for state in states])
        (self.folder / "segments.json").write_text(listed, encoding="utf-8")


def _merge_plan(sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Groups of segments to become one.

    Going from the smallest up, a segment joins the tail while the tail is at least half as large as it is: each row is
    then rewritten O(log n) times.
    """
    alive = [rows - dead for rows, dead in sizes]
    order = sorted(range(len(sizes)), key=lambda place: (alive[place], place))
    tail: list[int] = []
    total = 0
    for place in order:
        if tail and 2 * total < alive[place]:
            break
        tail.append(place)
        total += alive[place]
    groups = [tail] if tail else []
    for place in order[len(tail) :]:
        groups.append([place])
    return groups


def _save(path: Path, array: NDArray[Any]) -> None:
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
