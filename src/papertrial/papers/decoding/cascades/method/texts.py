"""From texts to answers in texts: what a checkpoint with its tokenizer needs around :func:`answer`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from papertrial.lm.generation import left_pad
from papertrial.papers.decoding.cascades.method.answers import Records, answer
from papertrial.papers.decoding.cascades.method.early import early_states


@dataclass(frozen=True)
class TextAnswers:
    """``texts`` of the answers, special tokens left out; the ``records`` they came from, in the same order; and
    ``look_lengths`` (N,), the inputs' tokens for the large model, where that was looked into."""

    texts: list[str]
    records: Records
    look_lengths: Tensor | None = None


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: those of the model's generation settings, else the tokenizer's.

    Raises
    ------
    ValueError
        If neither names one.
    """
    for source in (model.generation_config, tokenizer):
        ends = getattr(source, "eos_token_id", None)
        if ends is not None:
            return [int(ends)] if isinstance(ends, int) else [int(end) for end in ends]
    raise ValueError(
        "eos_token_id: neither the model's generation_config nor the tokenizer names an end token; give it"
    )


def answer_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    large: PreTrainedModel | None = None,
    large_tokenizer: PreTrainedTokenizerBase | None = None,
    layer: int = 1,
    batch_size: int = 16,
    add_special_tokens: bool = True,
) -> TextAnswers:
    """Greedy answers of a decoder or an encoder-decoder to texts, in batches of similar length.

    Parameters
    ----------
    prompts
        Complete inputs: instructions, examples and chat templates are the caller's.
    eos_token_id
        Default: :func:`end_ids`.
    large, large_tokenizer, layer
        If given, the records also hold that model's early states; it reads the prompts with its own tokenizer (default:
        the same one).
    add_special_tokens
        Whether tokenizers put their own marks around a prompt; off for prompts that a chat template has made.

    Raises
    ------
    ValueError
        No prompts, one without a token, a batch size below 1, no known end token.
    """
    if isinstance(prompts, str) or len(prompts) == 0:
        raise ValueError(f"prompts must be a sequence of one text or more, got {prompts!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    ends = end_ids(model, tokenizer) if eos_token_id is None else eos_token_id
    sequences = _tokens(tokenizer, prompts, add_special_tokens)
    looks = None if large is None else _tokens(large_tokenizer or tokenizer, prompts, add_special_tokens)
    order = sorted(range(len(prompts)), key=lambda n: len(sequences[n]))
    parts, early = [], []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        ids, mask = _padded(model, tokenizer, [sequences[n] for n in rows])
        parts.append(answer(model, ids, mask, max_new_tokens=max_new_tokens, eos_token_id=ends))
        if large is not None and looks is not None:
            ids, mask = _padded(large, large_tokenizer or tokenizer, [looks[n] for n in rows])
            early.append(early_states(large, ids, mask, layer=layer).cpu())
    records = Records.join(parts)
    if early:
        records = Records(records.tokens, records.log_probs, records.states, records.prompt_lengths, torch.cat(early))
    back = torch.tensor(order).argsort()
    records = records.rows(back)
    texts = tokenizer.batch_decode(records.tokens, skip_special_tokens=True)
    return TextAnswers(texts, records, None if looks is None else torch.tensor([len(ids) for ids in looks]))


def _tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], special: bool) -> list[list[int]]:
    called: Any = tokenizer
    sequences: list[list[int]] = called(list(prompts), add_special_tokens=special)["input_ids"]
    for n, ids in enumerate(sequences):
        if not ids:
            raise ValueError(f"prompts[{n}] has no token: {prompts[n]!r}")
    return sequences


def _padded(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sequences: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """Padded where the model wants it: decoders on the left, encoders, whose places may be absolute, on the right."""
    pad = next((n for n in (tokenizer.pad_token_id, model.config.pad_token_id) if isinstance(n, int)), 0)  # masked
    if not model.config.is_encoder_decoder:
        return left_pad(sequences, pad)
    width = max(map(len, sequences))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in sequences])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in sequences])
