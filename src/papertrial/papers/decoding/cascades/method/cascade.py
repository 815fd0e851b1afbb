"""The cascade itself: the small model answers, the rule decides, the large model answers what is deferred."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from papertrial.papers.decoding.cascades.method.answers import Records, answer, forward_flops
from papertrial.papers.decoding.cascades.method.post_hoc import PostHocDeferral

Rule = Callable[[Records], Tensor]


@dataclass(frozen=True)
class CascadeOutput:
    """``outputs``: tokens of each answer; ``deferred`` (N,) bool; ``scores`` (N,) of the rule; ``cost`` (N,) in
    floating-point operations, the rule's look into the large model included."""

    outputs: list[list[int]]
    deferred: Tensor
    scores: Tensor
    cost: Tensor


class Cascade:
    """Two models of one task behind one interface.

    Parameters
    ----------
    small, large
        Both decoders or both encoder-decoders, with one vocabulary.
    rule
        A fitted :class:`PostHocDeferral`, or a function from records to confidence (N,), such as
        ``lambda records: chow_quantile(records.log_probs, 0.2)``.
    threshold, rate
        Exactly one: defer what scores below ``threshold``, or the share ``rate`` of every batch with the lowest scores.
    max_new_tokens, eos_token_id
        Of the answers of both.
    layer
        Layer of the large model whose states the rule reads, if it does.
    """

    def __init__(
        self,
        small: PreTrainedModel,
        large: PreTrainedModel,
        rule: PostHocDeferral | Rule,
        *,
        threshold: float | None = None,
        rate: float | None = None,
        max_new_tokens: int,
        eos_token_id: int | Sequence[int] | None = None,
        layer: int = 1,
    ) -> None:
        if (threshold is None) == (rate is None):
            raise ValueError(f"give either threshold or rate, got {threshold} and {rate}")
        if rate is not None and not 0.0 <= rate <= 1.0:
            raise ValueError(f"rate must lie in [0, 1], got {rate}")
        if small.config.vocab_size != large.config.vocab_size:
            raise ValueError(
                f"the models' vocabularies differ: {small.config.vocab_size} and {large.config.vocab_size} tokens"
            )
        self.small, self.large, self.rule = small, large, rule
        self.threshold, self.rate, self.layer = threshold, rate, layer
        self.max_new_tokens, self.eos_token_id = max_new_tokens, eos_token_id

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> CascadeOutput:
        """Answer inputs (N, S), padded on the left for decoders."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        looks = isinstance(self.rule, PostHocDeferral) and self.rule.needs_large
        records = answer(
            self.small,
            input_ids,
            mask,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self.eos_token_id,
            large=self.large if looks else None,
            layer=self.layer,
        )
        scores = self.rule.score(records) if isinstance(self.rule, PostHocDeferral) else self.rule(records)
        if self.threshold is not None:
            deferred = scores < self.threshold
        else:
            assert self.rate is not None
            deferred = torch.zeros(len(scores), dtype=torch.bool)
            deferred[scores.argsort(stable=True)[: round(self.rate * len(scores))]] = True
        cost = forward_flops(self.small, records.prompt_lengths, records.lengths)
        if looks:
            cost = cost + forward_flops(self.large, records.prompt_lengths, layer=self.layer)
        outputs = list(records.tokens)
        if bool(deferred.any()):
            rows = deferred.nonzero()[:, 0]
            better = answer(
                self.large,
                input_ids[rows.to(input_ids.device)],
                mask[rows.to(mask.device)],
                max_new_tokens=self.max_new_tokens,
                eos_token_id=self.eos_token_id,
            )
            for row, tokens in zip(rows.tolist(), better.tokens, strict=True):
                outputs[row] = tokens
            cost[rows] += forward_flops(self.large, better.prompt_lengths, better.lengths)
        return CascadeOutput(outputs, deferred, scores, cost)
