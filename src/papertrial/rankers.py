"""Searching the catalogue with a method on trial, beside the search that the service is built on.

XTR: every paper is one vector per token, kept under the home folder and brought up to date with the catalogue before
each search; only papers that are new or changed are encoded. The tokens are those of the sentence encoder as it is; one
that was trained further (``python -m papertrial.papers.retrieval.xtr.train``) takes its place where there is one;
trained on docstrings alone it ranked papers a little worse than untrained (``benchmarks/search_quality.py``). It
starts more slowly than the default search, since it brings PyTorch in.
"""

import hashlib
import importlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from papertrial.errors import UsageError
from papertrial.home import cache_folder, home

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from papertrial.feed.catalogue import Catalogue, Found
    from papertrial.feed.lexical import Filters
    from papertrial.feed.records import Paper
    from papertrial.papers.retrieval.xtr.method import TokenEncoder, TokenIndex

TOKENS_RETRIEVED = 1000
"""k' of a search: what the authors' evaluation retrieves for each query token."""
MOST_PAPERS = 30_000
"""Beyond this the vectors, some 150 KB a paper without a projection, are too many to be worth their disk."""
LONGEST = 256
"""Tokens of a paper that are read; what the sentence encoder was made for."""
_VECTORS, _SEARCH, _MANIFEST = "vectors.npy", "search.faiss", "manifest.json"
_METHOD = "papertrial.papers.retrieval.xtr.method"
_BATCH = 256


def encoder_folder() -> Path:
    """Where the trained encoder is kept."""
    return home() / "models" / "xtr"


