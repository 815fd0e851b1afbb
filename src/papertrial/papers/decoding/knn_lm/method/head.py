"""The parametric stand-in for retrieval: a softmax layer with several rows per word."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from papertrial.lm.datastore import Datastore
from papertrial.lm.losses import Loss
from papertrial.lm.schedules import warmup_cosine
from papertrial.lm.training import TrainingReport, adamw, train


class OverparameterizedHead(nn.Module):
    """p(w) = mass of w's rows in a softmax over N rows; N may be several times the vocabulary.

    Parameters
    ----------
    weight
        W, (N, D).
    word_of_row
        The word (N,) each row counts for; every word of 0 .. V - 1 has at least one.
    bias
        (N,), None for none.

    Raises
    ------
    ValueError
        For shapes that do not fit, or a word without a row.

    References
    ----------
    arXiv 2301.02828, sections 3 and 4: W_ds learned, with N a small multiple of V.
    """

    word_of_row: Tensor

    def __init__(self, weight: Tensor, word_of_row: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        if weight.dim() != 2 or word_of_row.shape != weight.shape[:1]:
            raise ValueError(
                f"weight and word_of_row must be (N, D) and (N,), got {tuple(weight.shape)} and "
                f"{tuple(word_of_row.shape)}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias must be one number per row ({len(weight)},), got {tuple(bias.shape)}")
        counts = word_of_row.bincount()
        if bool((counts == 0).any()):
            raise ValueError(f"word {int((counts == 0).nonzero()[0, 0])} has no row")
        self.weight = nn.Parameter(weight.detach().clone().float())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone().float())
        self.register_buffer("word_of_row", word_of_row.clone())
        self.vocabulary = len(counts)

    @classmethod
    def from_unembedding(
        cls,
        weight: Tensor,
        counts: Tensor,
        *,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> "OverparameterizedHead":
        """Copies of the rows of an ordinary head: ``counts[w]`` of row w, told apart by noise.

        A bias of -log ``counts[w]`` makes up for the copies, so that without noise the head computes what the ordinary
        one does.

        Parameters
        ----------
        weight
            (V, D).
        counts
            (V,) rows per word, at least 1 (:func:`allot_rows`).
        noise
            Standard deviation of what is added, relative to that of the weights.
        generator
            Of the noise, on the CPU; needed with it.
        """
        if counts.shape != weight.shape[:1] or bool((counts < 1).any()):
            raise ValueError(f"counts must be at least 1 for each of the {len(weight)} words")
        words = torch.arange(len(weight)).repeat_interleave(counts.cpu())
        rows = weight.detach().float().cpu()[words]
        if noise:
            if generator is None:
                raise ValueError("noise needs a generator")
            rows = rows + noise * float(weight.detach().float().std()) * torch.randn(rows.shape, generator=generator)
        return cls(rows, words, -counts.cpu().float().log()[words]).to(weight.device)

    def logits(self, states: Tensor) -> Tensor:
        """(B, N) of states (B, D)."""
        if states.shape[-1] != self.weight.shape[1]:
            raise ValueError(f"states must have width {self.weight.shape[1]}, got {tuple(states.shape)}")
        return linear(states, self.weight, self.bias)

    def log_probs(self, states: Tensor) -> Tensor:
        """log p of every word, (B, V)."""
        logits = self.logits(states)
        top = logits.new_full((len(logits), self.vocabulary), -math.inf)
        words = self.word_of_row.expand_as(logits)
        top = top.scatter_reduce(1, words, logits.detach(), "amax")
        # each word's sum is taken about its own largest row: a rare word's mass does not vanish beside a common one's
        sums = torch.zeros_like(top).scatter_add(1, words, (logits - top.gather(1, words)).exp())
        return sums.log() + top - logits.logsumexp(1, keepdim=True)

    def target_log_probs(self, states: Tensor, targets: Tensor) -> Tensor:
        """log p of one word per row, (B,)."""
        logits = self.logits(states)
        # only the words' own rows are gathered, one after another: a mask over all N rows would double the time
        counts = self.word_of_row.bincount(minlength=self.vocabulary)
        own = counts[targets]
        state = torch.arange(len(targets), device=targets.device).repeat_interleave(own)
        place = torch.arange(len(state), device=state.device) - (own.cumsum(0) - own)[state]
        first = counts.cumsum(0) - counts
        rows = self.word_of_row.argsort(stable=True)[first[targets[state]] + place]
        picked = logits[state, rows]
        top = logits.new_full((len(logits),), -math.inf).scatter_reduce(0, state, picked.detach(), "amax")
        sums = torch.zeros_like(top).scatter_add(0, state, (picked - top[state]).exp())
        return sums.log() + top - logits.logsumexp(1)

    def forward(self, states: Tensor, targets: Tensor) -> Tensor:
        """The same as :meth:`target_log_probs`."""
        return self.target_log_probs(states, targets)


def allot_rows(importance: Tensor, rows: int) -> Tensor:
    """How many rows each word gets: one, and the rest in proportion to its importance.

    Parameters
    ----------
    importance
        (V,) numbers >= 0: how often each word occurs in training, or the total training loss on it.
    rows
        Number of rows to give out, at least V.

    Returns
    -------
    Tensor
        (V,) int64 with sum ``rows``. What is left after rounding down goes to the largest remainders, the first of
        equal ones.

    References
    ----------
    arXiv 2301.02828, section 4, and the authors' two ways of allotment.
    """
    if importance.dim() != 1 or not bool((importance >= 0).all()) or not bool(importance.isfinite().all()):
        raise ValueError("importance must be one finite number >= 0 per word")
    vocabulary = len(importance)
    if rows < vocabulary:
        raise ValueError(f"rows must be at least one per word, {vocabulary}; got {rows}")
    if float(importance.sum()) == 0:
        raise ValueError("importance is zero for every word")
    share = importance.double() / importance.double().sum() * (rows - vocabulary)
    counts = share.floor().long()
    left = rows - vocabulary - int(counts.sum())
    counts[(share - counts).argsort(descending=True, stable=True)[:left]] += 1
    return counts + 1


def train_head(
    head: OverparameterizedHead,
    store: Datastore,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    generator: torch.Generator,
    weight_decay: float = 0.0,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> TrainingReport:
    """Fit a head to the entries of a datastore, the model itself left as it is.

    Parameters
    ----------
    head
        Trained in place by AdamW on the negative log-likelihood of each entry's token, the learning rate down to a
        tenth by a cosine.
    store
        Keys are the states, values the tokens.
    steps, batch_size, lr, weight_decay
        Entries are drawn with replacement.
    generator
        On the CPU; decides the batches.
    """
    if head.weight.shape[1] != store.width:
        raise ValueError(f"the head reads width {head.weight.shape[1]}, the store's keys have {store.width}")

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            rows = torch.randint(len(store), (batch_size,), generator=generator).numpy()
            yield (
                torch.from_numpy(np.asarray(store.keys[rows], dtype=np.float32)),
                torch.from_numpy(np.asarray(store.values[rows])).long(),
            )

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Loss:
        return Loss(-model(*batch).sum(), float(len(batch[1])))

    return train(
        head,
        batches(),
        steps=steps,
        optimizer=adamw(lr, weight_decay=weight_decay),
        schedule=warmup_cosine(steps, min(20, steps - 1)),
        loss=loss,
        on_progress=on_progress,
    )
