"""Contrastive search and the isotropy of language models (arXiv 2210.14140; the decoder is from arXiv 2202.06417).

At each step the k most probable tokens are weighed by their probability against how much the hidden state that each of
them would get resembles a state already in the context. Deterministic, and on plain checkpoints without training.

>>> ids = contrastive_search(model, input_ids, attention_mask, k=5, alpha=0.6, max_new_tokens=200)   # doctest: +SKIP
>>> model.generate(**inputs, custom_generate=contrastive_generate, penalty_alpha=0.6, top_k=5)       # doctest: +SKIP
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from papertrial.lm.anatomy import position_limit
from papertrial.lm.cache import new_cache
from papertrial.lm.generation import StepDecoder, evaluating, left_pad, position_ids
from papertrial.lm.generation.tree import can_look_ahead, look_ahead

DEFAULT_K = 5  # English open-ended generation, the authors' script
DEFAULT_ALPHA = 0.6


class ContrastiveOutput(NamedTuple):
    """What :func:`scored_contrastive_search` returns; T is the number of new tokens.

    ``sequences`` (B, S + T); ``probability``, ``penalty`` and ``score`` (B, T) of the chosen tokens: the model's
    probability, the largest cosine to a context state, and the weighted difference. Zero after a row's end.
    """

    sequences: Tensor
    probability: Tensor
    penalty: Tensor
    score: Tensor


class _Choice(NamedTuple):
    token: Tensor  # (B,)
    probability: Tensor
    penalty: Tensor
    score: Tensor


def contrastive_search(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    k: int = DEFAULT_K,
    alpha: float = DEFAULT_ALPHA,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continue prompts by contrastive search.

    Parameters
    ----------
    model
        A decoder-only causal language model of transformers.
    input_ids, attention_mask
        Prompts (B, S), padded on the left. All real tokens of the prompt count as context.
    k
        How many of the most probable tokens are weighed; 1 is greedy search.
    alpha
        Weight of the degeneration penalty, in [0, 1]; 0 is greedy search.
    max_new_tokens
        Upper bound of the number of new tokens T.
    eos_token_id
        A row ends after any of these; None runs every row to the bound.
    pad_token_id
        Fills ended rows; default the model's, else the first end token.
    use_cache
        False runs the whole sequence anew for each candidate. So it is in any case for models whose state is not keys
        and values (state-space models), which cannot be repeated and taken back.

    Returns
    -------
    Tensor
        (B, S + T) prompt and continuation, T <= ``max_new_tokens``.

    Raises
    ------
    ValueError
        k < 1 or above the vocabulary, alpha outside [0, 1], an empty or right-padded prompt, a model that is not a
        decoder, or a sequence longer than the model's position table.

    References
    ----------
    arXiv 2210.14140, section 2; arXiv 2202.06417, equation 5.
    """
    return scored_contrastive_search(
        model,
        input_ids,
        attention_mask,
        k=k,
        alpha=alpha,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        use_cache=use_cache,
    ).sequences


def scored_contrastive_search(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    k: int = DEFAULT_K,
    alpha: float = DEFAULT_ALPHA,
    max_new_tokens: int,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    use_cache: bool = True,
) -> ContrastiveOutput:
    """Contrastive search, and what each choice was made of. Arguments and errors: :func:`contrastive_search`."""
    _check(model, k, alpha)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    ends = _as_ends(eos_token_id, input_ids.device)
    with evaluating(model), torch.no_grad():
        cached = use_cache and _keeps_keys_and_values(model)
        decoder = StepDecoder(model, input_ids, attention_mask, use_cache=cached, keep_hidden=True)
        ends = ends.to(decoder.input_ids.device)
        pad = _pad_token(model, pad_token_id, ends)
        tokens: list[Tensor] = []
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        alive = torch.ones(len(decoder.input_ids), dtype=torch.bool, device=decoder.input_ids.device)
        for choice in _steps(decoder, k, alpha, max_new_tokens):
            tokens.append(choice.token.masked_fill(~alive, pad))
            parts.append(tuple(v.masked_fill(~alive, 0.0) for v in (choice.probability, choice.penalty, choice.score)))  # type: ignore[arg-type]
            alive = alive & ~torch.isin(choice.token, ends)
            if not bool(alive.any()):
                break
    sequences = torch.cat([input_ids.to(alive.device), torch.stack(tokens, 1)], 1)
    return ContrastiveOutput(sequences, *(torch.stack(part, 1) for part in zip(*parts, strict=True)))


