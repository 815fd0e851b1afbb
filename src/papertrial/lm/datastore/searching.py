"""Exact nearest neighbours by brute force over chunks, and what every search returns."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Metric = Literal["l2", "ip"]
FLOATS_AT_ONCE = 2**24
"""Bound on the gathered or compared numbers held at a time: 64 MiB."""


class Neighbours(NamedTuple):
    """The k best keys of each query, best first.

    ``scores`` (B, k) float32, higher is nearer: minus the squared distance for ``l2``, the inner product for ``ip``.
    ``indices`` (B, k) int64. Where a search found fewer than k: score -inf, index -1.
    """

    scores: Tensor
    indices: Tensor


class ExactSearch:
    """The k best of all keys, by comparing with every key.

    Parameters
    ----------
    keys
        (N, D) float16 or float32, such as a datastore's memory map: read in chunks, never held as a whole.
    metric
        ``l2`` or ``ip``, see :class:`Neighbours`.
    device
        Where distances are computed: on the CPU by faiss, elsewhere by matrix products of PyTorch.
    rows_at_once
        Keys per chunk.

    Raises
    ------
    ValueError
        For keys that are not a matrix of floats, an unknown metric.
    """

    def __init__(
        self,
        keys: NDArray[np.floating],
        *,
        metric: Metric = "l2",
        device: torch.device | str = "cpu",
        rows_at_once: int = 2**16,
    ) -> None:
        check_keys(keys, metric)
        if rows_at_once < 1:
            raise ValueError(f"rows_at_once must be at least 1, got {rows_at_once}")
        self.keys, self.metric, self.device = keys, metric, torch.device(device)
        self.rows_at_once = rows_at_once

    def search(self, queries: Tensor, k: int, *, exclude: Tensor | None = None) -> Neighbours:
        """The k nearest keys.

        Parameters
        ----------
        queries
            (B, D), any float type.
        k
            1 .. N; with ``exclude`` at most N - 1.
        exclude
            (B,) one key per query that is left out: a token's own entry when the training text itself is queried.
            Negative: none.

        Returns
        -------
        Neighbours
            On the CPU. Scores are computed from differences, so that a duplicate of the query has distance 0; the
            choice at the last place is exact up to rounding of float32 matrix products. Ties stand by index.

        Raises
        ------
        ValueError
            For k out of range, queries of another width or with values that are not finite.
        """
        queries = check_queries(queries, self.keys, k, exclude)
        wanted = k + (exclude is not None)
        best: Neighbours | None = None
        for start in range(0, len(self.keys), self.rows_at_once):
            chunk = np.asarray(self.keys[start : start + self.rows_at_once], dtype=np.float32)
            part = self._of_chunk(queries, chunk, min(wanted, len(chunk)))
            part = Neighbours(part.scores, part.indices + start)
            best = part if best is None else _best_of(best, part, wanted)
        assert best is not None
        scores = exact_scores(self.keys, queries, best.indices, self.metric)
        return drop_excluded(in_order(Neighbours(scores, best.indices)), exclude, k)

    def _of_chunk(self, queries: Tensor, chunk: NDArray[np.float32], k: int) -> Neighbours:
        if self.device.type == "cpu":
            import faiss

            metric = faiss.METRIC_L2 if self.metric == "l2" else faiss.METRIC_INNER_PRODUCT
            with faiss_threads():
                values, indices = faiss.knn(queries.numpy(), chunk, k, metric=metric)
            values = -values if self.metric == "l2" else values
            return Neighbours(torch.from_numpy(values), torch.from_numpy(indices))
        keys = torch.from_numpy(chunk).to(self.device)
        found = []
        for rows in queries.split(max(1, FLOATS_AT_ONCE // len(chunk))):
            scores = rows.to(self.device) @ keys.T
            if self.metric == "l2":  # the query's own length changes no order
                scores = 2 * scores - keys.square().sum(1)
            found.append(scores.topk(k, dim=1))
        return Neighbours(torch.cat([f.values.cpu() for f in found]), torch.cat([f.indices.cpu() for f in found]))


def exact_scores(keys: NDArray[np.floating], queries: Tensor, indices: Tensor, metric: Metric = "l2") -> Tensor:
    """Scores (B, k) float32 of given keys, read from the matrix and computed from differences; -inf for index -1.

    Parameters
    ----------
    keys
        (N, D).
    queries, indices
        (B, D) and (B, k) int64, -1 for none.
    """
    scores = torch.empty(indices.shape, dtype=torch.float32)
    step = max(1, FLOATS_AT_ONCE // max(1, indices.shape[1] * keys.shape[1]))
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        chosen = np.asarray(keys[indices[rows].clamp(min=0).numpy()], dtype=np.float32)  # (b, k, D)
        scores[rows] = pair_scores(queries[rows].float().cpu(), torch.from_numpy(chosen), metric)
    return scores.masked_fill(indices < 0, -torch.inf)


def pair_scores(queries: Tensor, keys: Tensor, metric: Metric) -> Tensor:
    """Scores (B, k) of each query (B, D) against keys (B, k, D) of its own."""
    if metric == "ip":
        return torch.einsum("bd,bkd->bk", queries, keys)
    return -(queries[:, None] - keys).square_().sum(-1)


def in_order(found: Neighbours) -> Neighbours:
    """Best first; equal scores by index, absent ones last."""
    by_index = found.indices.masked_fill(found.indices < 0, torch.iinfo(torch.long).max).argsort(dim=1, stable=True)
    scores, indices = found.scores.gather(1, by_index), found.indices.gather(1, by_index)
    order = scores.argsort(dim=1, descending=True, stable=True)
    return Neighbours(scores.gather(1, order), indices.gather(1, order))


def drop_excluded(found: Neighbours, exclude: Tensor | None, k: int) -> Neighbours:
    """The first k of k + 1 without each query's excluded key; where it is not among them, without the last."""
    if exclude is None:
        return found
    own = (found.indices == exclude.cpu()[:, None]) & (exclude.cpu()[:, None] >= 0)
    order = own.int().argsort(dim=1, stable=True)[:, :k]
    return Neighbours(found.scores.gather(1, order), found.indices.gather(1, order))


