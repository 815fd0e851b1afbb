"""Scores of documents by their token vectors, and the losses that train them."""

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def token_similarities(queries: Tensor, documents: Tensor, query_mask: Tensor, document_mask: Tensor) -> Tensor:
    """P: inner products of every query token with every document token.

    Parameters
    ----------
    queries, query_mask
        (B, n, d) vectors and (B, n) 0/1.
    documents, document_mask
        (C, m, d) and (C, m).

    Returns
    -------
    Tensor
        (B, n, C, m); -inf where either token is padding.

    Raises
    ------
    ValueError
        Widths or masks that do not fit, a query or a document without a token.
    """
    if queries.dim() != 3 or documents.dim() != 3 or queries.shape[2] != documents.shape[2]:
        raise ValueError(
            f"queries and documents must be (B, n, d) and (C, m, d), got {tuple(queries.shape)} and "
            f"{tuple(documents.shape)}"
        )
    for name, vectors, mask in (("query", queries, query_mask), ("document", documents, document_mask)):
        if mask.shape != vectors.shape[:2]:
            raise ValueError(f"{name}_mask must be {tuple(vectors.shape[:2])}, got {tuple(mask.shape)}")
        if not bool(mask.bool().any(1).all()):
            raise ValueError(f"a {name} has no token: {name}_mask has a row of zeros")
    similarities = torch.einsum("bnd,cmd->bncm", queries, documents)
    real = query_mask.bool()[:, :, None, None] & document_mask.bool()[None, None]
    return similarities.masked_fill(~real, -math.inf)


def maxsim(queries: Tensor, documents: Tensor, query_mask: Tensor, document_mask: Tensor) -> Tensor:
    """ColBERT's score (B, C): the mean over query tokens of the best similarity to a token of the document.

    Arguments as in :func:`token_similarities`.

    References
    ----------
    arXiv 2304.01982, equation 1 (arXiv 2004.12832 with a mean instead of a sum).
    """
    best = token_similarities(queries, documents, query_mask, document_mask).amax(3)  # (B, n, C)
    real = query_mask.bool()[:, :, None]
    return best.masked_fill(~real, 0.0).sum(1) / real.sum(1)


def retrieved_tokens(similarities: Tensor, k_train: int) -> Tensor:
    """A: which document tokens each query token retrieves, its ``k_train`` best of all tokens in the batch.

    Parameters
    ----------
    similarities
        (B, n, C, m) of :func:`token_similarities`.
    k_train
        1 up to the number of document tokens in the batch.

    Returns
    -------
    Tensor
        (B, n, C, m) bool with ``k_train`` true entries for each query token, none for padding.
    """
    flat = similarities.detach().flatten(2)
    tokens = int(flat.isfinite().sum(2).amax())
    if not 1 <= k_train <= tokens:
        raise ValueError(f"k_train must lie between 1 and the {tokens} document tokens in the batch, got {k_train}")
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(2, flat.topk(k_train, dim=2).indices, True)
    return (chosen & flat.isfinite()).view_as(similarities)


def xtr_score(queries: Tensor, documents: Tensor, query_mask: Tensor, document_mask: Tensor, k_train: int) -> Tensor:
    """The training score f_XTR (B, C): the best retrieved similarity, averaged over query tokens that retrieved one.

    Only retrieved tokens get a gradient; the choice itself has none. A query token that retrieved no token of a
    document adds nothing to it, and a document of which none was retrieved scores 0.

    Parameters
    ----------
    queries, documents, query_mask, document_mask
        As in :func:`token_similarities`; the documents of the whole mini-batch, negatives included.
    k_train
        Tokens that each query token retrieves from the mini-batch.

    References
    ----------
    arXiv 2304.01982, section 3.1, equation 3.
    """
    similarities = token_similarities(queries, documents, query_mask, document_mask)
    chosen = retrieved_tokens(similarities, k_train)
    reached = chosen.any(3)  # (B, n, C)
    best = similarities.masked_fill(~chosen, -math.inf).amax(3)
    return best.masked_fill(~reached, 0.0).sum(1) / reached.sum(1).clamp(min=1)


def xtr_loss(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor,
    document_mask: Tensor,
    *,
    k_train: int,
    scale: float,
    positives: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the positive among all documents of the mini-batch, under the XTR score: mean over queries.

    Parameters
    ----------
    queries, documents, query_mask, document_mask, k_train
        As in :func:`xtr_score`; C >= B.
    scale
        Inverse temperature of the scores, which lie in [-1, 1].
    positives
        (B,) place of each query's document; default query b's is document b, and further ones are negatives.
    """
    scores = xtr_score(queries, documents, query_mask, document_mask, k_train)
    return _contrast(scores, scale, positives)


def colbert_loss(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor,
    document_mask: Tensor,
    *,
    scale: float,
    positives: Tensor | None = None,
) -> Tensor:
    """The same loss under :func:`maxsim`, the objective that XTR replaces."""
    return _contrast(maxsim(queries, documents, query_mask, document_mask), scale, positives)


def _contrast(scores: Tensor, scale: float, positives: Tensor | None) -> Tensor:
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if positives is None:
        if scores.shape[1] < scores.shape[0]:
            raise ValueError(f"{scores.shape[0]} queries need a document each, got {scores.shape[1]} documents")
        positives = torch.arange(len(scores), device=scores.device)
    return cross_entropy(scale * scores, positives)