class XTRRanker:
    """Token retrieval over the catalogue.

    Parameters
    ----------
    catalogue
        Open and prepared.
    say
        Hears what is being done, a line at a time.
    folder
        Of an encoder trained further; default :func:`encoder_folder`. Where there is none, the sentence encoder's own
        tokens are used.

    Raises
    ------
    UsageError
        If the method or the sentence encoder is not installed, the trained encoder is damaged, or the catalogue is too
        large.
    """

    def __init__(self, catalogue: "Catalogue", say: Callable[[str], None], folder: Path | None = None) -> None:
        folder = encoder_folder() if folder is None else folder
        count = catalogue.store.count()
        if count > MOST_PAPERS:
            raise UsageError(f"the ranker xtr takes up to {MOST_PAPERS:,} papers, there are {count:,}: use the default")
        say("starting PyTorch and the token encoder")
        self.method = _method()
        self.catalogue, self.say = catalogue, say
        if (folder / "xtr.json").is_file():
            self.encoder: TokenEncoder = self.method.TokenEncoder.load(folder)
            own = (folder / "xtr.json").read_bytes() + (folder / "trained.safetensors").read_bytes()
        else:
            from papertrial.lm.encoders import load_minilm

            self.encoder = self.method.TokenEncoder(load_minilm(), None, max_length=LONGEST).eval()
            own = f"untrained {LONGEST} {self.encoder.checkpoint.digest}".encode()
        self.encoder_digest = hashlib.sha256(own).hexdigest()
        database = hashlib.sha256(str(catalogue.store.engine.url).encode()).hexdigest()[:12]
        self.cache = cache_folder("xtr") / database

    def search(self, query: str, limit: int, filters: "Filters") -> "Found":
        """The papers that fit the query best, with their scores (means of cosines over the query's tokens).

        Raises
        ------
        UsageError
            For an empty query or catalogue.
        """
        from papertrial.feed.catalogue import Found
        from papertrial.feed.search import Hit, SearchResult

        if not query.strip():
            raise UsageError("the query is empty; give words, a title or a sentence")
        keys, index = self._index()
        started = time.perf_counter()
        # every candidate is ranked, since the filters apply to papers
        ranked = self.method.XTRRetriever(index).search(
            self.encoder.encode([query.lower()])[0], k_prime=TOKENS_RETRIEVED, top=len(keys)
        )
        papers: list[Paper] = []
        hits: list[Hit] = []
        for start in range(0, len(ranked), _BATCH):
            part = ranked[start : start + _BATCH]
            found = self.catalogue.store.by_ids([keys[hit.document] for hit in part])
            for hit, paper in zip(part, found, strict=True):
                if paper is not None and _passes(paper, filters) and len(hits) < limit:
                    hits.append(Hit(paper.id, hit.score))
                    papers.append(paper)
            if len(hits) == limit:
                break
        took = (time.perf_counter() - started) * 1000
        return Found(SearchResult(tuple(hits), "xtr", took), tuple(papers), None)  # type: ignore[arg-type]

    def _index(self) -> tuple[list[int], "TokenIndex"]:
        """The papers' numbers and the index over them, brought up to the catalogue's revision.

        Vectors, and the approximate search over many of them, are kept until the catalogue changes.
        """
        import numpy as np
        from filelock import FileLock

        self.cache.mkdir(parents=True, exist_ok=True)
        with FileLock(self.cache / ".lock"):
            kept = self._read()
            documents, revision = self._changed(kept)
            fresh = [key for key, entry in documents.items() if "vectors" not in entry]
            if fresh:
                self.say(
                    f"encoding {len(fresh):,} of {len(documents):,} papers for the ranker xtr (kept for next time)"
                )
                self._encode(documents, fresh)
            if not documents:
                raise UsageError("the catalogue is empty; `papertrial ingest` fills it")
            lengths = [len(entry["vectors"]) for entry in documents.values()]
            if kept is None or fresh or len(documents) != len(kept["documents"]):
                vectors: NDArray[np.float16] = np.concatenate([entry["vectors"] for entry in documents.values()])
                name = f"{hashlib.sha256(vectors.data).hexdigest()[:16]}-{_VECTORS}"
                temporary = self.cache / f"temporary-{_VECTORS}"
                np.save(temporary, vectors)
                temporary.replace(self.cache / name)  # another process may be reading the file it replaces
            else:
                vectors, name = kept["vectors"], kept["name"]
            if kept is None or (name, revision) != (kept["name"], kept["revision"]):
                self._write(documents, name, lengths, revision)
            offsets = np.concatenate([[0], np.cumsum(lengths)])
            search = self.cache / name.replace(_VECTORS, _SEARCH)
            index = self.method.TokenIndex(vectors, offsets, kept=search)
        return list(documents), index

    def _read(self) -> dict[str, Any] | None:
        """The kept index of this encoder, None if there is none or it is damaged."""
        import numpy as np

        try:
            manifest = json.loads((self.cache / _MANIFEST).read_text(encoding="utf-8"))
            vectors = np.load(self.cache / manifest["vectors"], mmap_mode="r", allow_pickle=False)
            if manifest["encoder"] != self.encoder_digest or sum(d[2] for d in manifest["documents"]) != len(vectors):
                return None
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return None
        documents, start = {}, 0
        for key, digest, length in manifest["documents"]:
            documents[key] = {"digest": digest, "vectors": vectors[start : start + length]}
            start += length
        return {
            "documents": documents, "revision": manifest["revision"], "vectors": vectors, "name": manifest["vectors"],
        }  # fmt: skip

    def _changed(self, kept: dict[str, Any] | None) -> tuple[dict[int, dict[str, Any]], int]:
        """All papers by number, those whose text is as it was with their vectors; and the catalogue's revision."""
        documents: dict[int, dict[str, Any]] = dict(kept["documents"]) if kept else {}
        revision = kept["revision"] if kept else 0
        while True:
            changes, newest = self.catalogue.store.changes_since(revision)
            if not changes:
                return documents, revision
            for change in changes:
                if change.paper is None:
                    documents.pop(change.id, None)
                    continue
                text = _text(change.paper)
                digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]
                if documents.get(change.id, {}).get("digest") != digest:
                    documents[change.id] = {"digest": digest, "text": text}
            revision = newest

    def _encode(self, documents: dict[int, dict[str, Any]], fresh: Sequence[int]) -> None:
        import numpy as np

        for start in range(0, len(fresh), _BATCH):
            keys = fresh[start : start + _BATCH]
            found: list[torch.Tensor] = self.encoder.encode([documents[key]["text"].lower() for key in keys])
            for key, vectors in zip(keys, found, strict=True):
                documents[key]["vectors"] = vectors.numpy().astype(np.float16)
            if len(fresh) > _BATCH:
                self.say(f"encoded {min(start + _BATCH, len(fresh)):,} of {len(fresh):,}")

    def _write(self, documents: dict[int, dict[str, Any]], name: str, lengths: list[int], revision: int) -> None:
        """Replace the manifest, which names the file of vectors, so that the two always belong together."""
        rows = [[key, entry["digest"], length] for (key, entry), length in zip(documents.items(), lengths, strict=True)]
        manifest = {"encoder": self.encoder_digest, "revision": revision, "vectors": name, "documents": rows}
        temporary = self.cache / f"{_MANIFEST}.tmp"
        temporary.write_text(json.dumps(manifest), encoding="utf-8")
        temporary.replace(self.cache / _MANIFEST)
        for old in self.cache.glob("*-*"):
            if not old.name.startswith(name.removesuffix(_VECTORS)):
                old.unlink(missing_ok=True)


def _method() -> Any:
    """The paper's method; its folder may have been removed."""
    try:
        return importlib.import_module(_METHOD)
    except ModuleNotFoundError as error:
        if error.name is not None and _METHOD.startswith(error.name):
            raise UsageError(
                "the ranker xtr is the method of the paper xtr, whose folder is not here: search without --ranker"
            ) from error
        raise


def _text(paper: "Paper") -> str:
    return f"{paper.title.strip()}\n{(paper.abstract or paper.summary or '').strip()}".strip()


def _passes(paper: "Paper", filters: "Filters") -> bool:
    """As in the default search: undated papers pass no date filter."""
    day = paper.published
    return (
        (filters.families is None or paper.family in filters.families)
        and (filters.since is None or (day is not None and day >= filters.since))
        and (filters.until is None or (day is not None and day <= filters.until))
        and (filters.in_scope is None or (paper.slug is not None) == filters.in_scope)
        and (filters.keys is None or paper.id in filters.keys)
    )
