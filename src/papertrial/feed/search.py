"""Search over the catalogue: a derived index in a folder, words and meaning mixed.

The index is fed documents and carries the store's revision; both become visible in one step, so after a crash it holds
either the old revision or the new one. It can always be made again from the store: a damaged index is found out when it
is opened or read, set aside, and starts empty at revision 0.

A hybrid score is ``w * bm25 / (the query's best bm25) + (1 - w) * cosine``, every candidate of either half scored by
both. Scores are mixed and not ranks because a clear winner by words must stay one: on known-item queries reciprocal
rank fusion falls below BM25 alone (``benchmarks/search_quality.py`` measures it).
"""

import contextlib
import errno
import json
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from papertrial.errors import PapertrialError, UsageError
from papertrial.feed import encoder as encoders
from papertrial.feed.dense import DenseCorrupt, DenseSnapshot, DenseStore, SegmentState, describe, digest, quantize
from papertrial.feed.lexical import (
    Document,
    Filters,
    LexicalIndex,
    LexicalSnapshot,
    normal_arxiv_id,
)

if TYPE_CHECKING:
    from papertrial.feed.dense_shared import SharedSnapshot, SharedVectors

__all__ = ["Document", "Filters", "Hit", "Notice", "SearchIndex", "SearchResult", "fuse"]

Mode = Literal["hybrid", "lexical", "dense"]
MAX_QUERY_CHARACTERS = 4_000  # an abstract pasted whole fits
MAX_DEPTH = 1_000
CANDIDATES = 200  # from each half; pages within the first half of it are cut from one ranking
# Tuned on half of the queries of benchmarks/search_quality.py, where 0.2 to 0.4 is a plateau; from its upper half,
# since words decide more of the queries as a catalogue grows.
LEXICAL_WEIGHT = 0.35
_FORMAT = 2
_BATCH = 512
_WRITE_TIMEOUT_SECONDS = 30.0
# the machine's trouble, which a new index would not mend
_NOT_DAMAGE = {
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOMEM,
    errno.EROFS,
}
_T = TypeVar("_T")


class Encoder(Protocol):
    """What turns texts into unit vectors; ``name`` changes whenever the vectors do."""

    name: str

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]: ...


class IndexBusy(PapertrialError):
    """Another process is writing to the index."""


@dataclass(frozen=True, slots=True)
class Notice:
    """What the reader of a result should know: ``code`` for programs, ``message`` for people."""

    code: Literal["encoder-missing", "not-encoded", "unknown-id"]
    message: str


@dataclass(frozen=True, slots=True)
class Hit:
    """A found paper: its BM25 score and cosine where it has them, ``exact`` if the query is its id, slug or title."""

    key: int
    score: float
    lexical: float | None = None
    dense: float | None = None
    exact: bool = False


@dataclass(frozen=True, slots=True)
class SearchResult:
    hits: tuple[Hit, ...]
    mode: Mode  # the one that was used
    took_ms: float
    notice: Notice | None = None


@dataclass(frozen=True)
class _View:
    """One committed state, opened."""

    lexical: LexicalSnapshot
    dense: "DenseSnapshot | SharedSnapshot"
    revision: int
    encoder: str | None
    stamp: tuple[int, int]


class _Damaged(Exception):
    """The index cannot be read; it has to be made again."""


