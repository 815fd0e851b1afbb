"""How far a policy came and what it cost: reward and divergence of its samples, and where two policies are alike."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from papertrial.lm.generation import Generation, evaluating, sample
from papertrial.lm.losses import IGNORED
from papertrial.lm.preferences.objectives import Objective
from papertrial.lm.preferences.pairs import PreferenceBatch, PreferencePair, check_ids, collate
from papertrial.lm.preferences.reference import Reference, vocabulary_of
from papertrial.lm.preferences.stats import token_stats
from papertrial.lm.scoring import LOGITS_AT_ONCE

_COLUMNS: tuple[Literal["kl", "reverse_kl", "entropy"], ...] = ("kl", "reverse_kl", "entropy")


@dataclass(frozen=True)
class PolicyReport:
    """Means over sampled answers.

    Attributes
    ----------
    reward
        In the reward's own unit.
    reverse_kl
        Nats per answer: the sum over its tokens of the exact KL(policy || reference) of the next-token distributions.
        Over the policy's own samples this estimates the divergence of the distributions over answers, without bias.
    forward_kl
        The same with KL(reference || policy), along the same samples (the sequential KL of arXiv 2404.11999).
    entropy
        Nats per token, of the policy's next-token distribution.
    valid
        Share of answers that the given check accepts; None without one.
    generation
        The samples.
    """

    reward: float
    reverse_kl: float
    forward_kl: float
    entropy: float
    valid: float | None
    generation: Generation

    def numbers(self) -> dict[str, float]:
        """The means by name."""
        found = {name: getattr(self, name) for name in ("reward", "reverse_kl", "forward_kl", "entropy")}
        return found if self.valid is None else found | {"valid": self.valid}


@torch.no_grad()
def evaluate_policy(
    model: PreTrainedModel,
    reference: Reference,
    prompt_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    reward: Callable[[Generation], Tensor],
    valid: Callable[[Generation], Tensor] | None = None,
    max_new_tokens: int,
    generator: torch.Generator,
    num_samples: int = 1,
    eos_token_id: int | Sequence[int] | None = None,
    batch_size: int = 256,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> PolicyReport:
    """Sample answers at temperature 1 and measure them.

    Parameters
    ----------
    prompt_ids, attention_mask
        (P, S), padded on the left.
    reward, valid
        Functions of the samples to one number (N,) each, N = P * num_samples.
    generator
        Draws the samples; equal generators give different policies the same uniform numbers.
    batch_size
        Samples measured at a time; they are drawn all at once.

    Raises
    ------
    ValueError
        Prompts padded on the right or with ids outside the vocabulary, a reward that is not one number a sample, more
        positions than the model has.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    check_ids("prompt_ids", prompt_ids, vocabulary_of(model))
    drawn = sample(
        model,
        prompt_ids,
        attention_mask,
        max_new_tokens=max_new_tokens,
        generator=generator,
        num_samples=num_samples,
        eos_token_id=eos_token_id,
    )
    labels = torch.cat([torch.full_like(drawn.prompt_ids, IGNORED), drawn.tokens.masked_fill(~drawn.mask, IGNORED)], 1)
    rows = (values.split(batch_size) for values in (drawn.sequences, drawn.attention_mask, labels))
    totals = []
    with evaluating(model):
        for batch in map(PreferenceBatch, *rows):
            stats = token_stats(model, reference, batch, want=_COLUMNS, logits_at_once=logits_at_once)
            totals.append(torch.stack([stats.total(name).double() for name in _COLUMNS]))
    forward_kl, reverse_kl, entropy = torch.cat(totals, 1).sum(1).tolist()
    return PolicyReport(
        reward=_mean("reward", reward, drawn),
        reverse_kl=reverse_kl / len(drawn.mask),
        forward_kl=forward_kl / len(drawn.mask),
        entropy=entropy / int(drawn.mask.sum()),
        valid=None if valid is None else _mean("valid", valid, drawn),
        generation=drawn,
    )


def _mean(name: str, function: Callable[[Generation], Tensor], drawn: Generation) -> float:
    values = function(drawn)
    if values.shape != drawn.mask.shape[:1]:
        raise ValueError(
            f"{name} must give one number for each of the {len(drawn.mask)} samples, got the shape "
            f"{tuple(values.shape)}"
        )
    return float(values.double().mean())


@dataclass(frozen=True)
class PairReport:
    """Means over pairs.

    Attributes
    ----------
    loss
        Of the objective, nats.
    accuracy
        Share of pairs whose chosen answer has the higher implicit reward (equal rewards count as wrong).
    margin
        Implicit reward of the chosen minus that of the rejected answer.
    chosen_kl, rejected_kl
        Sequential forward KL(reference || policy) along the answers, nats per answer.
    kl_gap
        How far those two lie apart within a pair, absolute. Their means may agree where single pairs do not.
    """

    loss: float
    accuracy: float
    margin: float
    chosen_kl: float
    rejected_kl: float
    kl_gap: float


@torch.no_grad()
def evaluate_pairs(
    model: nn.Module,
    reference: Reference,
    objective: Objective,
    pairs: Sequence[PreferencePair],
    *,
    batch_size: int = 64,
    pad_id: int = 0,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> PairReport:
    """A policy on pairs that it was not trained on; everything in evaluation mode.

    Raises
    ------
    ValueError
        No pairs, or NaN logits.
    """
    if len(pairs) == 0:
        raise ValueError("pairs is empty: give at least one")
    columns: list[Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        if isinstance(objective, nn.Module):
            stack.enter_context(evaluating(objective))
        for start in range(0, len(pairs), batch_size):
            batch = collate(pairs[start : start + batch_size], pad_id)
            stats = token_stats(model, reference, batch, want={*objective.wants, "kl"}, logits_at_once=logits_at_once)
            chosen, rejected = stats.halves()
            values = objective(chosen, rejected)
            gap = values.chosen_reward - values.rejected_reward
            kls = chosen.total("kl"), rejected.total("kl")
            columns.append(torch.stack([values.loss, (gap > 0).float(), gap, *kls, (kls[0] - kls[1]).abs()]).double())
    return PairReport(*torch.cat(columns, 1).mean(1).tolist())


def at_matched(records: Sequence[Mapping[str, float]], level: float, *, on: str = "reward") -> dict[str, float] | None:
    """What a run looked like when its ``on`` first reached ``level``, read off between checkpoints by straight lines.

    Parameters
    ----------
    records
        Measurements of one run in the order of training, the untouched policy first; all with the same names.
    level
        Of ``on``; where the run starts at or above it, its first record is the answer.

    Returns
    -------
    dict or None
        Every name at that moment; None if the run never got there.

    Raises
    ------
    ValueError
        No records, or a record without ``on``.
    """
    if not records:
        raise ValueError("records is empty: give the measurements of a run")
    if any(on not in record for record in records):
        raise ValueError(f"every record needs {on!r}; the first has {', '.join(sorted(records[0]))}")
    before = None
    for record in records:
        if record[on] >= level:
            if before is None:
                return dict(record)
            share = (level - before[on]) / (record[on] - before[on])
            return {name: before[name] + share * (record[name] - before[name]) for name in record}
        before = record
    return None


def frontier(
    records: Sequence[Mapping[str, float]], *, reward: str = "reward", cost: str = "reverse_kl"
) -> list[dict[str, float]]:
    """The records that no other record beats (at least the reward at no more cost), by rising cost."""
    best: list[dict[str, float]] = []
    for record in sorted(records, key=lambda r: (r[cost], -r[reward])):
        if not best or record[reward] > best[-1][reward]:
            best.append(dict(record))
    return best
