"""Searching the catalogue with a method on trial, beside the search that the service is built on.

XTR: every paper is one vector per token, kept under the home folder and brought up to date with the catalogue before
each search; only papers that are new or changed are encoded. It starts more slowly than the default search, since it
brings PyTorch in.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from papertrial.errors import UsageError
from papertrial.home import cache_folder, home

if TYPE_CHECKING:
    import torch

    from papertrial.feed.catalogue import Catalogue, Found
    from papertrial.feed.lexical import Filters
    from papertrial.feed.records import Paper
    from papertrial.papers.retrieval.xtr.method import TokenIndex

TRAINING = "python -m papertrial.papers.retrieval.xtr.train"
TOKENS_RETRIEVED = 1000
"""k' of a search: what the authors' evaluation retrieves for each query token."""
MOST_PAPERS = 100_000
"""Beyond this the vectors, about 50 KB a paper, are too many to keep in memory and to read at every start."""
_VECTORS, _MANIFEST = "vectors.npy", "manifest.json"
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
        Of the trained encoder; default :func:`encoder_folder`.

    Raises
    ------
    UsageError
        If there is no trained encoder, saying how to get one, or the catalogue is too large.
    """

    def __init__(self, catalogue: "Catalogue", say: Callable[[str], None], folder: Path | None = None) -> None:
        folder = encoder_folder() if folder is None else folder
        if not (folder / "xtr.json").is_file():
            raise UsageError(f"the ranker xtr has no trained encoder in {folder}; train one (minutes) with: {TRAINING}")
        count = catalogue.store.count()
        if count > MOST_PAPERS:
            raise UsageError(f"the ranker xtr takes up to {MOST_PAPERS:,} papers, there are {count:,}: use the default")
        say("starting PyTorch and the token encoder")
        from papertrial.papers.retrieval.xtr.method import TokenEncoder

        self.catalogue, self.say = catalogue, say
        self.encoder: TokenEncoder = TokenEncoder.load(folder)
        digest = hashlib.sha256((folder / "xtr.json").read_bytes() + (folder / "trained.safetensors").read_bytes())
        self.encoder_digest = digest.hexdigest()
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
        from papertrial.papers.retrieval.xtr.method import XTRRetriever

        # every candidate is ranked, since the filters apply to papers
        ranked = XTRRetriever(index).search(
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
        """The papers' numbers and the index over them, brought up to the catalogue's revision."""
        import numpy as np
        from filelock import FileLock

        from papertrial.papers.retrieval.xtr.method import TokenIndex

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
            vectors = np.concatenate([entry["vectors"] for entry in documents.values()])
            lengths = [len(entry["vectors"]) for entry in documents.values()]
            if fresh or kept is None or len(documents) != len(kept["documents"]):
                self._write(documents, vectors, lengths, revision)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return list(documents), TokenIndex(vectors, offsets)

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
        return {"documents": documents, "revision": manifest["revision"]}

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

    def _write(self, documents: dict[int, dict[str, Any]], vectors: Any, lengths: list[int], revision: int) -> None:
        """Replace the kept index: the manifest names the file of vectors, so that the two always belong together."""
        import numpy as np

        name = f"{hashlib.sha256(np.ascontiguousarray(vectors).tobytes()).hexdigest()[:16]}-{_VECTORS}"
        np.save(self.cache / name, vectors)
        rows = [[key, entry["digest"], length] for (key, entry), length in zip(documents.items(), lengths, strict=True)]
        manifest = {"encoder": self.encoder_digest, "revision": revision, "vectors": name, "documents": rows}
        temporary = self.cache / f"{_MANIFEST}.tmp"
        temporary.write_text(json.dumps(manifest), encoding="utf-8")
        temporary.replace(self.cache / _MANIFEST)
        for old in self.cache.glob(f"*-{_VECTORS}"):
            if old.name != name:
                old.unlink(missing_ok=True)


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