def fuse(lexical: dict[int, float], dense: dict[int, float], weight: float = LEXICAL_WEIGHT) -> dict[int, float]:
    """Mix BM25 scores and cosines into one score for every key of either.

    Parameters
    ----------
    lexical : dict of key to BM25 score
        Not negative; a key that is missing scored nothing.
    dense : dict of key to cosine
        A missing key or a negative cosine counts 0.
    weight : float
        In [0, 1]: what the words count.

    Raises
    ------
    ValueError
        ``weight`` is outside [0, 1].
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight is {weight}; a number from 0 to 1 is needed")
    best = max(lexical.values(), default=0.0) or 1.0
    return {
        key: weight * lexical.get(key, 0.0) / best + (1 - weight) * max(0.0, dense.get(key, 0.0))
        for key in {*lexical, *dense}
    }


def encoded_text(document: Document) -> str:
    """What of a paper is encoded."""
    return f"{document.title.strip()}\n{document.abstract.strip()}".strip()


class SearchIndex:
    """The search index in a folder: any number of reading processes, one writing at a time.

    Parameters
    ----------
    folder : path
        Created if missing.
    encoder : Encoder, None or "auto"
        "auto" starts the sentence encoder when it is first needed, if it is installed; None does without.
    exact_rows : int, optional
        Vectors up to which a segment is scanned whole instead of through a graph.
    vectors : SharedVectors, optional
        Where vectors are kept that several machines share, instead of in the folder.
    """

    def __init__(
        self,
        folder: Path,
        encoder: Encoder | Literal["auto"] | None = "auto",
        *,
        exact_rows: int | None = None,
        vectors: "SharedVectors | None" = None,
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._given = encoder
        self._unavailable: str | None = "the index was opened without a sentence encoder" if encoder is None else None
        self._store_options = {} if exact_rows is None else {"exact_rows": exact_rows}
        self._shared = vectors
        self._write_lock = FileLock(self.folder / "writing.lock")
        self._forget_changes()
        self._open()

    # --- state

    @property
    def revision(self) -> int:
        """The revision that the newest commit saved; 0 in a new or reset index."""
        return self._guarded(lambda view: view.revision)

    def __len__(self) -> int:
        return self._guarded(lambda view: len(view.lexical))

    @property
    def encoded(self) -> int:
        """How many papers have a vector; fewer than ``len(index)`` where papers were added without the encoder."""
        return self._guarded(lambda view: len(view.dense))

    def _open(self, *, reset: bool = False) -> None:
        """Open the index; one that cannot be read, or any with ``reset``, is set aside for an empty one."""
        self._view: _View | None = None
        with FileLock(self.folder / "opening.lock"):
            if not reset:
                try:
                    self._engines()
                    self._refresh()
                    return
                except _Damaged:
                    pass
            try:
                self._write_lock.acquire(timeout=_WRITE_TIMEOUT_SECONDS)
            except Timeout as error:
                raise IndexBusy(f"the index in {self.folder} is damaged, and another process holds it") from error
            try:
                self._forget_changes()
                # "damaged-" folders keep their vectors at hand until the next commit
                (self.folder / "index").rename(self.folder / f"damaged-{uuid.uuid4().hex[:12]}")
                self._engines()
                self._refresh()
            finally:
                self._write_lock.release(force=True)

    def _engines(self) -> None:
        root = self.folder / "index"
        (root / "lexical").mkdir(parents=True, exist_ok=True)
        with _damage():
            self._lexical = LexicalIndex(root / "lexical")
        self._dense: DenseStore | SharedVectors = self._shared or DenseStore(
            root / "dense", encoders.DIMENSIONS, **self._store_options
        )

    def _stamp(self) -> tuple[int, int]:
        status = (self.folder / "index" / "lexical" / "meta.json").stat()
        return status.st_mtime_ns, status.st_ino

    def _refresh(self) -> _View:
        """The newest commit; the one at hand if nothing was committed since."""
        for _attempt in range(8):
            with _damage():
                stamp = self._stamp()
                if self._view is not None and self._view.stamp == stamp:
                    return self._view
                lexical = self._lexical.snapshot()
                text = lexical.state()
                state = (
                    json.loads(text) if text else {"format": _FORMAT, "revision": 0, "encoder": None, "segments": []}
                )
                if state["format"] != _FORMAT:
                    raise ValueError(f"index format {state['format']}")
                segments = [SegmentState(**segment) for segment in state["segments"]]
                try:
                    dense = self._dense.open(segments, state["encoder"])
                except FileNotFoundError:
                    if self._stamp() != stamp:
                        continue  # another process committed and cleaned up in between
                    raise
                self._view = _View(lexical, dense, int(state["revision"]), state["encoder"], stamp)
                return self._view
        raise IndexBusy(f"the index in {self.folder} changes faster than it can be opened; try again")

    def _guarded(self, read: Callable[[_View], _T]) -> _T:
        """Read from the newest commit; damage found on the way resets the index and reads from the empty one."""
        # a first failure may come of files that another process replaced; one that stays is damage
        for reset in (False, True):
            try:
                return self._read(read)
            except _Damaged:
                self._open(reset=reset)
        return self._read(read)

    def _read(self, read: Callable[[_View], _T]) -> _T:
        view = self._refresh()
        with _damage():
            return read(view)

    # --- writing

    def _forget_changes(self) -> None:
        self._rows: list[NDArray[Any]] = []
        self._codes: list[NDArray[np.int8]] = []
        self._place: dict[int, int] = {}  # key -> row in the concatenated lists
        self._pending = 0
        self._gone: set[int] = set()
        self._cleared = False

    def _begin(self) -> None:
        if not self._write_lock.is_locked:
            try:
                self._write_lock.acquire(timeout=_WRITE_TIMEOUT_SECONDS)
            except Timeout as error:
                raise IndexBusy(f"another process is writing to the search index in {self.folder}") from error
            self._refresh()
        self._lexical.begin()

    def add(self, documents: Iterable[Document], vectors: NDArray[np.float32] | None = None) -> None:
        """Add papers, or replace those with the same keys; seen after :meth:`commit`.

        Parameters
        ----------
        documents : iterable of Document
        vectors : float32 array (n, 384), optional
            Unit vectors, where they are known; otherwise texts that changed are encoded.

        Raises
        ------
        IndexBusy
            Another process is writing.
        ValueError
            ``vectors`` do not fit the documents.
        """
        self._begin()
        source = iter(documents)
        start = 0
        while batch := list(islice(source, _BATCH)):
            unique = {document.key: place for place, document in enumerate(batch)}  # the last of a key counts
            batch_vectors = None if vectors is None else vectors[start : start + len(batch)]
            start += len(batch)
            if batch_vectors is not None and batch_vectors.shape != (len(batch), encoders.DIMENSIONS):
                raise ValueError(f"vectors have shape {vectors.shape}; one row of 384 per document is needed")  # type: ignore[union-attr]
            places = sorted(unique.values())
            chosen = [batch[place] for place in places]
            self._lexical.add(chosen)
            self._add_vectors(chosen, None if batch_vectors is None else batch_vectors[places])
        if vectors is not None and start != len(vectors):
            raise ValueError(f"vectors have {len(vectors)} rows for {start} documents")

    def _add_vectors(self, documents: Sequence[Document], vectors: NDArray[np.float32] | None) -> None:
        keys = [document.key for document in documents]
        self._drop_vectors(keys)
        encoder = self._encoder()
        texts = [encoded_text(document) for document in documents]
        # whoever brings vectors says that they are the encoder's
        name = encoder.name if encoder is not None else "given"
        digests = [digest(f"{name}\n{text}") for text in texts]
        if vectors is not None:
            codes = quantize(np.asarray(vectors, dtype=np.float32))
        elif encoder is None:
            return
        else:
            known = self._known(keys, digests)
            fresh = [place for place, key in enumerate(keys) if key not in known]
            codes = np.empty((len(keys), encoders.DIMENSIONS), dtype=np.int8)
            if fresh:
                codes[fresh] = quantize(encoder.encode([texts[place] for place in fresh]))
            for place, key in enumerate(keys):
                if key in known:
                    codes[place] = known[key]
        self._rows.append(describe(documents, digests))
        self._codes.append(codes)
        self._place.update({key: self._pending + place for place, key in enumerate(keys)})
        self._pending += len(keys)

    def _known(self, keys: Sequence[int], digests: Sequence[int]) -> dict[int, NDArray[np.int8]]:
        """Codes of texts that were encoded before, also in a damaged index that was set aside."""
        known = self._refresh().dense.known(keys, digests)
        for folder in self.folder.glob("damaged-*/dense"):
            with contextlib.suppress(OSError, ValueError, TypeError, DenseCorrupt):
                states = json.loads((folder / "segments.json").read_text(encoding="utf-8"))
                store = DenseStore(folder, encoders.DIMENSIONS)
                segments = [SegmentState(**state) for state in states]
                known |= store.open(segments, None).known(keys, digests)
        return known

    def _drop_vectors(self, keys: Iterable[int]) -> None:
        for key in keys:
            self._place.pop(key, None)
            self._gone.add(key)

    def remove(self, keys: Iterable[int]) -> None:
        """Remove papers; keys that are not there are no error."""
        self._begin()
        keys = list(keys)
        self._lexical.remove(keys)
        self._drop_vectors(keys)

    def clear(self) -> None:
        """Remove every paper; vectors of texts that are added again before the commit are kept, not encoded anew."""
        self._begin()
        self._lexical.clear()
        self._forget_changes()
        self._cleared = True

    def commit(self, revision: int) -> None:
        """Make everything since the last commit visible together with the store's revision.

        Raises
        ------
        ValueError
            ``revision`` is not an integer from 0.
        """
        if isinstance(revision, bool) or not isinstance(revision, int) or revision < 0:
            raise ValueError(f"revision is {revision!r}; an integer from 0 is needed")
        self._begin()
        view = self._refresh()
        encoder = self._encoder()
        name = view.encoder if encoder is None else encoder.name
        foreign = view.encoder is not None and name != view.encoder
        base = self._dense.open([], name) if self._cleared or foreign else view.dense
        rows = np.concatenate(self._rows) if self._rows else describe([], [])
        codes = np.concatenate(self._codes) if self._codes else np.empty((0, encoders.DIMENSIONS), dtype=np.int8)
        if len(self._place) != len(rows):
            places = np.fromiter(self._place.values(), dtype=np.int64, count=len(self._place))
            rows, codes = rows[places], codes[places]
        self._rows, self._codes = [], []
        if name is None and len(rows):
            name = "given"
        tag = uuid.uuid4().hex[:12]
        segments = self._dense.advance(base, rows, codes, self._gone, tag, name)  # type: ignore[arg-type]
        listed = [asdict(segment) for segment in segments]
        state = {"format": _FORMAT, "revision": revision, "encoder": name, "segments": listed}
        self._lexical.commit(json.dumps(state))  # the one step that counts
        self._forget_changes()
        # the rest is housekeeping that the next commit repeats: what a crash leaves behind is not named by any state
        self._dense.clean(segments)
        for folder in self.folder.glob("damaged-*"):
            shutil.rmtree(folder, ignore_errors=True)
        self._write_lock.release()

    def rollback(self) -> None:
        """Forget what was added and removed since the last commit."""
        self._forget_changes()
        self._lexical.rollback()
        self._write_lock.release()

    # --- reading

    def _encoder(self) -> Encoder | None:
        if self._unavailable is not None:
            return None
        if self._given == "auto":
            try:
                self._given = encoders.shared_encoder()
            except encoders.EncoderUnavailable as error:
                self._unavailable = str(error)
                return None
        return self._given  # type: ignore[return-value]

    def _dense_reader(self, view: _View) -> tuple[Encoder | None, Notice | None]:
        """The encoder, if the commit's vectors can be searched with it, else why not."""
        if not len(view.dense):
            if not len(view.lexical):
                return None, None
            reason = encoders.available() if self._given == "auto" else self._unavailable
            if reason:
                return None, Notice("encoder-missing", f"searched by words only: {reason}")
            return None, Notice("not-encoded", "searched by words only: the papers were indexed without the encoder")
        encoder = self._encoder()
        if encoder is None:
            return None, Notice("encoder-missing", f"searched by words only: {self._unavailable}")
        if view.encoder not in (encoder.name, "given"):
            return None, Notice(
                "not-encoded",
                f"searched by words only: the papers were encoded with {view.encoder}, not {encoder.name}",
            )
        if len(view.dense) < len(view.lexical):
            missing = len(view.lexical) - len(view.dense)
            return encoder, Notice("not-encoded", f"{missing} papers are found by their words only: not encoded yet")
        return encoder, None

    def search(
        self,
        query: str,
        limit: int = 10,
        mode: Mode = "hybrid",
        filters: Filters | None = None,
        *,
        offset: int = 0,
        weight: float = LEXICAL_WEIGHT,
    ) -> SearchResult:
        """The papers that fit a query best, best first, ties by key.

        Parameters
        ----------
        query : str
            Words, a title, a sentence, a slug, or an arXiv id or address; no character is an operator.
        limit, offset : int
            ``offset + limit`` up to 1000.
        mode : {"hybrid", "lexical", "dense"}
            Without encoder or vectors all modes search by words, and ``notice`` says so.
        filters : Filters, optional
        weight : float
            What the words count in a hybrid score, 0 to 1.

        Raises
        ------
        UsageError
            The query is empty or longer than 4,000 characters, or another argument is impossible.
        """
        started = time.perf_counter()
        if not isinstance(query, str) or not query.strip():
            raise UsageError("the query is empty; give words, a title, a sentence or an arXiv id")
        if len(query) > MAX_QUERY_CHARACTERS:
            raise UsageError(f"the query has {len(query)} characters; {MAX_QUERY_CHARACTERS} are the most")
        if mode not in ("hybrid", "lexical", "dense"):
            raise UsageError(f"mode is {mode!r}; hybrid, lexical or dense is needed")
        _check_page(limit, offset)
        if not 0 <= weight <= 1:
            raise UsageError(f"weight is {weight}; a number from 0 to 1 is needed")
        chosen = filters or Filters()
        return self._guarded(lambda view: self._search(view, query, limit, mode, chosen, offset, weight, started))

    def _search(
        self,
        view: _View,
        query: str,
        limit: int,
        mode: Mode,
        filters: Filters,
        offset: int,
        weight: float,
        started: float,
    ) -> SearchResult:
        exact = view.lexical.exact(query, CANDIDATES, filters)
        arxiv_id = normal_arxiv_id(query)
        notice: Notice | None = None
        lexical: dict[int, float] = {}
        dense: dict[int, float] = {}
        if arxiv_id and not exact:
            notice = Notice("unknown-id", f"no paper here has the arXiv id {arxiv_id}")
        if arxiv_id:
            mode = "lexical"  # the paper or nothing: what resembles the digits of an id is no answer
        else:
            encoder: Encoder | None = None
            if mode != "lexical":
                encoder, notice = self._dense_reader(view)
                mode = mode if encoder is not None else "lexical"
            depth = max(CANDIDATES, 2 * (offset + limit))
            if mode != "dense":
                lexical = dict(view.lexical.search(query, depth, filters))
            if encoder is not None:
                vector = encoder.encode([query])[0]
                dense = dict(view.dense.search(vector, depth, filters))
                dense |= view.dense.cosines(vector, sorted({*lexical, *exact} - dense.keys()))
                unscored = sorted(dense.keys() - lexical.keys()) if mode == "hybrid" else []
                if unscored:
                    lexical |= dict(view.lexical.search(query, len(unscored), Filters(keys=unscored)))
        if mode == "hybrid":
            scores = fuse(lexical, dense, weight)
        else:
            scores = dict(lexical if mode == "lexical" else dense)
        top = max(scores.values(), default=0.0)
        scores |= {key: top + 1.0 + scores.get(key, 0.0) for key in exact}  # the paper that was named comes first
        order = sorted(scores, key=lambda key: (-scores[key], key))[offset : offset + limit]
        named = set(exact)
        hits = tuple(Hit(key, scores[key], lexical.get(key), dense.get(key), key in named) for key in order)
        return SearchResult(hits, mode, (time.perf_counter() - started) * 1000, notice)

    def similar(
        self, key: int, limit: int = 10, filters: Filters | None = None, *, text: str | None = None
    ) -> SearchResult:
        """The papers nearest to a paper in meaning, itself left out.

        Parameters
        ----------
        key : int
        limit : int
        filters : Filters, optional
        text : str, optional
            The paper's title and abstract: what is searched by words where the paper has no vector.
        """
        started = time.perf_counter()
        _check_page(limit, 0)
        chosen = filters or Filters()

        def read(view: _View) -> SearchResult:
            vector = view.dense.vector(key)
            notice, mode = None, "dense"
            if vector is not None:
                found = view.dense.search(vector, limit + 1, chosen)
            else:
                notice, mode = Notice("not-encoded", "this paper has no vector yet: compared by words"), "lexical"
                found = view.lexical.search(text, limit + 1, chosen) if text else []
            kept = [(other, score) for other, score in found if other != key][:limit]
            if mode == "dense":
                hits = tuple(Hit(other, score, dense=score) for other, score in kept)
            else:
                hits = tuple(Hit(other, score, lexical=score) for other, score in kept)
            return SearchResult(hits, mode, (time.perf_counter() - started) * 1000, notice)  # type: ignore[arg-type]

        return self._guarded(read)

    def vectors(self, keys: Collection[int]) -> dict[int, NDArray[np.float32]]:
        """The stored unit vectors (384,) of those of the papers that have one."""

        def read(view: _View) -> dict[int, NDArray[np.float32]]:
            found = ((key, view.dense.vector(key)) for key in keys)
            return {key: vector for key, vector in found if vector is not None}

        return self._guarded(read)


def _check_page(limit: int, offset: int) -> None:
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise UsageError(f"limit is {limit!r}; an integer from 1 is needed")
    if not isinstance(offset, int) or isinstance(offset, bool) or offset < 0:
        raise UsageError(f"offset is {offset!r}; an integer from 0 is needed")
    if offset + limit > MAX_DEPTH:
        raise UsageError(f"offset + limit is {offset + limit}; search goes {MAX_DEPTH} papers deep")


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """What reading a damaged index raises, as one exception; the user's own errors pass."""
    try:
        yield
    except (PapertrialError, _Damaged, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except OSError as error:
        if error.errno in _NOT_DAMAGE:
            raise PapertrialError(f"the search index cannot be read: {error}") from error
        raise _Damaged(str(error)) from error
    except (ValueError, TypeError, KeyError, RuntimeError, IndexError, DenseCorrupt) as error:
        raise _Damaged(str(error)) from error
    except BaseException as error:  # a Rust panic inside tantivy reaches Python as a BaseException of its own
        if type(error).__name__ == "PanicException":
            raise _Damaged(str(error)) from error
        raise
