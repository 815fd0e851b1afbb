"""Approximate search by faiss: inverted lists, with or without product quantisation, and navigable small worlds."""

import json
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from papertrial.lm.datastore.searching import (
    FLOATS_AT_ONCE,
    Metric,
    Neighbours,
    check_keys,
    check_queries,
    drop_excluded,
    exact_scores,
    faiss_threads,
    in_order,
    pair_scores,
)
from papertrial.lm.datastore.store import file_digest

Kind = Literal["ivfpq", "ivf", "hnsw"]
CODES = 256
"""Centroids of each product quantiser: one byte."""
POINTS_PER_LIST = 64
"""Training keys per k-means list; more cost time and change the lists little."""


class ApproximateSearch:
    """A faiss index over keys; made by :meth:`build` or :meth:`load`.

    ``ivfpq`` keeps one byte per subspace and scores by the quantised key (2011, product quantisation for nearest
    neighbour search); ``ivf`` (k-means lists) and ``hnsw`` (1603.09320) keep whole keys, so that only which neighbours
    are found is approximate.

    Attributes
    ----------
    keys
        The keys (N, D) that were indexed, for exact re-scoring.
    effort
        How much is looked at per query: lists for ``ivf`` and ``ivfpq``, candidates kept for ``hnsw``. May be changed.
    """

    def __init__(self, index: Any, keys: NDArray[np.floating], kind: Kind, metric: Metric, effort: int) -> None:
        self.index, self.keys, self.kind, self.metric, self.effort = index, keys, kind, metric, effort

    @classmethod
    def build(
        cls,
        keys: NDArray[np.floating],
        *,
        kind: Kind = "ivfpq",
        metric: Metric = "l2",
        lists: int | None = None,
        bytes_per_key: int | None = None,
        links: int = 32,
        effort: int | None = None,
        seed: int = 0,
        rows_at_once: int = 2**16,
    ) -> "ApproximateSearch":
        """Train an index on a sample of the keys and add all of them.

        Parameters
        ----------
        keys
            (N, D) float16 or float32.
        lists
            k-means lists (``ivf``, ``ivfpq``); default the power of two nearest 4 sqrt(N), at most N / 39, the number
            of points per list below which faiss calls k-means unreliable.
        bytes_per_key
            Subspaces of ``ivfpq``, a divisor of D; default D / 16, the ratio of 1911.00172 (64 bytes for 1024).
        links
            Neighbours per node of ``hnsw``.
        effort
            See the class; default 32 lists, or 64 candidates.
        seed
            Of the sample and k-means; ``hnsw`` has no such choice and is always built the same way.

        Raises
        ------
        ValueError
            For unknown kinds or sizes that do not fit the keys.
        """
        check_keys(keys, metric)
        count, width = keys.shape
        if kind not in ("ivfpq", "ivf", "hnsw"):
            raise ValueError(f"kind must be 'ivfpq', 'ivf' or 'hnsw', got {kind!r}")
        if lists is None:
            lists = max(1, min(2 ** round(math.log2(4 * math.sqrt(count))), count // 39))
        if not 1 <= lists <= count:
            raise ValueError(f"lists must lie between 1 and the {count} keys, got {lists}")
        subspaces = max(1, width // 16) if bytes_per_key is None else bytes_per_key
        if kind == "ivfpq" and (subspaces < 1 or width % subspaces):
            raise ValueError(f"bytes_per_key must divide the width {width}, got {subspaces}")
        if kind == "ivfpq" and count < CODES:
            raise ValueError(f"product quantisation needs at least {CODES} keys, got {count}: use 'ivf' or 'hnsw'")
        index = _new_index(kind, metric, width, lists, subspaces, links, seed)
        with faiss_threads():
            if kind != "hnsw":
                most = min(count, max(POINTS_PER_LIST * lists, 256 * CODES))
                rows = np.sort(np.random.default_rng(seed).choice(count, most, replace=False))
                index.train(np.asarray(keys[rows], dtype=np.float32))
            for start in range(0, count, rows_at_once):
                index.add(np.asarray(keys[start : start + rows_at_once], dtype=np.float32))
        return cls(index, keys, kind, metric, effort or (64 if kind == "hnsw" else min(32, lists)))

    def search(
        self,
        queries: Tensor,
        k: int,
        *,
        candidates: int | None = None,
        rescore: bool = False,
        exclude: Tensor | None = None,
    ) -> Neighbours:
        """About the k nearest keys.

        Parameters
        ----------
        queries, k, exclude
            As in :meth:`ExactSearch.search <papertrial.lm.datastore.ExactSearch.search>`.
        candidates
            How many the index proposes (default k); only more than k with ``rescore``, which keeps the best k.
        rescore
            Score the candidates by the keys themselves instead of what the index stores.

        Returns
        -------
        Neighbours
            Fewer than k where the visited lists hold fewer: then -inf and -1 at the end.
        """
        proposed = k if candidates is None else candidates
        if proposed < k or (proposed > k and not rescore):
            raise ValueError(f"candidates must be k = {k}, or more together with rescore; got {proposed}")
        queries = check_queries(queries, self.keys, proposed, exclude)
        wanted = proposed + (exclude is not None)
        with faiss_threads():
            values, indices = self.index.search(queries.numpy(), wanted, params=self._effort(wanted))
        scores, found = torch.from_numpy(values), torch.from_numpy(indices)
        scores = (-scores if self.metric == "l2" else scores).masked_fill(found < 0, -torch.inf)
        if rescore:
            scores = exact_scores(self.keys, queries, found, self.metric)
        near = drop_excluded(in_order(Neighbours(scores, found)), exclude, proposed)
        return Neighbours(near.scores[:, :k], near.indices[:, :k])

    def stored_scores(self, queries: Tensor, indices: Tensor) -> Tensor:
        """Scores (B, k) of given keys by what the index stores of them: for ``ivfpq`` the quantised distances.

        Parameters
        ----------
        queries, indices
            (B, D) and (B, k) int64, -1 for none (score -inf).
        """
        queries = check_queries(queries, self.keys, 1, None)
        if self.kind != "hnsw":
            self.index.make_direct_map()
        width = self.keys.shape[1]
        scores = torch.empty(indices.shape, dtype=torch.float32)
        step = max(1, FLOATS_AT_ONCE // max(1, indices.shape[1] * width))
        for start in range(0, len(queries), step):
            rows = slice(start, start + step)
            unique, place = torch.unique(indices[rows].clamp(min=0), return_inverse=True)
            with faiss_threads():
                stored = torch.from_numpy(self.index.reconstruct_batch(unique.numpy()))
            scores[rows] = pair_scores(queries[rows], stored[place], self.metric)
        return scores.masked_fill(indices < 0, -torch.inf)

    def _effort(self, wanted: int) -> Any:
        faiss = _faiss()
        if self.kind == "hnsw":
            return faiss.SearchParametersHNSW(efSearch=max(self.effort, wanted))
        return faiss.SearchParametersIVF(nprobe=self.effort)

    @property
    def nbytes(self) -> int:
        """Bytes of the index as it would be written."""
        faiss = _faiss()
        return int(faiss.serialize_index(self.index).nbytes)

    def save(self, path: Path | str) -> None:
        """Write the index to ``path`` and what it is to ``path.json``; the keys stay where they are."""
        faiss = _faiss()
        path = Path(path)
        faiss.write_index(self.index, str(path))
        card = {
            "kind": self.kind,
            "metric": self.metric,
            "effort": self.effort,
            "keys": list(self.keys.shape),
            "digest": file_digest(path),
        }
        path.with_name(f"{path.name}.json").write_text(json.dumps(card), encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str, keys: NDArray[np.floating]) -> "ApproximateSearch":
        """Read an index that :meth:`save` wrote, over the same keys.

        Raises
        ------
        ValueError
            If the file is not the one that was written, or the keys have another shape.
        """
        faiss = _faiss()
        path = Path(path)
        try:
            card = json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8"))
            if file_digest(path) != card["digest"]:
                raise ValueError(f"{path} is damaged: its digest is not that of the index that was written")
        except (OSError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is no index written by save: {error}") from error
        if list(keys.shape) != card["keys"]:
            raise ValueError(f"{path} indexes keys {tuple(card['keys'])}, got {tuple(keys.shape)}")
        return cls(faiss.read_index(str(path)), keys, card["kind"], card["metric"], card["effort"])


def _new_index(kind: Kind, metric: Metric, width: int, lists: int, subspaces: int, links: int, seed: int) -> Any:
    faiss = _faiss()
    measure = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    if kind == "hnsw":
        return faiss.IndexHNSWFlat(width, links, measure)
    coarse = faiss.IndexFlat(width, measure)
    if kind == "ivf":
        index: Any = faiss.IndexIVFFlat(coarse, width, lists, measure)
    else:
        index = faiss.IndexIVFPQ(coarse, width, lists, subspaces, 8, measure)
        index.pq.cp.seed = seed + 1
    index.cp.seed = seed + 1
    index.cp.max_points_per_centroid = POINTS_PER_LIST
    coarse.this.disown()
    index.own_fields = True
    return index


def _faiss() -> Any:
    import faiss  # its annotations lack half of the module

    return faiss
