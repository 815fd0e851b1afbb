"""From texts to token tensors: one stream, windows over it, and batches of windows from a seeded generator."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def encode(tokenizer: "PreTrainedTokenizerFast", texts: Iterable[str], *, ends: bool = True) -> Tensor:
    """The texts as one stream of ids (N,), each between bos and eos if ``ends`` (as far as the tokenizer has them)."""
    before = [tokenizer.bos_token_id] if ends and tokenizer.bos_token_id is not None else []
    after = [tokenizer.eos_token_id] if ends and tokenizer.eos_token_id is not None else []
    rows = list(texts)
    ids: list[int] = []
    if rows:
        encoded = tokenizer(
            rows, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        for row in encoded["input_ids"]:
            ids += [*before, *row, *after]
    return torch.tensor(ids, dtype=torch.long)


def token_windows(tokens: Tensor, length: int, stride: int | None = None) -> Tensor:
    """Windows (W, length) over the stream ``tokens`` (N,), ``stride`` apart (default ``length``), without a short tail.

    Raises
    ------
    ValueError
        If the stream is shorter than one window.
    """
    _check(tokens, length)
    stride = length if stride is None else stride
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    return tokens.unfold(0, length, stride).contiguous()


class RandomBatches:
    """Endless batches (B, T) of windows at random places of a stream; made by ``random_batches``."""

    def __init__(self, tokens: Tensor, batch_size: int, length: int, generator: torch.Generator) -> None:
        _check(tokens, length)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.tokens, self.batch_size, self.length, self.generator = tokens, batch_size, length, generator

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        starts = torch.randint(len(self.tokens) - self.length + 1, (self.batch_size, 1), generator=self.generator)
        places = starts.to(self.tokens.device) + torch.arange(self.length, device=self.tokens.device)
        return self.tokens[places]


def random_batches(tokens: Tensor, batch_size: int, length: int, *, generator: torch.Generator) -> RandomBatches:
    """Endless batches (batch_size, length) of ids for ``training.train``.

    Parameters
    ----------
    tokens : the stream (N,), N >= length; on the device where the batches are wanted.
    generator : on the CPU; the batches depend on its state alone.

    Raises
    ------
    ValueError
        If the stream is shorter than one window.
    """
    return RandomBatches(tokens, batch_size, length, generator)


def _check(tokens: Tensor, length: int) -> None:
    if tokens.ndim != 1:
        raise ValueError(f"tokens must be one stream of ids (N,), got the shape {tuple(tokens.shape)}")
    if not 1 <= length <= len(tokens):
        raise ValueError(f"length must lie between 1 and the {len(tokens)} tokens there are, got {length}")
