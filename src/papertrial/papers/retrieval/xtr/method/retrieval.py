"""From retrieved tokens to ranked documents: XTR, and ColBERT, which reads the documents again."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from papertrial.lm.datastore import Neighbours
from papertrial.papers.retrieval.xtr.method.imputation import Imputation, missing_similarities
from papertrial.papers.retrieval.xtr.method.index import TokenIndex


@dataclass(frozen=True)
class Hit:
    """A ranked document.

    ``document`` is its place in the index. ``retrieved`` (n,) is the token of the index that each query token was
    matched with, -1 where its score was imputed.
    """

    document: int
    score: float
    retrieved: tuple[int, ...]


@dataclass(frozen=True)
class Aggregated:
    """Scores of all candidates, best first.

    ``documents`` (C,) int64, ``scores`` (C,), ``values`` (C, n) what each query token gives, ``retrieved`` (C, n) the
    token that gave it or -1.
    """

    documents: Tensor
    scores: Tensor
    values: Tensor
    retrieved: Tensor


def aggregate(near: Neighbours, document_of: Tensor, impute: Imputation = "last") -> Aggregated:
    """Documents scored from retrieved tokens alone.

    The value of a query token for a document is its best retrieved similarity to a token of that document. Where it
    retrieved none, it is imputed: nothing it retrieved is below its last score, so no token of the document is above.

    Parameters
    ----------
    near
        (n, k') token similarities and tokens, best first; index -1 or a score that is no number: skipped.
    document_of
        (N,) owner of each token.
    impute
        ``last``: the k'-th score, an upper bound (the paper's); for comparison ``zero``, ``mean`` of the query token's
        retrieved scores, or ``power_law`` through them, read further down: see :mod:`.imputation`.

    Returns
    -------
    Aggregated
        Scores are means over all n query tokens. Ties stand by document.

    Raises
    ------
    ValueError
        For a query token that retrieved nothing, or an ``impute`` that there is not.

    References
    ----------
    arXiv 2304.01982, section 3.2, equation 4.
    """
    usable = (near.indices >= 0) & near.scores.isfinite()
    if not bool(usable.any(1).all()):
        raise ValueError("a query token retrieved nothing: let the search look at more")
    scores = near.scores.float()
    missing = missing_similarities(scores, usable, document_of, impute)
    rows = torch.arange(len(scores))[:, None].expand_as(near.indices)[usable]
    found, tokens = scores[usable], near.indices[usable]
    documents, column = document_of[tokens].unique(return_inverse=True)
    # of each pair of query token and document, the first in the order of scores is its best
    order = found.argsort(descending=True, stable=True)
    pairs, first = np.unique((rows * len(documents) + column)[order].numpy(), return_index=True)
    best = torch.full((len(scores), len(documents)), -torch.inf)
    best.view(-1)[torch.from_numpy(pairs)] = found[order][torch.from_numpy(first)]
    retrieved = torch.full((len(scores), len(documents)), -1)
    retrieved.view(-1)[torch.from_numpy(pairs)] = tokens[order][torch.from_numpy(first)]
    values = torch.where(best.isneginf(), missing[:, None], best).T  # (C, n)
    means = values.mean(1)
    ranking = means.argsort(descending=True, stable=True)
    return Aggregated(documents[ranking], means[ranking], values[ranking], retrieved.T[ranking])


class XTRRetriever:
    """Token retrieval, then scoring from what was retrieved; no vector of a document is read again."""

    def __init__(self, index: TokenIndex) -> None:
        self.index = index

    def search(self, query: Tensor, *, k_prime: int = 1000, top: int = 10, impute: Imputation = "last") -> list[Hit]:
        """The ``top`` documents for a query.

        Parameters
        ----------
        query
            (n, d) token vectors.
        k_prime
            Tokens that each query token retrieves; all of the index if it holds fewer.
        """
        _check(k_prime, top)
        found = aggregate(self.index.search(query, k_prime), self.index.document_of, impute)
        rows = zip(found.documents.tolist(), found.scores.tolist(), found.retrieved.tolist(), strict=True)
        return [Hit(document, score, tuple(tokens)) for document, score, tokens in list(rows)[:top]]


class ColBERTRetriever:
    """Token retrieval for candidates, then all token vectors of every candidate and full MaxSim."""

    def __init__(self, index: TokenIndex) -> None:
        self.index = index

    def search(self, query: Tensor, *, k_prime: int = 1000, top: int = 10) -> list[Hit]:
        """The ``top`` documents for a query (n, d); see :meth:`XTRRetriever.search`."""
        _check(k_prime, top)
        near = self.index.search(query, k_prime)
        candidates = self.index.document_of[near.indices[near.indices >= 0]].unique()
        starts, ends = (torch.from_numpy(self.index.offsets)[candidates + step] for step in (0, 1))
        lengths = ends - starts
        # the candidates' tokens, one document after the other
        rows = torch.arange(int(lengths.sum())) + (starts - lengths.cumsum(0) + lengths).repeat_interleave(lengths)
        gathered = torch.from_numpy(np.asarray(self.index.vectors[rows.numpy()], dtype=np.float32))
        best = torch.segment_reduce(gathered @ query.float().cpu().T, "max", lengths=lengths, axis=0)  # (C, n)
        scores = best.mean(1)
        hits = []
        for place in scores.argsort(descending=True, stable=True)[:top].tolist():
            document = int(candidates[place])
            matched = (query.float().cpu() @ self.index.document(document).T).argmax(1) + int(starts[place])
            hits.append(Hit(document, float(scores[place]), tuple(matched.tolist())))
        return hits


def token_recall(near: Neighbours, document_of: Tensor, relevant: int, k: int) -> float:
    """Share of query tokens with a token of the relevant document among their first k retrieved tokens."""
    if not 1 <= k <= near.indices.shape[1]:
        raise ValueError(f"k must lie between 1 and the {near.indices.shape[1]} retrieved tokens, got {k}")
    first = near.indices[:, :k]
    owners = document_of[first.clamp(min=0)].masked_fill(first < 0, -1)
    return float((owners == relevant).any(1).float().mean())


def multiply_adds(
    mode: Literal["xtr", "colbert"], *, n: int, k_prime: int, candidates: int, candidate_tokens: int, dim: int
) -> int:
    """Arithmetic of the scoring stage, after token retrieval.

    ColBERT: an inner product of width ``dim`` between each query token and every token of the candidates. XTR has no
    products; counted as one operation each are the comparison of every retrieved score with its document's best so far,
    and the addition of every query token's value to every candidate.

    Parameters
    ----------
    n, k_prime
        Query tokens, and tokens retrieved by each.
    candidates, candidate_tokens
        Candidate documents, and tokens of all of them together.
    dim
        Width of a token vector.

    References
    ----------
    arXiv 2304.01982, section 3.3.
    """
    if min(n, k_prime, candidates, candidate_tokens, dim) < 1:
        raise ValueError("n, k_prime, candidates, candidate_tokens and dim must be at least 1")
    if mode == "colbert":
        return n * candidate_tokens * dim
    if mode == "xtr":
        return n * k_prime + n * candidates
    raise ValueError(f"mode must be 'xtr' or 'colbert', got {mode!r}")


def _check(k_prime: int, top: int) -> None:
    if k_prime < 1 or top < 1:
        raise ValueError(f"k_prime and top must be at least 1, got {k_prime} and {top}")
