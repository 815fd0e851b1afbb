"""Answers that begin with given tokens: greedy decoding until a mark, from a prompt that is encoded once."""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from papertrial.lm import cache as kv
from papertrial.lm.anatomy import device_of
from papertrial.lm.generation import StepDecoder, evaluating, left_pad


class Answer(NamedTuple):
    """A text, and whether its end was found within the bound."""

    text: str
    finished: bool


class Answers:
    """How a model's answers end, and how they are read.

    Parameters
    ----------
    model, tokenizer
        A causal language model of transformers and its tokenizer.
    stop
        One character that ends an answer, and is not part of it. None: an answer is always ``max_tokens`` long.
    max_tokens
        Most tokens of an answer, its first one included.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop: str | None, max_tokens: int
    ) -> None:
        if stop is not None and len(stop) != 1:
            raise ValueError(f"stop must be one character or None, got {stop!r}")
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        self.model, self.tokenizer, self.stop, self.max_tokens = model, tokenizer, stop, max_tokens
        self.vocabulary = len(tokenizer)
        """Tokens that have a text; the output layer may have more rows."""
        ends = torch.zeros(self.vocabulary, dtype=torch.bool)
        if stop is not None:
            texts = tokenizer.batch_decode([[i] for i in range(self.vocabulary)])
            ends = torch.tensor([stop in text for text in texts])
        if tokenizer.eos_token_id is not None:
            ends[tokenizer.eos_token_id] = True
        self.ends = ends.to(device_of(model))
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)

    def read(self, contexts: Sequence[str]) -> StepDecoder:
        """The contexts as rows of a decoder."""
        ids = [self.tokenizer(context).input_ids for context in contexts]
        for context, row in zip(contexts, ids, strict=True):
            if not row:
                raise ValueError(f"the prompt {context!r} has no tokens")
        return StepDecoder(self.model, *left_pad(ids, self.pad), keep_hidden=True)

    def scores(self, decoder: StepDecoder) -> Tensor:
        """Next-token scores (B, vocabulary), float32."""
        return decoder.logits[:, : self.vocabulary]

    def complete(self, decoder: StepDecoder, first: Tensor) -> list[list[Answer]]:
        """Answers that begin with the tokens ``first`` (B, n) after the decoder's rows.

        The decoder itself stays where it is.
        """
        ahead = copy.copy(decoder)
        if decoder.cache is not None:
            ahead.cache = kv.branch(decoder.cache)
        ahead.repeat(first.shape[1])
        token = first.reshape(-1).to(self.ends.device)
        columns, ended = [token], self.ends[token]
        with evaluating(self.model):
            while len(columns) < self.max_tokens and not bool(ended.all()):
                token = ahead.step(token)[:, : self.vocabulary].argmax(-1)
                columns.append(token)
                ended = ended | self.ends[token]
        answers = [self._answer(row) for row in torch.stack(columns, 1).tolist()]
        return [answers[i : i + first.shape[1]] for i in range(0, len(answers), first.shape[1])]

    def _answer(self, ids: list[int]) -> Answer:
        end = next((place for place, token in enumerate(ids) if self.ends[token]), None)
        text = self.tokenizer.decode(ids if end is None else ids[: end + 1], skip_special_tokens=True)
        assert isinstance(text, str)
        return Answer(text if self.stop is None else text.split(self.stop)[0], end is not None or self.stop is None)
