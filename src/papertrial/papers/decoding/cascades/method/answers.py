"""What a rule may know of an input: the small model's answer, its token log-probabilities, and cheap states."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from papertrial.lm.anatomy import device_of, unwrap
from papertrial.lm.generation import evaluating, greedy, position_ids
from papertrial.lm.generation.decoding import end_tokens, padding_token
from papertrial.lm.generation.inputs import as_prompt
from papertrial.lm.models import quiet_transformers
from papertrial.papers.decoding.cascades.method.early import early_states, start_token


@dataclass(frozen=True)
class Records:
    """One model's answers to N inputs.

    Attributes
    ----------
    tokens
        Answers, the end token included where the model wrote one.
    log_probs
        For each answer the log-probability of its tokens under the model itself (n_i,), float32: no temperature, no
        truncation, no padding.
    states
        (N, D) mean over each answer's tokens of the last-layer states that they were predicted from.
    prompt_lengths
        (N,) tokens of the inputs.
    early
        (N, D') early states of the large model, where they were asked for; see :func:`early_states`.
    """

    tokens: list[list[int]]
    log_probs: list[Tensor]
    states: Tensor
    prompt_lengths: Tensor
    early: Tensor | None = None

    def __post_init__(self) -> None:
        sizes = {len(self.tokens), len(self.log_probs), len(self.states), len(self.prompt_lengths)}
        sizes |= {len(self.early)} if self.early is not None else set()
        if len(sizes) != 1:
            raise ValueError(f"the columns of the records have different lengths: {sorted(sizes)}")
        for n, (ids, scores) in enumerate(zip(self.tokens, self.log_probs, strict=True)):
            if len(ids) != len(scores) or not ids:
                raise ValueError(
                    f"answer {n} has {len(ids)} tokens and {len(scores)} log-probabilities: one each, at least"
                )

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Tensor:
        """Tokens per answer (N,)."""
        return torch.tensor([len(ids) for ids in self.tokens])

    def rows(self, chosen: Sequence[int] | Tensor) -> "Records":
        """The records with these numbers, in this order."""
        numbers = torch.as_tensor(chosen, dtype=torch.long)
        return Records(
            [self.tokens[n] for n in numbers.tolist()],
            [self.log_probs[n] for n in numbers.tolist()],
            self.states[numbers],
            self.prompt_lengths[numbers],
            None if self.early is None else self.early[numbers],
        )

    @classmethod
    def join(cls, parts: Sequence["Records"]) -> "Records":
        """Records of several batches, one after another.

        Raises
        ------
        ValueError
            No batch, or early states in some of them only.
        """
        if not parts:
            raise ValueError("parts is empty: give at least one batch of records")
        early = [part.early for part in parts if part.early is not None]
        if early and len(early) < len(parts):
            raise ValueError(f"parts: {len(early)} of {len(parts)} have early states; make all with large=..., or none")
        return cls(
            [ids for part in parts for ids in part.tokens],
            [row for part in parts for row in part.log_probs],
            torch.cat([part.states for part in parts]),
            torch.cat([part.prompt_lengths for part in parts]),
            torch.cat(early) if early else None,
        )


def answer(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    large: PreTrainedModel | None = None,
    layer: int = 1,
) -> Records:
    """Greedy answers of a decoder or an encoder-decoder, and what deferral rules read of them.

    Parameters
    ----------
    input_ids, attention_mask
        Inputs (N, S), padded on the left for decoders.
    eos_token_id
        An answer ends with any of these; the token belongs to it.
    large, layer
        If given, also that model's early states, see :func:`early_states`.

    Raises
    ------
    ValueError
        Empty or wrongly padded inputs.
    """
    device = device_of(model)
    with evaluating(model), torch.no_grad():
        if model.config.is_encoder_decoder:
            input_ids, attention_mask = _as_encoder_input(input_ids, attention_mask, device)
            tokens, mask = _decode_with_encoder(model, input_ids, attention_mask, max_new_tokens, eos_token_id)
        else:
            input_ids, attention_mask = as_prompt(input_ids, attention_mask, device)
            made = greedy(model, input_ids, attention_mask, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id)
            tokens, mask = made.tokens, made.mask
        log_probs, states = teacher_forced(model, input_ids, attention_mask, tokens, mask)
    weight = mask[..., None].float()
    return Records(
        [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)],
        [row[keep].cpu() for row, keep in zip(log_probs, mask, strict=True)],
        ((states.float() * weight).sum(1) / weight.sum(1)).cpu(),
        attention_mask.sum(1).cpu(),
        None if large is None else early_states(large, input_ids, attention_mask, layer=layer).cpu(),
    )


def _as_encoder_input(input_ids: Tensor, mask: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids must be (rows, tokens) with at least one of each, got shape {tuple(input_ids.shape)}"
        )
    mask = torch.ones_like(input_ids) if mask is None else mask
    if mask.shape != input_ids.shape or not bool(mask.any(1).all()):
        raise ValueError(
            f"attention_mask must be {tuple(input_ids.shape)} as input_ids, with a token in every row; got "
            f"{tuple(mask.shape)}"
        )
    return input_ids.to(device), mask.to(device=device, dtype=torch.long)


def _decode_with_encoder(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, limit: int, eos: int | Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """Tokens (N, T) without the start token, and which of them are real."""
    ends = end_tokens(eos, input_ids.device)
    pad = padding_token(model, None, ends)
    with quiet_transformers():  # it would warn of -1, which never occurs and so ends nothing
        sequences = cast(Any, model).generate(
            input_ids, attention_mask=attention_mask, num_beams=1, do_sample=False, max_new_tokens=limit,
            eos_token_id=ends.tolist() if len(ends) else -1, pad_token_id=pad,
        )  # fmt: skip
    tokens = sequences[:, 1:]
    ended = torch.isin(tokens, ends).long()
    return tokens, ended.cumsum(1) - ended == 0


@torch.no_grad()
def teacher_forced(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, tokens: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """One pass over inputs and given answers.

    Returns
    -------
    tuple
        Log-probabilities (N, T) of the answers' tokens, float32, and the last-layer states (N, T, D) that each of them
        was predicted from, as the output embedding reads them. Values behind the end of an answer (``mask`` false)
        mean nothing.
    """
    inputs: dict[str, Any] = {"use_cache": False}
    if model.config.is_encoder_decoder:
        start = torch.full_like(tokens[:, :1], start_token(model))
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs["decoder_input_ids"] = torch.cat([start, tokens[:, :-1]], 1)
        places = slice(None)
    else:
        whole = torch.cat([attention_mask, mask.to(attention_mask)], 1)
        inputs |= {"input_ids": torch.cat([input_ids, tokens], 1), "attention_mask": whole}
        known = inspect.signature(unwrap(model).forward).parameters
        if "position_ids" in known:
            inputs["position_ids"] = position_ids(whole)
        if "logits_to_keep" in known:
            inputs["logits_to_keep"] = tokens.shape[1] + 1
        places = slice(-tokens.shape[1] - 1, -1)
    # read at the head alone: output_hidden_states would keep those of every layer
    seen: list[Tensor] = []
    handle = cast(Any, model.get_output_embeddings()).register_forward_pre_hook(lambda _, read: seen.append(read[0]))
    try:
        logits = model(**inputs).logits[:, places]
    finally:
        handle.remove()
    # row by row: of a large vocabulary, float32 copies of a whole batch would not fit
    log_probs = [
        row.float().log_softmax(-1).gather(1, ids[:, None])[:, 0] for row, ids in zip(logits, tokens, strict=True)
    ]
    return torch.stack(log_probs), seen[0][:, places]
