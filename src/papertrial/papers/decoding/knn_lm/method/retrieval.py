"""From neighbours to a distribution over the vocabulary, and its mixture with the model's own."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from papertrial.lm.datastore import Datastore, KeySite, Neighbours
from papertrial.lm.datastore import build_datastore as build_stores

KEYS = {"ffn_input": KeySite("ffn_in", -1), "hidden": KeySite("final_hidden", None)}
"""What the paper compares as keys: the input of the last feed-forward layer, which attention has just written (its
choice), and the vector that the model's own softmax layer reads."""


def build_datastore(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int] | Tensor],
    folder: Path | str | None = None,
    *,
    keys: Sequence[str] = ("ffn_input",),
    window: int,
    stride: int | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    batch_size: int = 16,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, Datastore]:
    """A datastore for each kind of key in :data:`KEYS`, by one forward pass over the training text.

    Parameters
    ----------
    model
        A decoder of transformers.
    sequences
        Token ids of each document, beginning with a token that is not predicted (bos).
    folder, window, stride, dtype, batch_size, on_progress
        See :func:`papertrial.lm.datastore.build_datastore`.

    Returns
    -------
    dict
        By the name of the key.

    Raises
    ------
    ValueError
        For unknown keys, and whatever the builder refuses.
    """
    unknown = [key for key in keys if key not in KEYS]
    if unknown or not keys:
        raise ValueError(f"keys must be some of {', '.join(KEYS)}; got {list(keys)}")
    return build_stores(
        model, sequences, folder, sites={key: KEYS[key] for key in keys}, window=window, stride=stride, dtype=dtype,
        batch_size=batch_size, on_progress=on_progress,
    )  # fmt: skip


def values_of(store: Datastore, near: Neighbours) -> Tensor:
    """The tokens that followed the neighbours, (B, k) int64; those of absent neighbours mean nothing."""
    indices = near.indices.clamp(min=0).numpy()
    return torch.from_numpy(store.values[indices]).long()


def knn_log_probs(scores: Tensor, values: Tensor, vocabulary: int, temperature: float = 1.0) -> Tensor:
    """log p_kNN: the softmax of scores over temperature, summed over neighbours that say the same token.

    Parameters
    ----------
    scores, values
        (B, k) scores of the neighbours (-inf: no neighbour) and the tokens that they vote for.
    vocabulary
        V.
    temperature
        tau > 0. Towards 0 the nearest decides, towards infinity every neighbour has one vote.

    Returns
    -------
    Tensor
        (B, V) float32; -inf for a token that no neighbour says.

    Raises
    ------
    ValueError
        tau <= 0, no neighbours at all, tokens outside the vocabulary, scores that are not a number.

    References
    ----------
    arXiv 2301.02828, equations 2 and 4.
    """
    weights = _weights(scores, values, temperature).exp()
    outside = (values < 0) | (values >= vocabulary)
    if bool(outside.any()):
        raise ValueError(f"values must lie in 0 .. {vocabulary - 1}, got {int(values[outside][0])}")
    return weights.new_zeros(len(weights), vocabulary).scatter_add_(1, values, weights).log()


def knn_target_log_probs(scores: Tensor, values: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log p_kNN of one token per row, (B,): the entry of :func:`knn_log_probs` without the rest of the vocabulary."""
    if targets.shape != scores.shape[:1]:
        raise ValueError(f"targets must be one token per row ({len(scores)},), got {tuple(targets.shape)}")
    weights = _weights(scores, values, temperature)
    return weights.masked_fill(values != targets[:, None], -math.inf).logsumexp(1)


def _weights(scores: Tensor, values: Tensor, temperature: float) -> Tensor:
    if not temperature > 0 or math.isinf(temperature):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if scores.dim() != 2 or 0 in scores.shape or scores.shape != values.shape:
        raise ValueError(
            f"scores and values must be (rows, k) of one shape with at least one neighbour, got {tuple(scores.shape)} "
            f"and {tuple(values.shape)}"
        )
    best = scores.amax(1, keepdim=True)
    if not bool(best.isfinite().all()):
        row = int((~best.isfinite()).nonzero()[0, 0])
        raise ValueError(f"row {row} has no neighbour, or a score that is no number: let the search look at more")
    # the difference is taken first: a distance of thousands over a small tau would not fit into float32
    return ((scores.float() - best.float()) / temperature).log_softmax(1)


def interpolate(lm_log_probs: Tensor, knn_log_probs: Tensor, lam: float) -> Tensor:
    """log((1 - lam) p_LM + lam p_kNN), element by element; lam = 0 and 1 return their part as it is.

    Raises
    ------
    ValueError
        lam outside [0, 1], or shapes that differ.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must lie in [0, 1], got {lam}")
    if lm_log_probs.shape != knn_log_probs.shape:
        raise ValueError(f"the parts have shapes {tuple(lm_log_probs.shape)} and {tuple(knn_log_probs.shape)}")
    if lam == 0:
        return lm_log_probs
    if lam == 1:
        return knn_log_probs
    return torch.logaddexp(lm_log_probs + math.log1p(-lam), knn_log_probs + math.log(lam))


def generalized_log_probs(
    states: Tensor,
    rows: Tensor,
    word_of_row: Tensor,
    vocabulary: int,
    *,
    k: int | None = None,
    temperature: float = 1.0,
    similarity: Literal["l2", "dot"] = "l2",
) -> Tensor:
    """The paper's common form of both heads, written out: log M softmax(mask_k(W (x) h) / tau).

    With the datastore's keys as ``rows`` it is p_kNN; with the unembedding as ``rows``, ``similarity="dot"`` and every
    word one row it is the model's own softmax. Compares with every row, so it is for small N and for checking.

    Parameters
    ----------
    states
        h, (B, D).
    rows, word_of_row
        W (N, D), and the token (N,) that each row counts for: the 0/1 matrix M.
    vocabulary
        V.
    k
        How many of the most similar rows stay; None keeps all.
    similarity
        ``l2``: minus the squared distance; ``dot``: the inner product.

    Returns
    -------
    Tensor
        (B, V).

    References
    ----------
    arXiv 2301.02828, section 3, equation 5.
    """
    if similarity not in ("l2", "dot"):
        raise ValueError(f"similarity must be 'l2' or 'dot', got {similarity!r}")
    if rows.dim() != 2 or word_of_row.shape != rows.shape[:1] or states.shape[-1] != rows.shape[1]:
        raise ValueError(
            f"rows, word_of_row and states must be (N, D), (N,) and (B, D); got {tuple(rows.shape)}, "
            f"{tuple(word_of_row.shape)} and {tuple(states.shape)}"
        )
    if similarity == "dot":
        scores = states @ rows.T
    else:
        scores = -(states[:, None] - rows[None]).square().sum(-1)
    if k is None:
        k = len(rows)
    if not 1 <= k <= len(rows):
        raise ValueError(f"k must lie between 1 and the {len(rows)} rows, got {k}")
    top = scores.topk(k, dim=1)
    return knn_log_probs(top.values, word_of_row[top.indices], vocabulary, temperature)
