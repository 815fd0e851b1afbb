"""Likelihood of continuations: multiple choice and labels."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from papertrial.lm.generation import evaluating, left_pad
from papertrial.lm.scoring.sequences import groups
from papertrial.lm.scoring.tokens import token_log_probs


def continuation_scores(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int] | Tensor],
    continuations: Sequence[Sequence[int] | Tensor],
    *,
    batch_size: int = 8,
) -> tuple[Tensor, Tensor]:
    """log p(continuation | prompt) of N pairs of id sequences: summed nats (N,) float64, and token counts (N,)."""
    if len(prompts) != len(continuations):
        raise ValueError(f"{len(prompts)} prompts and {len(continuations)} continuations: one of each per pair")
    for name, sequences in (("prompt", prompts), ("continuation", continuations)):
        for index, sequence in enumerate(sequences):
            if len(sequence) == 0:
                raise ValueError(f"{name} {index} is empty: it needs at least one token")
    counts = torch.tensor([len(continuation) for continuation in continuations], dtype=torch.long)
    totals = torch.zeros(len(prompts), dtype=torch.float64)
    pairs = [[*map(int, p), *map(int, c)] for p, c in zip(prompts, continuations, strict=True)]
    order = sorted(range(len(pairs)), key=lambda index: len(pairs[index]))
    with torch.no_grad(), evaluating(model):
        for group in groups(order, batch_size):
            ids, mask = left_pad([pairs[index] for index in group], pad_id=0)
            scores = token_log_probs(model, ids, mask).double().cpu()
            for index, row in zip(group, scores, strict=True):
                totals[index] = row[-int(counts[index]) :].sum()
    return totals, counts


def choice_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    *,
    normalise: Literal["sum", "mean"] = "sum",
    bos_token_id: int | None = None,
    batch_size: int = 8,
) -> list[Tensor]:
    """Score of every choice as the continuation of its prompt, for multiple choice by likelihood.

    Prompt and choice are tokenised together, as the model has seen text; scored are the tokens behind the longest
    prefix that the prompt and all its joined choices share, so that a token spanning the border counts, in every
    choice.

    Parameters
    ----------
    prompts, choices
        One list of choices per prompt, appended as they stand: mind the space between.
    normalise
        ``sum`` gives log p of the choice, ``mean`` divides it by the number of its tokens.
    bos_token_id
        Fed first; needed where the prompt is empty. The tokenizer's own special tokens are not added.

    Returns
    -------
    list
        Per prompt a tensor (number of choices,), nats, float64.
    """
    if normalise not in ("sum", "mean"):
        raise ValueError(f"normalise must be 'sum' or 'mean', got {normalise!r}")
    if len(prompts) != len(choices):
        raise ValueError(f"{len(prompts)} prompts and {len(choices)} lists of choices: one list per prompt")
    start = [] if bos_token_id is None else [bos_token_id]
    contexts, endings = [], []
    for index, (prompt, options) in enumerate(zip(prompts, choices, strict=True)):
        if len(options) == 0:
            raise ValueError(f"choices {index} is empty: give at least one")
        alone = start + tokenizer.encode(prompt, add_special_tokens=False)
        joined = [start + tokenizer.encode(prompt + option, add_special_tokens=False) for option in options]
        shared = min(_shared_prefix(alone, ids) for ids in joined)
        if shared == 0:
            raise ValueError(f"prompt {index} leaves the choices without context: give bos_token_id")
        contexts += [ids[:shared] for ids in joined]
        endings += [ids[shared:] for ids in joined]
        if any(len(ids) == shared for ids in joined):
            raise ValueError(f"a choice of prompt {index} adds no token: {list(options)!r}")
    totals, counts = continuation_scores(model, contexts, endings, batch_size=batch_size)
    scores = totals / counts if normalise == "mean" else totals
    return list(scores.split([len(options) for options in choices]))


def _shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def label_log_probs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    labels: Mapping[str, Sequence[str]],
    *,
    bos_token_id: int | None = None,
    batch_size: int = 8,
) -> Tensor:
    """log p(label | prompt), (N, number of labels) float64, a label's spellings summed in probability.

    ``labels`` maps a label to its spellings, such as ``{"yes": [" yes", " Yes"], "no": [" no", " No"]}``. Columns are
    in the order of the mapping and not renormalised over the labels.
    """
    spellings = [spelling for variants in labels.values() for spelling in variants]
    rows = choice_scores(
        model, tokenizer, prompts, [spellings] * len(prompts), bos_token_id=bos_token_id, batch_size=batch_size
    )
    sizes = [len(variants) for variants in labels.values()]
    columns = torch.stack(rows).split(sizes, dim=1)
    return torch.stack([column.logsumexp(1) for column in columns], dim=1)
