"""Preference pairs as token ids, from ids or from text, and batches of them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from papertrial.lm.losses import IGNORED

LARGEST_LINE = 4 * 2**20  # characters of one JSON line: far above any context window, far below memory

CACHED = "ref_logps"
"""The extra that ``cache_reference`` writes: log-probabilities of the answer tokens under the reference."""


def _ids(name: str, values: Sequence[int] | Tensor) -> Tensor:
    if isinstance(values, str):
        raise TypeError(f"{name} is text; make pairs from text with PreferencePair.from_text, which needs a tokenizer")
    ids = torch.as_tensor(values)
    if ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f"{name} must be a row of at least one token id, got the shape {tuple(ids.shape)}")
    if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise TypeError(f"{name} must hold integers, got {ids.dtype}")
    if int(ids.min()) < 0:
        raise ValueError(f"{name} holds the negative id {int(ids.min())}")
    return ids.long()


def check_ids(name: str, ids: Tensor, vocabulary: int) -> None:
    """ValueError unless every id, of any shape, lies in 0 .. vocabulary - 1; ``name`` says whose they are."""
    if ids.numel() == 0:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"{name} holds the id {low if low < 0 else high}, and the vocabulary has the ids 0 to {vocabulary - 1}: "
            "tokenise with the tokenizer of this model"
        )


@dataclass(frozen=True, eq=False)
class PreferencePair:
    """A prompt with a preferred and a rejected answer.

    Attributes
    ----------
    prompt_ids, chosen_ids, rejected_ids
        Token ids (P,), (T_w,), (T_l,), each with at least one; lists are turned into int64 tensors. The prompt holds
        the beginning-of-sequence token where the model wants one, an answer its end token if it is to learn to stop.
    chosen_extras, rejected_extras
        Values per answer token by name, (T_w,) and (T_l,): token rewards, scores, weights. A name that only one side
        has counts as zeros on the other.
    """

    prompt_ids: Tensor
    chosen_ids: Tensor
    rejected_ids: Tensor
    chosen_extras: Mapping[str, Tensor] = field(default_factory=dict)
    rejected_extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            object.__setattr__(self, name, _ids(name, getattr(self, name)))
        for side in ("chosen", "rejected"):
            ids = getattr(self, f"{side}_ids")
            extras = {n: torch.as_tensor(v).float() for n, v in getattr(self, f"{side}_extras").items()}
            for name, values in extras.items():
                if values.shape != ids.shape:
                    raise ValueError(
                        f"{side}_extras[{name!r}] needs one value for each of the {len(ids)} answer tokens, "
                        f"got the shape {tuple(values.shape)}"
                    )
            object.__setattr__(self, f"{side}_extras", extras)

    @classmethod
    def from_text(
        cls,
        prompt: str | Sequence[Mapping[str, str]],
        chosen: str,
        rejected: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        end: bool = True,
    ) -> "PreferencePair":
        """Tokenise a pair. Prompt and answers are tokenised apart, so that both answers follow the very same prompt.

        Parameters
        ----------
        prompt
            Text, tokenised with the special tokens that the family puts in front (but none behind); or chat messages
            (``{"role", "content"}``), rendered by the tokenizer's chat template up to the assistant's turn.
        end
            Append the end token to both answers.
        """
        ids: list[int]
        if isinstance(prompt, str):
            ids = list(cast(Any, tokenizer(prompt)["input_ids"]))
            plain = list(cast(Any, tokenizer(prompt, add_special_tokens=False)["input_ids"]))
            if ids[-len(plain) - 1 :] == [*plain, tokenizer.eos_token_id]:
                ids.pop()  # an answer that follows the end of a text is not what any model learned
            if not ids and tokenizer.bos_token_id is not None:
                ids = [tokenizer.bos_token_id]
        else:
            turns = [dict(turn) for turn in prompt]
            ids = cast(Any, tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))
        tail = [tokenizer.eos_token_id] if end else []
        if end and tokenizer.eos_token_id is None:
            raise ValueError("end=True, and the tokenizer has no end-of-sequence token: give end=False")
        answers = [tokenizer(text, add_special_tokens=False)["input_ids"] + tail for text in (chosen, rejected)]
        return cls(cast(Any, ids), cast(Any, answers[0]), cast(Any, answers[1]))

    def shortened(self, max_length: int, max_prompt: int) -> "PreferencePair":
        """The pair within a context window: the last ``max_prompt`` tokens of the prompt, the first of each answer.

        Raises
        ------
        ValueError
            If no room is left for an answer.
        """
        if max_prompt < 1:
            raise ValueError(f"max_prompt must be at least 1, got {max_prompt}")
        prompt = self.prompt_ids[-max_prompt:]
        room = max_length - len(prompt)
        if room < 1:
            raise ValueError(
                f"max_length {max_length} leaves no answer token after a prompt of {len(prompt)}: lower max_prompt"
            )
        return PreferencePair(
            prompt,
            self.chosen_ids[:room],
            self.rejected_ids[:room],
            {name: values[:room] for name, values in self.chosen_extras.items()},
            {name: values[:room] for name, values in self.rejected_extras.items()},
        )


def as_pairs(
    pairs: Sequence[PreferencePair | Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase | None = None
) -> list[PreferencePair]:
    """Pairs as given, or from mappings with ``prompt``, ``chosen`` and ``rejected``: token ids, or text to tokenise.

    Raises
    ------
    ValueError
        No pairs, a missing key, or text without a ``tokenizer``; naming the row.
    """
    if len(pairs) == 0:
        raise ValueError("pairs is empty: give at least one")
    done = []
    for row, pair in enumerate(pairs):
        if isinstance(pair, PreferencePair):
            done.append(pair)
            continue
        missing = {"prompt", "chosen", "rejected"} - set(pair)
        if missing:
            raise ValueError(f"pair {row} lacks {', '.join(sorted(missing))}; it has {', '.join(sorted(pair))}")
        prompt, chosen, rejected = (pair[name] for name in ("prompt", "chosen", "rejected"))
        if not isinstance(chosen, str):
            done.append(PreferencePair(prompt, chosen, rejected))
        elif tokenizer is None:
            raise ValueError(f"pair {row} is text: give a tokenizer as well")
        else:
            done.append(PreferencePair.from_text(prompt, chosen, rejected, tokenizer))
    return done


def read_pairs(path: Path | str, tokenizer: PreTrainedTokenizerBase) -> list[PreferencePair]:
    """Pairs from a JSONL file: one object a line with ``prompt`` (text or chat messages), ``chosen`` and ``rejected``.

    Raises
    ------
    ValueError
        Naming the line that is not such an object.
    """
    pairs = []
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(iter(lambda: file.readline(LARGEST_LINE + 1), ""), start=1):
            if len(line) > LARGEST_LINE:
                raise ValueError(f"{path}, line {number}: longer than {LARGEST_LINE} characters")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("chosen"), str):
                    raise ValueError("needs an object with prompt, chosen and rejected as text")
                pairs += as_pairs([row], tokenizer)
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not pairs:
        raise ValueError(f"{path} holds no pairs")
    return pairs


@dataclass(frozen=True, eq=False)
class PreferenceBatch:
    """B pairs as 2B rows, the chosen answers first, padded on the right to one length S.

    Attributes
    ----------
    input_ids, attention_mask
        (2B, S) int64.
    labels
        (2B, S): the ids on answer tokens, -100 on prompt and padding; not shifted.
    extras
        By name (2B, S - 1) float32, shifted: column t belongs to the token at t + 1. Zero off the answers.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.input_ids.shape[0] // 2

    def to(self, device: torch.device | str | None = None, *, non_blocking: bool = False) -> "PreferenceBatch":
        """The same batch on another device."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device or tensor.device, non_blocking=non_blocking)

        extras = {name: move(values) for name, values in self.extras.items()}
        return PreferenceBatch(move(self.input_ids), move(self.attention_mask), move(self.labels), extras)


def collate(pairs: Sequence[PreferencePair], pad_id: int = 0) -> PreferenceBatch:
    """Stack pairs into a batch. ``pad_id`` is any valid id: padding is masked and carries no label."""
    if len(pairs) == 0:
        raise ValueError("pairs is empty: give at least one")
    rows = [(pair.prompt_ids, pair.chosen_ids, pair.chosen_extras) for pair in pairs]
    rows += [(pair.prompt_ids, pair.rejected_ids, pair.rejected_extras) for pair in pairs]
    length = max(len(prompt) + len(answer) for prompt, answer, _ in rows)
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    names = sorted({name for _, _, extras in rows for name in extras})
    if CACHED in names and not all(CACHED in extras for _, _, extras in rows):
        raise ValueError(f"some answers of the batch have {CACHED!r} and some do not: pass all through cache_reference")
    extras = {name: torch.zeros(len(rows), length - 1) for name in names}
    for row, (prompt, answer, values) in enumerate(rows):
        start, stop = len(prompt), len(prompt) + len(answer)
        input_ids[row, :start], input_ids[row, start:stop] = prompt, answer
        attention_mask[row, :stop] = 1
        labels[row, start:stop] = answer
        for name, value in values.items():
            extras[name][row, start - 1 : stop - 1] = value
    return PreferenceBatch(input_ids, attention_mask, labels, extras)


class PairBatches:
    """Endless batches over shuffled epochs; made by :func:`pair_batches`."""

    def __init__(
        self, pairs: Sequence[PreferencePair], batch_size: int, generator: torch.Generator, pad_id: int
    ) -> None:
        if not 1 <= batch_size <= len(pairs):
            raise ValueError(f"batch_size must lie between 1 and the {len(pairs)} pairs there are, got {batch_size}")
        self.pairs, self.batch_size, self.generator, self.pad_id = list(pairs), batch_size, generator, pad_id
        self._order: list[int] = []

    def __iter__(self) -> Iterator[PreferenceBatch]:
        return self

    def __next__(self) -> PreferenceBatch:
        if len(self._order) < self.batch_size:  # the tail of an epoch opens the next one
            self._order += torch.randperm(len(self.pairs), generator=self.generator).tolist()
        rows, self._order = self._order[: self.batch_size], self._order[self.batch_size :]
        return collate([self.pairs[row] for row in rows], self.pad_id)


def pair_batches(
    pairs: Sequence[PreferencePair], batch_size: int, *, generator: torch.Generator, pad_id: int = 0
) -> PairBatches:
    """Endless batches of ``batch_size`` pairs in an order from ``generator``: each once, then each once again ..."""
    return PairBatches(pairs, batch_size, generator, pad_id)
