"""The cascade itself: the small model answers, the rule decides, the large model answers what is deferred."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from papertrial.papers.decoding.cascades.method.answers import Records, answer
from papertrial.papers.decoding.cascades.method.cost import forward_flops
from papertrial.papers.decoding.cascades.method.post_hoc import PostHocDeferral
from papertrial.papers.decoding.cascades.method.texts import TextAnswers, answer_texts

Rule = Callable[[Records], Tensor]


@dataclass(frozen=True)
class CascadeOutput:
    """``outputs``: tokens of each answer, in the vocabulary of the model that wrote it; ``deferred`` (N,) bool;
    ``scores`` (N,) of the rule; ``cost`` (N,) in floating-point operations, the rule's look into the large model
    included; ``texts`` of the answers where the inputs were texts."""

    outputs: list[list[int]]
    deferred: Tensor
    scores: Tensor
    cost: Tensor
    texts: list[str] | None = None


class Cascade:
    """Two models of one task behind one interface.

    Parameters
    ----------
    small, large
        Decoders or encoder-decoders.
    rule
        A fitted :class:`PostHocDeferral`, or a function from records to confidence (N,), such as
        ``lambda records: chow_quantile(records.log_probs, 0.2)``.
    threshold, rate
        Exactly one: defer what scores below ``threshold`` (see :func:`threshold_at`), or the share ``rate`` of what is
        asked at once with the lowest scores.
    max_new_tokens
        Of the answers of both.
    eos_token_id
        What ends an answer. For texts the default is what each checkpoint says itself; for token ids there is none.
    layer
        Layer of the large model whose states the rule reads, if it does.
    tokenizers
        Of the small and the large model, for :meth:`answer`; they need not be the same.
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
        tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase] | None = None,
    ) -> None:
        if (threshold is None) == (rate is None):
            raise ValueError(f"give either threshold or rate, got {threshold} and {rate}")
        if rate is not None and not 0.0 <= rate <= 1.0:
            raise ValueError(f"rate must lie in [0, 1], got {rate}")
        self.small, self.large, self.rule = small, large, rule
        self.threshold, self.rate, self.layer = threshold, rate, layer
        self.max_new_tokens, self.eos_token_id, self.tokenizers = max_new_tokens, eos_token_id, tokenizers

    @property
    def looks(self) -> bool:
        """Whether the rule reads states of the large model."""
        return isinstance(self.rule, PostHocDeferral) and self.rule.needs_large

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> CascadeOutput:
        """Answer inputs (N, S) in token ids, padded on the left for decoders.

        Raises
        ------
        ValueError
            If the two models do not share their token ids, or the rule's scores are not N finite numbers.
        """
        self._check_ids_are_shared()
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        settings: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "eos_token_id": self.eos_token_id}
        large = self.large if self.looks else None
        first = answer(self.small, input_ids, mask, large=large, layer=self.layer, **settings)

        def defer(rows: Tensor) -> TextAnswers:
            picked = input_ids[rows.to(input_ids.device)], mask[rows.to(mask.device)]
            return TextAnswers([], answer(self.large, *picked, **settings))

        return self._route(TextAnswers([], first, first.prompt_lengths if self.looks else None), defer)

    def answer(self, prompts: Sequence[str], *, batch_size: int = 16, add_special_tokens: bool = True) -> CascadeOutput:
        """Answer texts; each model reads them with its own tokenizer. See :func:`answer_texts`.

        Raises
        ------
        ValueError
            If the cascade was made without tokenizers, or the rule's scores are not N finite numbers.
        """
        if self.tokenizers is None:
            raise ValueError("tokenizers is None: make the cascade with tokenizers=(small's, large's) to answer texts")
        ours, theirs = self.tokenizers
        settings: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens, "eos_token_id": self.eos_token_id, "batch_size": batch_size,
            "add_special_tokens": add_special_tokens,
        }  # fmt: skip
        look: dict[str, Any] = (
            {"large": self.large, "large_tokenizer": theirs, "layer": self.layer} if self.looks else {}
        )
        first = answer_texts(self.small, ours, prompts, **look, **settings)
        return self._route(
            first, lambda rows: answer_texts(self.large, theirs, [prompts[n] for n in rows.tolist()], **settings)
        )

    def _route(self, first: TextAnswers, defer: Callable[[Tensor], TextAnswers]) -> CascadeOutput:
        """Keep or replace the small model's answers; ``defer`` has the large model answer rows of them."""
        records, outputs, texts = first.records, list(first.records.tokens), list(first.texts)
        scores = self._scores(records)
        deferred = self._deferred(scores)
        cost = forward_flops(self.small, records.prompt_lengths, records.lengths)
        if first.look_lengths is not None:
            cost = cost + forward_flops(self.large, first.look_lengths, layer=self.layer)
        if bool(deferred.any()):
            rows = deferred.nonzero()[:, 0]
            better = defer(rows)
            for place, row in enumerate(rows.tolist()):
                outputs[row] = better.records.tokens[place]
                if texts:
                    texts[row] = better.texts[place]
            cost[rows] += forward_flops(self.large, better.records.prompt_lengths, better.records.lengths)
        return CascadeOutput(outputs, deferred, scores, cost, texts or None)

    def _scores(self, records: Records) -> Tensor:
        scores = self.rule.score(records) if isinstance(self.rule, PostHocDeferral) else self.rule(records)
        scores = torch.as_tensor(scores).detach().cpu()
        if scores.shape != (len(records),) or not bool(torch.isfinite(scores).all()):
            raise ValueError(
                f"rule must give one finite score for each of {len(records)} answers, got shape {tuple(scores.shape)}"
            )
        return scores

    def _deferred(self, scores: Tensor) -> Tensor:
        if self.threshold is not None:
            return scores < self.threshold
        assert self.rate is not None
        deferred = torch.zeros(len(scores), dtype=torch.bool)
        deferred[scores.argsort(stable=True)[: round(self.rate * len(scores))]] = True
        return deferred

    def _check_ids_are_shared(self) -> None:
        """Equal sizes, where nothing else is known; with tokenizers, the same words: a larger model's table of
        embeddings may be padded further."""
        if self.tokenizers is not None:
            ours, theirs = self.tokenizers
            if ours is not theirs and ours.get_vocab() != theirs.get_vocab():
                raise ValueError("the models' tokenizers differ, so they do not share token ids: use answer(texts)")
        elif self.small.config.vocab_size != self.large.config.vocab_size:
            raise ValueError(
                f"the models' vocabularies differ: {self.small.config.vocab_size} and {self.large.config.vocab_size} "
                "tokens; if only the padding of their embeddings does, give tokenizers; else use answer(texts)"
            )
