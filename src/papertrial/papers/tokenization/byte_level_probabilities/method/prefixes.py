"""What the model says after token sequences, with the keys and values of shared beginnings kept.

The sequences that the byte-level algorithm asks about differ in their last few tokens only. A :class:`Prefixes` holds
rows of sequences with one cache; the next rows name a parent each, and only the tokens that a parent lacks are run.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from papertrial.lm import cache as kv
from papertrial.lm.anatomy import device_of, position_limit, unwrap
from papertrial.lm.generation import evaluating, left_pad, position_ids


@dataclass(frozen=True)
class Prefixes:
    """Token sequences and what follows them.

    Attributes
    ----------
    tokens : the sequences, one a row.
    logits : (B, m, V), after each of the last m tokens of every row, in at least float32; left of a row's beginning
        they mean nothing.
    cache : keys and values, padded on the left like ``mask``; None where the model has no such cache.
    mask : (B, S), ones on the tokens.
    """

    tokens: list[list[int]]
    logits: Tensor
    cache: DynamicCache | None
    mask: Tensor

    def select(self, rows: Sequence[int]) -> "Prefixes":
        """Some of the rows, in the given order; this object stays as it is."""
        if list(rows) == list(range(len(self.tokens))):
            return self
        chosen = torch.tensor(list(rows), dtype=torch.long, device=self.mask.device)
        cache = self.cache
        if cache is not None:
            cache = kv.branch(cache)
            kv.select(cache, chosen)
        return Prefixes([self.tokens[row] for row in rows], self.logits[chosen], cache, self.mask[chosen])

    def shared(self, row: int, sequence: Sequence[int]) -> int:
        """How many tokens at the beginning of ``sequence`` the row holds."""
        own = self.tokens[row]
        if len(own) <= len(sequence) and list(sequence[: len(own)]) == own:
            return len(own)
        return next(i for i, token in enumerate(own) if i >= len(sequence) or token != sequence[i])


@torch.no_grad()
def run_prefixes(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    parents: Prefixes | None = None,
    rows: Sequence[int] | None = None,
    *,
    caching: bool = True,
) -> Prefixes:
    """Run the model on sequences (B of them, none empty), on top of what ``parents`` holds.

    Parameters
    ----------
    parents, rows
        Earlier sequences and, for each new one, the number of the row it shares most with. ``parents`` is not changed.
    caching
        False runs whole sequences: for models whose state is not keys and values.

    Returns
    -------
    Prefixes
        With logits after at least the tokens that its parents lack.

    Raises
    ------
    ValueError
        If a sequence does not fit the model's position table.
    """
    limit, longest = position_limit(model), max(map(len, sequences))
    if limit is not None and longest > limit:
        raise ValueError(f"{longest} tokens do not fit the model's {limit} positions: give a shorter text")
    if not caching:
        ids, mask = left_pad(sequences, 0)
        logits = _forward(model, ids, mask, None, longest)
        return Prefixes([list(s) for s in sequences], logits, None, mask.to(logits.device))
    kept = [0] * len(sequences)
    if parents is not None and rows is not None:
        kept = [min(parents.shared(row, s), len(s) - 1) for row, s in zip(rows, sequences, strict=True)]
    fresh = max(len(s) - k for s, k in zip(sequences, kept, strict=True))
    kept = [max(0, len(s) - fresh) for s in sequences]  # every row runs as many: no holes inside a row
    ids, block = left_pad([s[k:] for s, k in zip(sequences, kept, strict=True)], 0)
    if parents is None or rows is None or not any(kept):
        cache, mask = kv.new_cache(model), block
    else:
        cache, mask = _kept(parents, rows, kept)
        mask = torch.cat([mask, block.to(mask.device)], 1)
    logits = _forward(model, ids, mask, cache, fresh)
    return Prefixes([list(s) for s in sequences], logits, cache, mask.to(logits.device))


def _kept(parents: Prefixes, rows: Sequence[int], kept: Sequence[int]) -> tuple[DynamicCache, Tensor]:
    """A cache and mask of the first ``kept[i]`` tokens of row ``rows[i]``."""
    assert parents.cache is not None
    cache, mask = kv.branch(parents.cache), parents.mask
    if list(rows) != list(range(len(mask))):
        chosen = torch.tensor(list(rows), dtype=torch.long, device=mask.device)
        kv.select(cache, chosen)
        mask = mask[chosen]
    slots = mask.shape[1]
    ends = [slots - len(parents.tokens[row]) + k for row, k in zip(rows, kept, strict=True)]
    if len(set(ends)) == 1:
        kv.crop(cache, slots - ends[0])
        return cache, mask[:, : ends[0]]
    width = max(kept)
    ending = torch.tensor(ends, device=mask.device)[:, None]
    count = torch.tensor(list(kept), device=mask.device)[:, None]
    column = torch.arange(width, device=mask.device)[None]
    positions = torch.where(column >= width - count, ending - width + column, -1)
    kv.gather(cache, positions)
    return cache, kv.gather_mask(mask, positions)


def _forward(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: DynamicCache | None, keep: int) -> Tensor:
    inner = unwrap(model)
    device = device_of(model)
    parameters = inspect.signature(inner.forward).parameters
    mask = mask.to(device)
    inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask, "use_cache": cache is not None}
    if cache is not None:
        inputs["past_key_values"] = cache
    if "position_ids" in parameters:
        inputs["position_ids"] = position_ids(mask)[:, -ids.shape[1] :]
    if "logits_to_keep" in parameters:
        inputs["logits_to_keep"] = keep
    with evaluating(model):
        logits = model(**inputs).logits[:, -keep:]
    return logits if logits.dtype == torch.float64 else logits.float()
