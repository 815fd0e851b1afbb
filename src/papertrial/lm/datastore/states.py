"""The activations that predict each token of a text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from papertrial.lm.anatomy import anatomy, body
from papertrial.lm.generation import evaluating, left_pad
from papertrial.lm.hooks import BLOCK_SITES, SITES, record
from papertrial.lm.scoring import windows
from papertrial.lm.scoring.forward import forward_inputs

Sequences = Sequence[Sequence[int] | Tensor]


@dataclass(frozen=True)
class KeySite:
    """Which activation: a site of :mod:`papertrial.lm.hooks` and its layer (negative: from the end).

    The default is what nearest-neighbour language models use: the input of the last feed-forward layer (1911.00172,
    section 2). ``KeySite("final_hidden", None)`` is the vector that the unembedding reads.
    """

    site: str = "ffn_in"
    layer: int | None = -1

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise ValueError(f"unknown site {self.site!r}; known: {', '.join(SITES)}")
        if (self.layer is None) == (self.site in BLOCK_SITES):
            raise ValueError(f"site {self.site!r} " + ("needs a layer" if self.layer is None else "takes no layer"))


class StateBatch(NamedTuple):
    """Consecutive targets of a text. ``states`` maps a name to (n, D) float32; ``targets`` (n,) int64."""

    states: dict[str, Tensor]
    targets: Tensor


def pieces_of(sequences: Sequences, window: int, stride: int | None) -> list[tuple[Tensor, int]]:
    """Windows of every sequence in order, each with the number of its last tokens that are targets."""
    if window < 2:
        raise ValueError(f"window must be at least 2 tokens, got {window}")
    pieces = []
    for sequence in sequences:
        ids = torch.as_tensor(sequence, dtype=torch.long)
        for start, stop, first in windows(len(ids), window, window // 2 if stride is None else stride):
            pieces.append((ids[start:stop], stop - first))
    return pieces


def target_states(
    model: PreTrainedModel,
    sequences: Sequences,
    sites: Mapping[str, KeySite],
    *,
    window: int,
    stride: int | None = None,
    batch_size: int = 16,
    first_batch: int = 0,
) -> Iterator[StateBatch]:
    """The activations at the position before each token, for every token but each sequence's first, in text order.

    Parameters
    ----------
    model
        A decoder of a family that :func:`papertrial.lm.anatomy.anatomy` knows.
    sequences
        Lists of token ids without padding, one per document; begin them with a beginning-of-sequence token.
    sites
        What to take, by any name.
    window, stride
        Longest context, and the step between windows (default half a window): every token is a target once, in the
        first window that holds it (``papertrial.lm.scoring.windows``).
    batch_size
        Windows per forward pass.
    first_batch
        Batches to leave out at the beginning: the same batches come out, whatever was left out before them.

    Yields
    ------
    StateBatch
        On the model's device.

    Raises
    ------
    ValueError
        Unknown sites, a window below 2 or beyond the model's position table.
    """
    if not sites:
        raise ValueError("sites is empty: give at least one name with its KeySite")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    pieces = pieces_of(sequences, window, stride)
    count = len(anatomy(model).blocks)
    layers = sorted({site.layer % count for site in sites.values() if site.layer is not None})
    wrong = [site.layer for site in sites.values() if site.layer is not None and not -count <= site.layer < count]
    if wrong:
        raise ValueError(f"the model has layers 0 .. {count - 1}, got the layer {wrong[0]}")
    for start in range(first_batch * batch_size, len(pieces), batch_size):
        group = pieces[start : start + batch_size]
        ids, mask = left_pad([tokens for tokens, _ in group], pad_id=0)
        inputs, ids, _ = forward_inputs(model, ids, mask)
        names = {site.site for site in sites.values()}
        with torch.no_grad(), evaluating(model), record(model, names, layers=layers) as seen:
            body(model)(**inputs)
        # left padding: the targets of a window are its last tokens, their states those one step earlier
        wanted = torch.zeros(ids.shape, dtype=torch.bool)
        for row, (_, targets) in enumerate(group):
            wanted[row, -targets:] = True
        wanted = wanted.to(ids.device)
        before = wanted.roll(-1, dims=1)
        found = {
            name: (seen[at.site] if at.layer is None else seen[at.site][at.layer % count])[before].float()
            for name, at in sites.items()
        }
        yield StateBatch(found, ids[wanted])
