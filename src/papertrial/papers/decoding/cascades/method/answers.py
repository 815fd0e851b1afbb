"""What a rule may know of an input: the small model's answer, its token log-probabilities, and cheap states."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from papertrial.lm.anatomy import anatomy, body, unwrap
from papertrial.lm.generation import evaluating, greedy, position_ids
from papertrial.lm.generation.decoding import end_tokens, padding_token
from papertrial.lm.generation.inputs import as_prompt
from papertrial.lm.models import quiet_transformers


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
        (N, D') early states of the large model, where they were asked for; see :func:`first_layer_states`.
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
        """Records of several batches, one after another."""
        if not parts:
            raise ValueError("parts is empty: give at least one batch of records")
        early = [part.early for part in parts if part.early is not None]
        return cls(
            [ids for part in parts for ids in part.tokens],
            [row for part in parts for row in part.log_probs],
            torch.cat([part.states for part in parts]),
            torch.cat([part.prompt_lengths for part in parts]),
            torch.cat(early) if len(early) == len(parts) else None,
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
        If given, also that model's early states, see :func:`first_layer_states`.

    Raises
    ------
    ValueError
        Empty or wrongly padded inputs.
    """
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        if model.config.is_encoder_decoder:
            input_ids = input_ids.to(device)
            attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(device)
            tokens, mask = _decode_with_encoder(model, input_ids, attention_mask, max_new_tokens, eos_token_id)
        else:
            input_ids, attention_mask = as_prompt(input_ids, attention_mask, device)
            made = greedy(model, input_ids, attention_mask, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id)
            tokens, mask = made.tokens, made.mask
        log_probs, states = teacher_forced(model, input_ids, attention_mask, tokens, mask)
    weight = mask[..., None].to(states)
    return Records(
        [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)],
        [row[keep].cpu() for row, keep in zip(log_probs, mask, strict=True)],
        ((states * weight).sum(1) / weight.sum(1)).cpu(),
        attention_mask.sum(1).cpu(),
        None if large is None else first_layer_states(large, input_ids, attention_mask, layer=layer).cpu(),
    )


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
        was predicted from. Values behind the end of an answer (``mask`` false) mean nothing.
    """
    inputs: dict[str, Any] = {"output_hidden_states": True, "use_cache": False}
    if model.config.is_encoder_decoder:
        start = torch.full_like(tokens[:, :1], int(model.generation_config.decoder_start_token_id or 0))  # type: ignore[union-attr]
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs["decoder_input_ids"] = torch.cat([start, tokens[:, :-1]], 1)
        out = model(**inputs)
        logits, states = out.logits, out.decoder_hidden_states[-1]
    else:
        whole = torch.cat([attention_mask, mask.to(attention_mask)], 1)
        inputs |= {"input_ids": torch.cat([input_ids, tokens], 1), "attention_mask": whole}
        if "position_ids" in inspect.signature(unwrap(model).forward).parameters:
            inputs["position_ids"] = position_ids(whole)
        out = model(**inputs)
        from_here = slice(input_ids.shape[1] - 1, -1)
        logits, states = out.logits[:, from_here], out.hidden_states[-1][:, from_here]
    return logits.float().log_softmax(-1).gather(2, tokens[..., None])[..., 0], states


class _ReachedError(Exception):
    """The layer that is asked for has run: nothing behind it is needed."""


@torch.no_grad()
def first_layer_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, *, layer: int = 1) -> Tensor:
    """State (N, D) behind layer ``layer`` (from 1) of the decoder at the place of the first answer token.

    Only that part of the model is run: of an encoder-decoder the encoder and the first decoder layers, of a decoder its
    first layers over the input.

    Raises
    ------
    ValueError
        If the model has no such layer.
    """
    if model.config.is_encoder_decoder:
        blocks: Any = next(part for part in body(model).children() if isinstance(part, nn.ModuleList))
    else:
        blocks = [block.module for block in anatomy(model).blocks]
    if not 1 <= layer <= len(blocks):
        raise ValueError(f"layer must lie between 1 and {len(blocks)}, got {layer}")
    seen: list[Tensor] = []

    def stop(module: nn.Module, arguments: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)
        raise _ReachedError

    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if model.config.is_encoder_decoder:
        start = int(model.generation_config.decoder_start_token_id or 0)  # type: ignore[union-attr]
        inputs["decoder_input_ids"] = torch.full_like(input_ids[:, :1], start)
    elif "position_ids" in inspect.signature(unwrap(model).forward).parameters:
        inputs["position_ids"] = position_ids(attention_mask)
    handle = blocks[layer - 1].register_forward_hook(stop)
    try:
        with evaluating(model):
            model(**inputs)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return seen[0][:, -1].float()


def forward_flops(
    model: PreTrainedModel, prompt_lengths: Tensor, answer_lengths: Tensor | None = None, *, layer: int | None = None
) -> Tensor:
    """Multiplications and additions (N,) of answering inputs: two per weight of the layers and of the head, and token.

    Parameters
    ----------
    prompt_lengths, answer_lengths
        Tokens (N,). Without answers: of reading the inputs alone.
    layer
        Only the first ``layer`` layers of the decoder, as :func:`first_layer_states` runs them, and no head.
    """
    head = model.get_output_embeddings()
    per_output = 0 if layer is not None or head is None else cast(Tensor, head.weight).numel()
    written = torch.zeros_like(prompt_lengths) if answer_lengths is None else answer_lengths

    def weights(parts: Sequence[nn.Module]) -> int:
        return sum(p.numel() for part in parts for p in part.parameters() if p.dim() > 1)

    if model.config.is_encoder_decoder:
        encoder = next(part for part in model.get_encoder().children() if isinstance(part, nn.ModuleList))
        decoder = next(part for part in body(model).children() if isinstance(part, nn.ModuleList))
        steps = written.clamp(min=1) if layer is not None else written
        read, made = weights(list(encoder)), weights(list(decoder)[:layer])
        return 2.0 * (read * prompt_lengths + made * steps + per_output * written).double()
    made = weights([block.module for block in anatomy(model).blocks[:layer]])
    return 2.0 * (made * (prompt_lengths + written) + per_output * written).double()
