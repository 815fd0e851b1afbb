"""Losses that carry their own weight, so that unequal micro-batches and processes average correctly."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = Any  # a tensor of token ids, a mapping of keyword arguments, or whatever the caller's own loss understands

IGNORED = -100
"""Label of a position that carries no loss; the value that transformers and PyTorch use."""


class Loss(NamedTuple):
    """A loss as a sum and the count it is to be divided by.

    Attributes
    ----------
    total : scalar tensor, the *sum* of the loss over what is counted (nats, for the losses here).
    weight : how many things were summed (target tokens, pairs, sequences). The loss of a step is the sum of the totals
        over the sum of the weights, over all its micro-batches and processes.
    parts : means to report beside the loss, by name; not differentiated.
    """

    total: Tensor
    weight: Tensor | float
    parts: Mapping[str, Tensor | float] = {}


def token_cross_entropy(logits: Tensor, labels: Tensor) -> Loss:
    """Cross-entropy of aligned labels: ``logits`` (..., V), ``labels`` (...) with -100 where there is no target.

    The log-softmax is taken in float32, whatever the dtype of the logits.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must agree but for the vocabulary"
        )
    total = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1), ignore_index=IGNORED, reduction="sum"
    )
    return Loss(total, (labels != IGNORED).sum())


def causal_loss(model: nn.Module, batch: Batch) -> Loss:
    """Next-token cross-entropy of a causal model.

    Parameters
    ----------
    batch : ids (B, T), or a mapping with ``input_ids`` (B, T) and optionally ``attention_mask`` (B, T), ``labels``
        (B, T; -100 carries no loss; not shifted) and ``position_ids``. Without labels every token after the first is a
        target, except where the attention mask is 0.
    """
    inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    labels = inputs.pop("labels", None)
    if labels is None:
        labels = inputs["input_ids"]
        if (mask := inputs.get("attention_mask")) is not None and mask.ndim == 2:
            labels = labels.masked_fill(mask == 0, IGNORED)
    if "position_ids" in inputs and "attention_mask" not in inputs:
        # transformers reads positions that jump, without a mask, as several packed sequences and cuts attention there
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    logits = model(**inputs, use_cache=False).logits  # (B, T, V)
    # shift the labels, not the logits: a slice of (B, T, V) would be copied
    return token_cross_entropy(logits, F.pad(labels[:, 1:], (0, 1), value=IGNORED))


def masked_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Loss:
    """Cross-entropy of a masked language model: ``labels`` (B, T) are aligned with ``input_ids``, -100 elsewhere."""
    inputs = dict(batch)
    labels = inputs.pop("labels")
    return token_cross_entropy(model(**inputs).logits, labels)
