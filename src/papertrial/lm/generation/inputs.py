"""What goes into a decoder: positions, left padding, checked prompts."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions (B, T) that ignore padding on the left: 0 at the first real token of each row, also 0 on the padding.

    Pass them to every forward with left padding: models with learned positions are wrong without.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def left_pad(sequences: Sequence[Sequence[int] | Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """Stack id sequences of different lengths, padded on the left.

    Returns
    -------
    tuple
        Ids (B, T) and attention mask (B, T), both int64, T the longest length.
    """
    if len(sequences) == 0:
        raise ValueError("sequences is empty: give at least one")
    lengths = [len(sequence) for sequence in sequences]
    if min(lengths) == 0:
        raise ValueError(f"sequence {lengths.index(0)} is empty: a prompt needs at least one token")
    ids = torch.full((len(sequences), max(lengths)), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, -lengths[row] :] = torch.as_tensor(sequence, dtype=torch.long)
        mask[row, -lengths[row] :] = 1
    return ids, mask


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside the block; every submodule gets its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def as_prompt(input_ids: Tensor, attention_mask: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and int64 mask (B, S) on ``device``; ValueError for empty or right-padded prompts."""
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids must be (rows, tokens) with at least one of each, got shape {tuple(input_ids.shape)}"
        )
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, input_ids is {tuple(input_ids.shape)}")
    if not bool(attention_mask[:, -1].bool().all()):
        raise ValueError("attention_mask ends with 0 in some row: pad prompts on the left (generation.left_pad does)")
    return input_ids.to(device), attention_mask.to(device=device, dtype=torch.long)
