"""Training a token encoder on pairs of a query and its document, on states kept from below the trained layers."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from papertrial.lm.schedules import warmup_cosine
from papertrial.lm.training import TrainingReport, adamw, train
from papertrial.papers.retrieval.xtr.method.encoder import TokenEncoder
from papertrial.papers.retrieval.xtr.method.index import TokenIndex
from papertrial.papers.retrieval.xtr.method.retrieval import aggregate
from papertrial.papers.retrieval.xtr.method.scoring import colbert_loss, xtr_loss

Objective = Literal["xtr", "colbert"]
States = Sequence[NDArray[np.floating]]
Padded = tuple[Tensor, Tensor]


def pad_states(states: Sequence[NDArray[np.floating]]) -> Padded:
    """Float32 states (B, S, D) and mask (B, S) of ragged (S_b, D), padded on the right."""
    longest = max(len(rows) for rows in states)
    values = torch.zeros(len(states), longest, states[0].shape[1])
    mask = torch.zeros(len(states), longest, dtype=torch.long)
    for row, part in enumerate(states):
        values[row, : len(part)] = torch.from_numpy(np.asarray(part, dtype=np.float32))
        mask[row, : len(part)] = 1
    return values, mask


@torch.no_grad()
def vectors_of(encoder: TokenEncoder, states: States, *, batch_size: int = 64) -> list[Tensor]:
    """Token vectors (S, dim) of texts whose states below the trained layers are known, on the CPU."""
    order = sorted(range(len(states)), key=lambda place: len(states[place]))
    found: list[Tensor] = [torch.empty(0)] * len(states)
    device = encoder.device
    encoder.eval()
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        values, mask = pad_states([states[place] for place in places])
        vectors = encoder(values.to(device), mask.to(device)).cpu()
        for row, place in enumerate(places):
            found[place] = vectors[row, : len(states[place])]
    return found


def train_encoder(
    encoder: TokenEncoder,
    queries: States,
    documents: States,
    *,
    objective: Objective,
    steps: int,
    generator: torch.Generator,
    k_train: int | None = None,
    negatives: Sequence[int] | None = None,
    batch_size: int = 32,
    lr: float = 5e-4,
    scale: float = 20.0,
    checkpoint: Path | None = None,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> TrainingReport:
    """Train the upper layers and the projection in place; the other documents of a batch are the negatives.

    With ``negatives``, a batch holds one further document for each of its queries.

    Parameters
    ----------
    encoder
        With at least a projection or a layer to train.
    queries, documents
        ``encoder.states(texts)`` of both, taken before any training; query i belongs to document i.
    objective
        ``xtr``, or ``colbert``, which lacks only the retrieval within the batch.
    steps, batch_size, lr
        Of AdamW; warm-up over a tenth of the steps, then a cosine to a tenth. Batches go through all pairs in a random
        order before one comes again.
    generator
        On the CPU; decides the batches.
    k_train
        Tokens that each query token retrieves in the batch (``xtr`` only).
    negatives
        For each query the place of a document that is not its own, such as :func:`mine_negatives` finds.
    scale
        Inverse temperature of the scores.

    References
    ----------
    arXiv 2304.01982, section 3.1.
    """
    if objective not in ("xtr", "colbert"):
        raise ValueError(f"objective must be 'xtr' or 'colbert', got {objective!r}")
    if (k_train is None) == (objective == "xtr"):
        raise ValueError(f"k_train belongs to the objective 'xtr' and only there; got {k_train} for {objective!r}")
    if len(queries) != len(documents) or not 2 <= batch_size <= len(queries):
        raise ValueError(
            f"batch_size must lie between 2 and the number of pairs, got {batch_size} for {len(queries)} queries and "
            f"{len(documents)} documents"
        )
    if negatives is not None:
        _check_negatives(negatives, len(documents))

    def batches() -> Iterator[tuple[Padded, Padded]]:
        while True:
            order = torch.randperm(len(queries), generator=generator).tolist()
            for start in range(0, len(order) - batch_size + 1, batch_size):
                places = order[start : start + batch_size]
                shown = places if negatives is None else [*places, *(negatives[p] for p in places)]
                yield pad_states([queries[p] for p in places]), pad_states([documents[p] for p in shown])

    def loss(model: nn.Module, batch: tuple[Padded, Padded]) -> Tensor:
        (query_states, query_mask), (document_states, document_mask) = batch
        vectors = model(query_states, query_mask), model(document_states, document_mask)
        if k_train is None:
            return colbert_loss(*vectors, query_mask, document_mask, scale=scale)
        return xtr_loss(*vectors, query_mask, document_mask, k_train=k_train, scale=scale)

    return train(
        encoder,
        batches(),
        steps=steps,
        optimizer=adamw(lr, weight_decay=0.01, betas=(0.9, 0.999)),
        schedule=warmup_cosine(steps, steps // 10),
        loss=loss,
        dropout=False,  # the same batches give the same gradients under either objective
        checkpoint=checkpoint,
        on_progress=on_progress,
    )


@torch.no_grad()
def mine_negatives(encoder: TokenEncoder, queries: States, documents: States, *, k_prime: int = 256) -> list[int]:
    """For each query the document that the encoder ranks highest although another is right.

    Parameters
    ----------
    encoder
        As it is before training.
    queries, documents
        As in :func:`train_encoder`; at least two documents.
    k_prime
        Tokens retrieved per query token. Where they are all of the right document, more are retrieved.

    Returns
    -------
    list
        Places of documents.
    """
    if len(queries) != len(documents) or len(documents) < 2:
        raise ValueError(
            f"every query needs its document and there must be two, got {len(queries)} queries and {len(documents)} "
            "documents"
        )
    index = TokenIndex.build(vectors_of(encoder, documents), kind="exact", device=encoder.device)
    found = []
    for own, query in enumerate(vectors_of(encoder, queries)):
        deep = k_prime
        while True:
            ranking = aggregate(index.search(query, deep), index.document_of).documents.tolist()
            others = [place for place in ranking if place != own]
            if others:
                break
            deep *= 4  # ends with the whole index, which has two documents
        found.append(others[0])
    return found


def _check_negatives(negatives: Sequence[int], documents: int) -> None:
    if len(negatives) != documents:
        raise ValueError(f"negatives must name one document for each of {documents} queries, got {len(negatives)}")
    for own, place in enumerate(negatives):
        if place == own or not 0 <= place < documents:
            raise ValueError(
                f"negatives[{own}] is {place}: it must be the place of another document, 0 .. {documents - 1}"
            )
