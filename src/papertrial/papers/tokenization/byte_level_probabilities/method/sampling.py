"""Sampling from any process that gives the next byte: one model, or several averaged (section 5)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from papertrial.lm.generation import draw, truncate
from papertrial.papers.tokenization.byte_level_probabilities.method.characters import listed, pair_up
from papertrial.papers.tokenization.byte_level_probabilities.method.covers import END


class ByteProcess(ABC):
    """A distribution over byte strings, unrolled by ``start``, ``next_byte_logprobs`` and ``advance``."""

    @abstractmethod
    def start(self, text: Any) -> Any:
        """Read one text or a list of them."""

    @abstractmethod
    def next_byte_logprobs(self, state: Any) -> Tensor:
        """(257,) or (B, 257) float64 log-probabilities of the 256 bytes and of the end."""

    @abstractmethod
    def advance(self, state: Any, byte: int | Sequence[int]) -> Any:
        """Append a byte to each text."""

    @abstractmethod
    def select(self, state: Any, rows: Sequence[int]) -> Any:
        """Some of the texts."""

    def generate(
        self,
        text: "str | bytes | Sequence[str | bytes]",
        max_new_bytes: int,
        *,
        temperature: float = 0.0,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        stop: Callable[[bytes], bool] | None = None,
        **start: Any,
    ) -> "bytes | list[bytes]":
        """New bytes after one text, or after each of several.

        Parameters
        ----------
        max_new_bytes
            Upper bound; fewer where the text ends. The last character may be cut.
        temperature
            Exponent 1/T on the byte probabilities; 0 takes the most probable byte each time.
        top_p
            Nucleus on the byte distribution, after the temperature.
        generator
            For temperatures above 0; on the CPU.
        stop
            Called with a text's new bytes after each byte; True ends that text there.
        **start
            Further arguments of ``start``.

        Raises
        ------
        ValueError
            For a negative temperature or no room for a byte, and as in ``start``.
        """
        if max_new_bytes < 1:
            raise ValueError(f"max_new_bytes must be at least 1, got {max_new_bytes}")
        if not temperature >= 0 or math.isinf(temperature):
            raise ValueError(f"temperature must be zero or positive, got {temperature}")
        texts, single = listed("text", text, (str, bytes))
        state = self.start(texts, **start)
        count = len(texts)
        made: list[bytes] = [b""] * count
        going = list(range(count))
        for step in range(max_new_bytes):
            symbols = self._choose(self.next_byte_logprobs(state), temperature, top_p, generator)
            keep = []
            for place, row in enumerate(going):
                if symbols[place] == END:
                    continue
                made[row] += bytes([symbols[place]])
                if stop is None or not stop(made[row]):
                    keep.append(place)
            if not keep or step == max_new_bytes - 1:
                break
            if len(keep) < len(going):
                state = self.select(state, keep)
            state = self.advance(state, [symbols[place] for place in keep])
            going = [going[place] for place in keep]
        return made[0] if single else made

    @staticmethod
    def _choose(
        log_probs: Tensor, temperature: float, top_p: float | None, generator: torch.Generator | None
    ) -> list[int]:
        if temperature == 0:
            return log_probs.argmax(-1).tolist()
        cut = truncate(log_probs, temperature=temperature, top_p=top_p)
        return draw(cut, torch.rand(len(cut), generator=generator)).tolist()


class ByteEnsemble(ByteProcess):
    """Models with different vocabularies, averaged where they meet: at the next byte (section 5).

    Parameters
    ----------
    members
        Byte-level models; each keeps its own tokens and its own cache.
    weights
        One per member, not negative; default equal. The mixture is of probabilities, not of their logarithms.

    Raises
    ------
    ValueError
        Without members, or for weights that do not fit.

    Notes
    -----
    A byte that a member holds impossible after the text can still be drawn from the others; that member is then lost,
    and ``advance`` says so.
    """

    def __init__(self, members: Sequence[ByteProcess], weights: Sequence[float] | None = None) -> None:
        if not members:
            raise ValueError("members is empty: give at least one byte-level model")
        weights = [1.0] * len(members) if weights is None else list(weights)
        if len(weights) != len(members) or min(weights) < 0 or not 0 < sum(weights) < math.inf:
            raise ValueError(f"weights must be {len(members)} numbers, none negative, not all zero; got {weights}")
        self.members = list(members)
        self.log_weights = (torch.tensor(weights, dtype=torch.float64) / sum(weights)).log()

    def start(self, text: Any, **arguments: Any) -> list[Any]:
        """Every member reads the texts."""
        return [member.start(text, **arguments) for member in self.members]

    def next_byte_logprobs(self, state: Sequence[Any]) -> Tensor:
        """log of the weighted mean of the members' probabilities, (257,) or (B, 257) float64."""
        each = torch.stack([m.next_byte_logprobs(s) for m, s in zip(self.members, state, strict=True)], -1)
        return (each + self.log_weights).logsumexp(-1)

    def advance(self, state: Sequence[Any], byte: int | Sequence[int]) -> list[Any]:
        """The same byte for every member."""
        return [m.advance(s, byte) for m, s in zip(self.members, state, strict=True)]

    def select(self, state: Sequence[Any], rows: Sequence[int]) -> list[Any]:
        """Some of the texts."""
        return [m.select(s, rows) for m, s in zip(self.members, state, strict=True)]

    def logprob(self, text: bytes | Sequence[bytes], context: bytes | Sequence[bytes] = b"") -> float | list[float]:
        """log P(text | context) in nats, byte by byte: the mixture is made anew at every byte."""
        texts, contexts, single = pair_up(text, context)
        order = [row for row in range(len(texts)) if texts[row]]
        total = [0.0] * len(texts)
        if not order:
            return 0.0 if single else total
        state = self.start([contexts[row] for row in order])
        for at in range(max(map(len, texts))):
            keep = [place for place, row in enumerate(order) if at < len(texts[row])]
            if len(keep) < len(order):
                state, order = self.select(state, keep), [order[place] for place in keep]
            log_probs = self.next_byte_logprobs(state)
            bytes_ = [texts[row][at] for row in order]
            for place, row in enumerate(order):
                total[row] += float(log_probs[place, bytes_[place]])
            going = [place for place, row in enumerate(order) if at + 1 < len(texts[row])]
            if not going:
                break
            if len(going) < len(order):
                state, order = self.select(state, going), [order[place] for place in going]
                bytes_ = [bytes_[place] for place in going]
            state = self.advance(state, bytes_)
        return total[0] if single else total