def contrastive_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **model_kwargs: Any,
) -> Tensor:
    """Contrastive search as a ``custom_generate`` of ``model.generate``.

    Reads ``penalty_alpha`` (default 0.6) and ``top_k`` (default 5) from the generation config, and honours the logits
    processors (applied before the softmax), the stopping criteria, end tokens and padding that ``generate`` prepared.

    >>> model.generate(ids, custom_generate=contrastive_generate, penalty_alpha=0.6, top_k=5)   # doctest: +SKIP
    """
    given_k, given_alpha = generation_config.top_k, generation_config.penalty_alpha
    k = DEFAULT_K if given_k is None else given_k
    alpha = DEFAULT_ALPHA if given_alpha is None else given_alpha
    _check(model, k, alpha)
    ends = _as_ends(generation_config.eos_token_id, input_ids.device)
    pad = _pad_token(model, generation_config.pad_token_id, ends)
    sequences = input_ids
    alive = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
    with evaluating(model), torch.no_grad():
        cached = model_kwargs.get("use_cache") is not False and _keeps_keys_and_values(model)
        mask = model_kwargs.get("attention_mask")
        decoder = StepDecoder(model, input_ids, mask, use_cache=cached, keep_hidden=True)
        for choice in _steps(decoder, k, alpha, None, logits_processor):
            sequences = torch.cat([sequences, choice.token.masked_fill(~alive, pad)[:, None]], 1)
            alive = alive & ~torch.isin(choice.token, ends) & ~stopping_criteria(sequences, None)
            if not bool(alive.any()):
                return sequences
    raise AssertionError("the steps end only with the stopping criteria")


def _steps(
    decoder: StepDecoder,
    k: int,
    alpha: float,
    limit: int | None,
    processor: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Iterator[_Choice]:
    """Choose token after token; the decoder moves on with each. ``limit`` None goes on for ever."""
    context = normalize(_states(decoder).float(), dim=-1)  # (B, t, D)
    made = 0
    while limit is None or made < limit:
        logits = decoder.logits if processor is None else processor(decoder.input_ids, decoder.logits)
        top = logits.softmax(-1).topk(k, dim=-1)  # (B, k), sorted: the first of equal scores is the most probable
        padding = ~decoder.attention_mask[:, None].bool()
        hidden, commit = _candidate_states(decoder, top.indices)
        candidates = normalize(hidden.float(), dim=-1)  # (B, k, D)
        cosines = candidates @ context.mT  # (B, k, t)
        penalty = cosines.masked_fill(padding, -2.0).amax(-1)  # below every cosine
        score = (1 - alpha) * top.values - alpha * penalty
        winner = _first_argmax(score)
        rows = torch.arange(len(winner), device=winner.device)
        commit(winner)
        context = torch.cat([context, candidates[rows, winner][:, None]], 1)
        made += 1
        yield _Choice(top.indices[rows, winner], top.values[rows, winner], penalty[rows, winner], score[rows, winner])


def _candidate_states(decoder: StepDecoder, tokens: Tensor) -> tuple[Tensor, Callable[[Tensor], None]]:
    """Final hidden state (B, k, D) of each candidate at its own position, and how to go on with the winners."""
    k = tokens.shape[1]
    if can_look_ahead(decoder, k):
        ahead = look_ahead(decoder, tokens, [-1] * k)
        assert ahead.hidden is not None
        return ahead.hidden, lambda winner: ahead.accept(winner[:, None])
    decoder.repeat(k)
    decoder.step(tokens.reshape(-1))
    hidden = _states(decoder)[:, -1].reshape(*tokens.shape, -1)
    first = torch.arange(len(tokens), device=tokens.device) * k
    return hidden, lambda winner: decoder.select(first + winner)


def _first_argmax(score: Tensor) -> Tensor:
    """Index (B,) of the largest of each row, the first of equals (``argmax`` promises none in particular)."""
    best = score == score.amax(-1, keepdim=True)
    return torch.where(best, torch.arange(score.shape[1], device=score.device), score.shape[1]).amin(-1)


def _states(decoder: StepDecoder) -> Tensor:
    assert decoder.hidden is not None
    return decoder.hidden


def _check(model: PreTrainedModel, k: int, alpha: float) -> None:
    vocabulary = model.config.vocab_size
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k must lie between 1 and the vocabulary of {vocabulary}, got {k}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    headless = model.get_output_embeddings() is None or not model.can_generate()
    if headless or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} does not generate text: give a decoder with a language-model head")


