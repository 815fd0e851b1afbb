"""Scores of single tokens, in chunks of positions so that few logits are held at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from papertrial.lm.anatomy import unwrap
from papertrial.lm.generation import evaluating
from papertrial.lm.scoring.forward import chunks, forward_inputs, states_and_head, stock_forward

LOGITS_AT_ONCE = 2**25
"""Default bound on logits in memory: 128 MiB in float32."""


def scored_positions(attention_mask: Tensor) -> Tensor:
    """Which of the targets ``input_ids[:, 1:]`` are scored: (B, T - 1) bool."""
    real = attention_mask.bool()
    return real[:, :-1] & real[:, 1:]


@dataclass(frozen=True)
class TokenScores:
    """Per target token, aligned with ``input_ids[:, 1:]``; all (B, T - 1), zero where ``mask`` is false.

    Attributes
    ----------
    mask
        Bool, true where a token was scored.
    log_probs, entropy, max_log_prob
        Nats, float32: log p of the token, entropy of the distribution, log p of its best token.
    rank
        1 for the most probable token: one more than the number of tokens that are strictly more probable. int64.
    top_p_mass
        Mass of all tokens at least as probable as the token: the smallest nucleus that covers it.
    hidden
        (B, T - 1, D), the state that predicted the token (what the unembedding read); None unless asked for.
    """

    mask: Tensor
    log_probs: Tensor
    entropy: Tensor
    max_log_prob: Tensor
    rank: Tensor
    top_p_mass: Tensor
    hidden: Tensor | None = None


def token_log_probs(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> Tensor:
    """log p(token t+1 | tokens up to t) in nats, (B, T - 1) float32, 0 where :func:`scored_positions` is false.

    Differentiable where gradients are enabled (chunks are then recomputed in the backward pass, to keep the memory
    bound), and run in the model's current training mode: losses are built on this. See :func:`score_tokens` for
    measuring.

    Parameters
    ----------
    input_ids, attention_mask
        (B, T), padded on either side.
    logits_at_once
        Bound on the number of logits held at a time.
    """
    inputs, ids, mask = forward_inputs(model, input_ids, attention_mask)
    scored = scored_positions(mask)
    states, head = states_and_head(model, inputs)

    def chosen(part: Tensor, target: Tensor) -> Tensor:
        return head(part).log_softmax(-1).gather(-1, target[:, None])[:, 0]

    parts = []
    vocabulary = unwrap(model).config.get_text_config().vocab_size
    for part, target in chunks(states[:, :-1][scored], ids[:, 1:][scored], vocabulary, logits_at_once):
        if torch.is_grad_enabled() and part.requires_grad:
            parts.append(checkpoint(chosen, part, target, use_reentrant=False))
        else:
            parts.append(chosen(part, target))
    log_probs = torch.zeros(scored.shape, dtype=torch.float32, device=ids.device)
    return log_probs.masked_scatter(scored, torch.cat(parts)) if parts else log_probs


@torch.no_grad()
def score_tokens(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    keep_hidden: bool = False,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> TokenScores:
    """Everything that confidence, detection and deferral methods ask of a token, in one pass without gradients.

    Runs in evaluation mode. Arguments as in :func:`token_log_probs`; ``keep_hidden`` also returns the predicting
    states.
    """
    with evaluating(model):
        inputs, ids, mask = forward_inputs(model, input_ids, attention_mask)
        scored = scored_positions(mask)
        if keep_hidden and not stock_forward(model):
            raise ValueError(
                f"keep_hidden needs a model whose unembedding is known, {type(unwrap(model)).__name__} is not"
            )
        states, head = states_and_head(model, inputs)
        columns: list[list[Tensor]] = [[], [], [], [], []]
        vocabulary = unwrap(model).config.get_text_config().vocab_size
        for part, target in chunks(states[:, :-1][scored], ids[:, 1:][scored], vocabulary, logits_at_once):
            for column, values in zip(columns, _token_statistics(head(part), target), strict=True):
                column.append(values)

    def spread(column: list[Tensor], dtype: torch.dtype) -> Tensor:
        table = torch.zeros(scored.shape, dtype=dtype, device=ids.device)
        return table.masked_scatter(scored, torch.cat(column)) if column else table

    log_probs, entropy, best, rank, mass = columns
    return TokenScores(
        mask=scored,
        log_probs=spread(log_probs, torch.float32),
        entropy=spread(entropy, torch.float32),
        max_log_prob=spread(best, torch.float32),
        rank=spread(rank, torch.long),
        top_p_mass=spread(mass, torch.float32),
        hidden=states[:, :-1].masked_fill(~scored[..., None], 0) if keep_hidden else None,
    )


def _token_statistics(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    chosen = log_probs.gather(-1, target[:, None])
    entropy = torch.special.entr(probs).sum(-1)
    rank = (log_probs > chosen).sum(-1) + 1
    mass = probs.masked_fill(log_probs < chosen, 0.0).sum(-1)
    return chosen[:, 0], entropy, log_probs.max(-1).values, rank, mass
