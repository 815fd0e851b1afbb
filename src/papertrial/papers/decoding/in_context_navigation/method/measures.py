"""Measures of a list of answers, and of how far a query is from keys."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from papertrial.lm.generation import evaluating
from papertrial.papers.decoding.in_context_navigation.method.completion import Answers
from papertrial.papers.decoding.in_context_navigation.method.keys import key_weight


def _hits(hits: Sequence[bool | int] | Tensor, k: int | None) -> Tensor:
    values = torch.as_tensor(hits, dtype=torch.float64)
    if values.dim() == 0 or values.shape[-1] == 0:
        raise ValueError("hits is empty")
    if k is not None and not 1 <= k <= values.shape[-1]:
        raise ValueError(f"k must lie in 1..{values.shape[-1]}, got {k}")
    return values[..., :k]


def map_at_k(hits: Sequence[bool | int] | Tensor, k: int | None = None) -> float:
    """The paper's MAP@K: precision at i, averaged over every i from 1 to K (not over hits only).

    Parameters
    ----------
    hits
        (..., n) right or wrong in the order found; more axes are averaged over.
    k
        Default n.
    """
    values = _hits(hits, k)
    precision = values.cumsum(-1) / torch.arange(1, values.shape[-1] + 1)
    return float(precision.mean())


def accuracy_at_k(hits: Sequence[bool | int] | Tensor, k: int | None = None) -> float:
    """Share of the first K answers that are right."""
    return float(_hits(hits, k).mean())


def _check_tokens(contexts: Sequence[str], tokens: Sequence[Sequence[int]], vocabulary: int) -> None:
    if len(contexts) != len(tokens):
        raise ValueError(f"tokens must have a row for each of the {len(contexts)} contexts, got {len(tokens)} rows")
    for place, row in enumerate(tokens):
        if not len(row):
            raise ValueError(f"tokens[{place}] is empty; give at least one token for each context")
        if strangers := [token for token in row if not 0 <= token < vocabulary]:
            raise ValueError(f"tokens[{place}] names {strangers}; ids lie in 0..{vocabulary - 1}")


@torch.no_grad()
def explored_mass(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[str],
    tokens: Sequence[Sequence[int]],
) -> Tensor:
    """Probability (B,) float32 that the next token after each context is one of the given ones, each counted once.

    A model that does not repeat what its context lists gives tokens that are listed there next to none.

    Raises
    ------
    ValueError
        For a prompt without tokens, or an id outside the vocabulary.
    """
    _check_tokens(contexts, tokens, len(tokenizer))
    with evaluating(model):
        answers = Answers(model, tokenizer, None, 1)
        chances = answers.scores(answers.read(contexts)).softmax(-1)
    wanted = torch.zeros_like(chances, dtype=torch.bool)
    for row, ids in zip(wanted, tokens, strict=True):
        row[list(ids)] = True
    return (chances * wanted).sum(-1)


def explored_key_similarity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Sequence[str],
    tokens: Sequence[Sequence[int]],
) -> tuple[Tensor, Tensor]:
    """How close the query after each context is to the keys of given tokens.

    Parameters
    ----------
    contexts
        B prompts; the query is the final hidden state of the last token.
    tokens
        For each prompt the ids of the tokens whose keys are meant, at least one.

    Returns
    -------
    (cosine, score), each (B,) float32: the mean over the tokens of the cosine of query and key, and of their product
    (without a bias, scale or cap of the model).

    Raises
    ------
    ValueError
        For a prompt without tokens, or an id that has no key.
    """
    weight = key_weight(model)
    _check_tokens(contexts, tokens, len(weight))
    with evaluating(model), torch.no_grad():
        state = Answers(model, tokenizer, None, 1).read(contexts).hidden
        assert state is not None
        queries = state[:, -1].to(weight.device, torch.float32)
        keys = [weight[torch.tensor(row, device=weight.device)].float() for row in tokens]
        cosine = torch.stack([cosine_similarity(q[None], k).mean() for q, k in zip(queries, keys, strict=True)])
        return cosine, torch.stack([(k @ q).mean() for q, k in zip(queries, keys, strict=True)])
