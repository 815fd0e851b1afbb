"""Likelihood of whole sequences and texts: windows, perplexity, bits per byte."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from papertrial.lm.generation import evaluating, left_pad
from papertrial.lm.scoring.tokens import token_log_probs

Item = TypeVar("Item")


def groups(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """The items in runs of ``size``, the last one shorter."""
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {size}")
    return (items[start : start + size] for start in range(0, len(items), size))


def windows(length: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """Overlapping windows over a sequence, each target in exactly one of them.

    Returns
    -------
    list
        ``(start, stop, first)``: tokens start .. stop - 1 are fed, tokens first .. stop - 1 are scored. From the second
        window on a scored token has at least ``window - stride`` tokens of context.
    """
    if not 1 <= stride < window:
        raise ValueError(f"stride must lie between 1 and window - 1 = {window - 1}, got {stride}")
    spans, first = [], 1
    for start in itertools.count(0, stride):
        stop = min(start + window, length)
        if first < stop:
            spans.append((start, stop, first))
            first = stop
        if stop == length:
            return spans
    raise AssertionError  # unreachable: the loop ends at the last token


def _sequence_scores(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int] | Tensor],
    *,
    window: int | None,
    stride: int | None,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood (N,) in nats, float64, and number of scored tokens (N,)."""
    if (window is None) != (stride is None):
        raise ValueError("window and stride go together: give both, or neither for whole sequences")
    pieces: list[tuple[int, int, Tensor]] = []
    counts = torch.zeros(len(sequences), dtype=torch.long)
    for index, sequence in enumerate(sequences):
        ids = torch.as_tensor(sequence, dtype=torch.long)
        whole = [(0, len(ids), 1)] if len(ids) > 1 else []
        spans = whole if window is None or stride is None else windows(len(ids), window, stride)
        pieces += [(index, stop - first, ids[start:stop]) for start, stop, first in spans]
        counts[index] = max(len(ids) - 1, 0)
    # alike lengths together: less padding; the result does not depend on the order
    pieces.sort(key=lambda piece: len(piece[2]))
    nll = torch.zeros(len(sequences), dtype=torch.float64)
    with torch.no_grad(), evaluating(model):
        for group in groups(pieces, batch_size):
            ids, mask = left_pad([tokens for _, _, tokens in group], pad_id=0)
            scores = token_log_probs(model, ids, mask).double().cpu()
            for (index, last, _), row in zip(group, scores, strict=True):
                nll[index] -= row[-last:].sum()
    return nll, counts


def sequence_nll(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int] | Tensor],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> Tensor:
    """Negative log-likelihood of each sequence after its first token, (N,) nats, float64.

    Parameters
    ----------
    sequences
        N id sequences without padding.
    window, stride
        For texts longer than the model's context: see :func:`windows`. Each token is scored once. Default: whole
        sequences.
    batch_size
        Windows per forward.
    """
    return _sequence_scores(model, sequences, window=window, stride=stride, batch_size=batch_size)[0]


def perplexity(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int] | Tensor],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> float:
    """exp of the mean negative log-likelihood over all scored tokens of all sequences. Arguments: :func:`sequence_nll`.

    Comparable between models with the same tokenizer only; otherwise use :func:`bits_per_byte`.
    """
    nll, counts = _sequence_scores(model, sequences, window=window, stride=stride, batch_size=batch_size)
    if int(counts.sum()) == 0:
        raise ValueError("sequences has no token with a context: give sequences of at least two tokens")
    return math.exp(float(nll.sum()) / int(counts.sum()))


def text_bits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    bos_token_id: int,
    eos_token_id: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> tuple[Tensor, Tensor]:
    """Bits that the model needs for each text, and its length in UTF-8 bytes: (N,) float64, (N,) int64.

    Parameters
    ----------
    bos_token_id
        Fed before each text, so that the first token is paid for like every other; itself free of charge. The
        tokenizer's own special tokens are not added.
    eos_token_id
        If given, appended and paid for: the code is then that of a complete text.
    window, stride, batch_size
        As in :func:`sequence_nll`; the first window of a text begins with ``bos_token_id``, later ones in the text.

    Raises
    ------
    ValueError
        If the tokenizer loses something of a text (unknown characters, normalisation): its bits would be too few.
    """
    sequences = []
    for index, text in enumerate(texts):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
            raise ValueError(
                f"text {index} does not survive the tokenizer ({text[:40]!r}...): bits per byte would be too low; use "
                "a lossless (byte-level) tokenizer or texts within its alphabet"
            )
        sequences.append([bos_token_id, *ids] + ([] if eos_token_id is None else [eos_token_id]))
    nats = sequence_nll(model, sequences, window=window, stride=stride, batch_size=batch_size)
    return nats / math.log(2), torch.tensor([len(text.encode()) for text in texts])


def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    bos_token_id: int,
    eos_token_id: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> float:
    """Bits of all texts over their UTF-8 bytes: comparable across tokenizers. Arguments: :func:`text_bits`."""
    bits, sizes = text_bits(
        model,
        tokenizer,
        texts,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        window=window,
        stride=stride,
        batch_size=batch_size,
    )
    if int(sizes.sum()) == 0:
        raise ValueError("texts holds no bytes: give at least one text that is not empty")
    return float(bits.sum()) / int(sizes.sum())