def _best_of(a: Neighbours, b: Neighbours, k: int) -> Neighbours:
    scores, indices = torch.cat([a.scores, b.scores], 1), torch.cat([a.indices, b.indices], 1)
    top = scores.topk(min(k, scores.shape[1]), dim=1)
    return Neighbours(top.values, indices.gather(1, top.indices))


def check_keys(keys: Any, metric: str) -> None:
    """ValueError unless ``keys`` is a matrix of floats with a row and ``metric`` is known."""
    if metric not in ("l2", "ip"):
        raise ValueError(f"metric must be 'l2' or 'ip', got {metric!r}")
    if not isinstance(keys, np.ndarray) or keys.ndim != 2 or keys.dtype.kind != "f" or 0 in keys.shape:
        given = f"{keys.dtype} {tuple(keys.shape)}" if isinstance(keys, np.ndarray) else type(keys).__name__
        raise ValueError(f"keys must be a float array (N, D) with at least one row, got {given}")


def check_queries(
    queries: Tensor, keys: NDArray[np.floating], k: int, exclude: Tensor | None, *, at_most: int | None = None
) -> Tensor:
    """The queries as contiguous float32 on the CPU, or ValueError."""
    if queries.dim() != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(f"queries must be (B, {keys.shape[1]}) like the keys, got {tuple(queries.shape)}")
    if exclude is not None and exclude.shape != queries.shape[:1]:
        raise ValueError(f"exclude must name one key per query ({len(queries)},), got {tuple(exclude.shape)}")
    most = (len(keys) if at_most is None else at_most) - (exclude is not None)
    if not 1 <= k <= most:
        raise ValueError(f"k must lie between 1 and {most}, the keys there are to find; got {k}")
    queries = queries.detach().float().cpu().contiguous()
    if not bool(queries.isfinite().all()):
        raise ValueError("queries hold values that are not finite")
    return queries


@contextlib.contextmanager
def faiss_threads() -> Iterator[None]:
    """faiss with as many threads as PyTorch has, and its own number again afterwards."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(torch.get_num_threads())
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