def _keeps_keys_and_values(model: PreTrainedModel) -> bool:
    try:
        new_cache(model)
    except ValueError:
        return False
    return True


def _as_ends(eos_token_id: int | Sequence[int] | Tensor | None, device: torch.device) -> Tensor:
    if eos_token_id is None:
        return torch.empty(0, dtype=torch.long, device=device)
    return torch.as_tensor(eos_token_id, device=device).reshape(-1)


def _pad_token(model: PreTrainedModel, pad_token_id: int | None, ends: Tensor) -> int:
    if pad_token_id is None:
        pad_token_id = model.config.pad_token_id
    return pad_token_id if pad_token_id is not None else int(ends[0]) if len(ends) else 0


# -- isotropy ----------------------------------------------------------------------------------------------------


def self_similarity_matrix(hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cosine similarity of every pair of token states of one text.

    Parameters
    ----------
    hidden
        (S, D) last-layer states.
    mask
        Bool or 0/1 (S,), false on padding; those rows and columns become 0.

    Returns
    -------
    Tensor
        (S, S) float32.
    """
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be (tokens, width), got shape {tuple(hidden.shape)}")
    unit = normalize(hidden.float(), dim=-1)
    if mask is not None:
        unit = unit * mask.to(unit)[:, None]
    return unit @ unit.mT


def isotropy_of_states(states: Sequence[Tensor]) -> float:
    """1 minus the mean cosine over all pairs of different tokens of the same text, pooled over texts.

    Parameters
    ----------
    states
        One (S, D) tensor of last-layer states per text, without padding. Texts of one token have no pair.

    Returns
    -------
    float
        0 where all states of a text point the same way, 1 where they are orthogonal.

    References
    ----------
    arXiv 2210.14140, section 3.
    """
    similarity, pairs = 0.0, 0
    for hidden in states:
        if hidden.dim() != 2:
            raise ValueError(f"every text's states must be (tokens, width), got shape {tuple(hidden.shape)}")
        unit = normalize(hidden.double(), dim=-1)
        # the sum over all pairs is the squared length of the sum; each token's cosine with itself is taken out
        similarity += float(unit.sum(0).square().sum() - unit.square().sum())
        pairs += len(hidden) * (len(hidden) - 1)
    if pairs == 0:
        raise ValueError("isotropy needs at least one text of two tokens or more")
    return 1.0 - similarity / pairs


@torch.no_grad()
def isotropy(
    model: PreTrainedModel,
    texts: Sequence[str] | Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    max_length: int = 512,
    batch_size: int = 16,
) -> float:
    """Isotropy of a model's last-layer token states on texts.

    Parameters
    ----------
    model
        Any transformers model with hidden states, decoder or encoder.
    texts
        Strings (then ``tokenizer`` is needed; it adds BOS where its family uses one), or lists of token ids.
    max_length
        Longer texts are cut there, as in the paper's measurement, or where the model's position table ends.

    Returns
    -------
    float
        See :func:`isotropy_of_states`.
    """
    if len(texts) == 0:
        raise ValueError("texts is empty: give at least one")
    max_length = min(max_length, position_limit(model) or max_length)
    if isinstance(texts[0], str):
        if tokenizer is None:
            raise ValueError("texts are strings: give the model's tokenizer as well")
        ids = [tokenizer(text)["input_ids"][:max_length] for text in texts]
    else:
        ids = [list(text)[:max_length] for text in texts]  # type: ignore[arg-type]
    ids = [sequence for sequence in ids if len(sequence) > 1]
    states: list[Tensor] = []
    decoder = model.can_generate()
    body = model.base_model
    with evaluating(model):
        for start in range(0, len(ids), batch_size):
            batch, mask = left_pad(ids[start : start + batch_size], 0)
            batch, mask = batch.to(model.device), mask.to(model.device)
            if not decoder:  # encoders count positions from the left
                batch, mask = _to_right(batch, mask)
            positions = {"position_ids": position_ids(mask)} if decoder else {}
            hidden = body(input_ids=batch, attention_mask=mask, **positions).last_hidden_state
            states += [row[keep] for row, keep in zip(hidden, mask.bool(), strict=True)]
    return isotropy_of_states(states)


def _to_right(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move padding from the left to the right of each row."""
    order = mask.argsort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), mask.gather(1, order)
