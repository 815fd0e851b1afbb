"""Greedy, sampled and beam continuations of left-padded prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from papertrial.lm.anatomy import device_of, unwrap
from papertrial.lm.generation.choosing import draw, truncate
from papertrial.lm.generation.inputs import as_prompt, evaluating
from papertrial.lm.generation.stepping import StepDecoder
from papertrial.lm.models import quiet_transformers

LogitsFunction = Callable[[Tensor, Tensor], Tensor]
"""``(input_ids (N, t), scores (N, V)) -> scores (N, V)``: a ``LogitsProcessor`` or a plain function."""


@dataclass(frozen=True)
class Generation:
    """What a decoder produced for N rows; T is the length of the longest continuation.

    Attributes
    ----------
    prompt_ids, prompt_mask
        (N, S), as given; with several samples per prompt each prompt is repeated, copies side by side.
    tokens
        (N, T) new tokens; padding after the end of a row.
    mask
        (N, T) bool, true for real tokens, the end token included.
    log_probs
        (N, T) float32, log p of each token under the model itself: no temperature, truncation or processor. 0 where
        masked.
    finished
        (N,) bool, true where the row ended with an end token rather than at the length limit.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    tokens: Tensor
    mask: Tensor
    log_probs: Tensor
    finished: Tensor

    @property
    def sequences(self) -> Tensor:
        """Prompt and continuation (N, S + T)."""
        return torch.cat([self.prompt_ids, self.tokens], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """The mask (N, S + T) of :attr:`sequences`, int64."""
        return torch.cat([self.prompt_mask, self.mask.long()], dim=1)

    @property
    def lengths(self) -> Tensor:
        """Real tokens per continuation (N,), the end token included."""
        return self.mask.sum(-1)

    def continuations(self) -> list[list[int]]:
        """The new tokens of each row as lists, without padding."""
        return [row[keep].tolist() for row, keep in zip(self.tokens, self.mask, strict=True)]

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The continuations as text, special tokens left out."""
        return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in self.continuations()]


def row_uniforms(
    generator: torch.Generator | Sequence[torch.Generator], rows: int, steps: int, device: torch.device
) -> Tensor:
    """Uniform numbers (rows, steps); row r depends on r and the generator only, not on how many rows there are."""
    if isinstance(generator, torch.Generator):
        seeds = [int(torch.randint(2**62, (1,), generator=generator, device=generator.device)) for _ in range(rows)]
        sources = [torch.Generator().manual_seed(seed) for seed in seeds]
    else:
        sources = list(generator)
        if len(sources) != rows:
            raise ValueError(f"generator has {len(sources)} entries, one per sampled row ({rows}) is needed")
    draws = [torch.rand(steps, generator=g, dtype=torch.float64, device=g.device).to(device) for g in sources]
    return torch.stack(draws)


def end_tokens(eos_token_id: int | Sequence[int] | None, device: torch.device) -> Tensor:
    if eos_token_id is None:
        return torch.empty(0, dtype=torch.long, device=device)
    return torch.as_tensor([eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id), device=device)


def padding_token(model: PreTrainedModel, pad_token_id: int | None, ends: Tensor) -> int:
    """What fills a finished row: as asked, else the model's padding token, else its first end token."""
    if pad_token_id is None:
        pad_token_id = getattr(unwrap(model).config, "pad_token_id", None)
    if pad_token_id is None:
        pad_token_id = int(ends[0]) if len(ends) else 0
    return pad_token_id


def _decode(
    decoder: StepDecoder,
    choose: Callable[[Tensor, int], Tensor],
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None,
    pad_token_id: int | None,
    processors: Sequence[LogitsFunction],
) -> Generation:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    prompt_ids, prompt_mask = decoder.input_ids, decoder.attention_mask
    ends = end_tokens(eos_token_id, prompt_ids.device)
    pad = padding_token(decoder.model, pad_token_id, ends)
    alive = torch.ones(prompt_ids.shape[0], dtype=torch.bool, device=prompt_ids.device)
    tokens, mask, log_probs = [], [], []
    for step in range(max_new_tokens):
        scores = decoder.logits
        for processor in processors:
            scores = processor(decoder.input_ids, scores)
        token = choose(scores, step).masked_fill(~alive, pad)
        log_prob = decoder.logits.log_softmax(-1).gather(-1, token[:, None])[:, 0]
        tokens.append(token)
        mask.append(alive)
        log_probs.append(log_prob.masked_fill(~alive, 0.0))
        alive = alive & ~torch.isin(token, ends)
        if not bool(alive.any()):
            break
        if step + 1 < max_new_tokens:
            decoder.step(token)
    return Generation(
        prompt_ids, prompt_mask, torch.stack(tokens, 1), torch.stack(mask, 1), torch.stack(log_probs, 1), ~alive
    )


def greedy(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    processors: Sequence[LogitsFunction] = (),
    use_cache: bool = True,
) -> Generation:
    """The most probable token at each step.

    Parameters
    ----------
    input_ids, attention_mask
        Prompts (B, S), padded on the left.
    eos_token_id
        A row ends after any of these; None runs every row to ``max_new_tokens``.
    pad_token_id
        Fills finished rows; default: the model's padding token, else the first end token.
    processors
        Applied to the scores in turn before the choice.

    Returns
    -------
    Generation
        B rows.

    Raises
    ------
    ValueError
        Prompts padded on the right, an empty prompt, more positions than the model has.
    """
    with evaluating(model):
        decoder = StepDecoder(model, input_ids, attention_mask, use_cache=use_cache)
        return _decode(
            decoder,
            lambda scores, _: scores.argmax(-1),
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            processors=processors,
        )


def sample(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    generator: torch.Generator | Sequence[torch.Generator],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_samples: int = 1,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    prefix_forcing: tuple[Tensor, Tensor] | None = None,
    processors: Sequence[LogitsFunction] = (),
    use_cache: bool = True,
) -> Generation:
    """Ancestral sampling, optionally from a sharpened and truncated distribution.

    Parameters
    ----------
    generator
        One generator, from which each row gets its own seed in row order; or one generator per sampled row
        (B * num_samples), so that a row can be reproduced alone or in any other batch.
    temperature, top_k, top_p
        See :func:`truncate`; applied after ``processors``.
    num_samples
        Samples per prompt; rows r*num_samples .. are those of prompt r.
    prefix_forcing
        ``(tokens (R, L), lengths (R,))`` with R = B or B * num_samples: the first ``lengths[r]`` new tokens of row r
        are taken from ``tokens[r]`` instead of being drawn (roll-ins, rollouts from a prefix). They count as new
        tokens.
    input_ids, attention_mask, eos_token_id, pad_token_id, processors
        As in :func:`greedy`.

    Returns
    -------
    Generation
        B * num_samples rows; ``log_probs`` are those of the model's own, unsharpened and untruncated distribution.
    """
    truncate(torch.zeros(1, 1), temperature=temperature, top_k=top_k, top_p=top_p)  # complain before any work
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    rows = input_ids.shape[0] * num_samples
    forced, lengths = _forced_prefix(prefix_forcing, input_ids.shape[0], num_samples, max_new_tokens)
    with evaluating(model):
        decoder = StepDecoder(model, input_ids, attention_mask, use_cache=use_cache)
        decoder.repeat(num_samples)
        device = decoder.input_ids.device
        uniforms = row_uniforms(generator, rows, max_new_tokens, device)
        forced, lengths = forced.to(device), lengths.to(device)

        def choose(scores: Tensor, step: int) -> Tensor:
            token = draw(truncate(scores, temperature=temperature, top_k=top_k, top_p=top_p), uniforms[:, step])
            if step < forced.shape[1]:
                token = torch.where(step < lengths, forced[:, step], token)
            return token

        return _decode(
            decoder,
            choose,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            processors=processors,
        )


def _forced_prefix(
    prefix_forcing: tuple[Tensor, Tensor] | None, prompts: int, num_samples: int, max_new_tokens: int
) -> tuple[Tensor, Tensor]:
    """Forced tokens (rows, L) and how many of them count (rows,)."""
    rows = prompts * num_samples
    if prefix_forcing is None:
        return torch.zeros(rows, 0, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
    tokens, lengths = prefix_forcing
    if tokens.dim() != 2 or lengths.shape != tokens.shape[:1] or tokens.shape[0] not in (prompts, rows):
        raise ValueError(
            f"prefix_forcing must be tokens (R, L) and lengths (R,) with R = {prompts} or {rows}, "
            f"got {tuple(tokens.shape)} and {tuple(lengths.shape)}"
        )
    if int(lengths.min()) < 0 or int(lengths.max()) > min(tokens.shape[1], max_new_tokens):
        raise ValueError(
            f"prefix_forcing lengths must lie between 0 and {min(tokens.shape[1], max_new_tokens)} "
            f"(columns given, and max_new_tokens), got {int(lengths.min())} .. {int(lengths.max())}"
        )
    if tokens.shape[0] != rows:
        tokens, lengths = tokens.repeat_interleave(num_samples, 0), lengths.repeat_interleave(num_samples, 0)
    return tokens, lengths


def beam(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    num_beams: int,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    length_penalty: float = 1.0,
) -> Generation:
    """Beam search by ``model.generate``, the best hypothesis of each row; its log-probabilities are then scored afresh.

    ``length_penalty`` is the exponent of the length by which a hypothesis' log-probability is divided.
    """
    from papertrial.lm.scoring import token_log_probs

    if num_beams < 1:
        raise ValueError(f"num_beams must be at least 1, got {num_beams}")
    device = device_of(model)
    prompt_ids, prompt_mask = as_prompt(input_ids, attention_mask, device)
    ends = end_tokens(eos_token_id, device)
    pad = padding_token(model, pad_token_id, ends)
    with evaluating(model), torch.no_grad(), quiet_transformers():  # it would warn of the -1 below
        sequences = cast(Any, model).generate(
            prompt_ids,
            attention_mask=prompt_mask,
            num_beams=num_beams,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            length_penalty=length_penalty,
            # None would fall back to the end token stored with the model: -1 never occurs
            eos_token_id=ends.tolist() if len(ends) else -1,
            pad_token_id=pad,
        )
        tokens = sequences[:, prompt_ids.shape[1] :]
        ended = torch.isin(tokens, ends).long().cumsum(-1)
        mask = (ended - torch.isin(tokens, ends).long()) == 0
        tokens = tokens.masked_fill(~mask, pad)
        whole_mask = torch.cat([prompt_mask, mask.long()], 1)
        scores = token_log_probs(model, torch.cat([prompt_ids, tokens], 1), whole_mask)[:, prompt_ids.shape[1] - 1 :]
    return Generation(prompt_ids, prompt_mask, tokens, mask, scores.masked_fill(~mask, 0.0), ended[:, -1] > 0)
