"""Teacher-forced scores: token log-probabilities, perplexity, bits per byte, multiple choice.

Everything is computed from float32 log-softmax, ignores padding on either side, and never holds more than a fixed
number of logits, so that a vocabulary of 150,000 and a long text fit into memory. A token is scored when it and the
token before it are real: the first token of a sequence has no context and is never scored (give it a
beginning-of-sequence token).
"""

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from papertrial.lm.anatomy import body, device_of, position_limit, read_out, reads_out, unwrap
from papertrial.lm.generation import evaluating, left_pad, position_ids

LOGITS_AT_ONCE = 2**25
"""Default bound on logits in memory: 128 MiB in float32."""


def scored_positions(attention_mask: Tensor) -> Tensor:
    """Which of the targets ``input_ids[:, 1:]`` are scored: (B, T - 1) bool."""
    real = attention_mask.bool()
    return real[:, :-1] & real[:, 1:]


@dataclass(frozen=True)
class TokenScores:
    """Per target token, aligned with ``input_ids[:, 1:]``; all (B, T - 1), zero where ``mask`` is false.

    Attributes
    ----------
    mask
        Bool, true where a token was scored.
    log_probs, entropy, max_log_prob
        Nats, float32: log p of the token, entropy of the distribution, log p of its best token.
    rank
        1 for the most probable token: one more than the number of tokens that are strictly more probable. int64.
    top_p_mass
        Mass of all tokens at least as probable as the token: the smallest nucleus that covers it.
    hidden
        (B, T - 1, D), the state that predicted the token (what the unembedding read); None unless asked for.
    """

    mask: Tensor
    log_probs: Tensor
    entropy: Tensor
    max_log_prob: Tensor
    rank: Tensor
    top_p_mass: Tensor
    hidden: Tensor | None = None


def _inputs(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Keyword arguments of a forward, and ids and mask on the model's device."""
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must be (rows, tokens), got shape {tuple(input_ids.shape)}")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}, input_ids is {tuple(input_ids.shape)}")
    inner = unwrap(model)
    if not reads_out(inner) and not inner.can_generate():
        raise ValueError(f"{type(inner).__name__} does not predict the next token: give a causal language model")
    device = device_of(inner)
    ids, mask = input_ids.to(device), attention_mask.to(device=device, dtype=torch.long)
    positions, limit = position_ids(mask), position_limit(model)
    if limit is not None and ids.numel() and int(positions.max()) >= limit:
        raise ValueError(
            f"a sequence of {int(positions.max()) + 1} tokens does not fit the model's {limit} positions: split it, or "
            "use a function with window and stride"
        )
    # the mask is passed even when it is all ones: without it, positions that jump are read as packed sequences
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "position_ids" in inspect.signature(inner.forward).parameters:
        inputs["position_ids"] = positions
    return inputs, ids, mask


def _stock_forward(model: nn.Module) -> bool:
    """Whether body, then unembedding, is all that ``model.forward`` does: no wrapper, subclass or patched method."""
    if hasattr(model, "get_base_model"):
        configs = getattr(model, "peft_config", {})
        if any(getattr(config, "is_prompt_learning", False) for config in configs.values()) or "forward" in vars(model):
            return False
        model = cast(Any, model).get_base_model()
    stock = type(model).__module__.startswith("transformers.") and "forward" not in vars(model)
    return stock and reads_out(model)


def _states_and_head(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Per-position vectors (B, T, ...) and the function from some of them to float32 logits."""
    if _stock_forward(model):
        hidden = body(model)(**inputs).last_hidden_state
        return hidden, lambda states: read_out(model, states).float()
    logits = model(**inputs).logits
    if logits.shape[:2] != inputs["input_ids"].shape:
        raise ValueError(f"the model returned logits {tuple(logits.shape)} for ids {tuple(inputs['input_ids'].shape)}")
    return logits, lambda states: states.float()


def _chunks(states: Tensor, targets: Tensor, vocabulary: int, logits_at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
    if logits_at_once < 1:
        raise ValueError(f"logits_at_once must be at least 1, got {logits_at_once}")
    size = max(1, logits_at_once // vocabulary)
    return zip(states.split(size), targets.split(size), strict=True)


def token_log_probs(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> Tensor:
    """log p(token t+1 | tokens up to t) in nats, (B, T - 1) float32, 0 where :func:`scored_positions` is false.

    Differentiable where gradients are enabled (chunks are then recomputed in the backward pass, to keep the memory
    bound), and run in the model's current training mode: losses are built on this. See :func:`score_tokens` for
    measuring.

    Parameters
    ----------
    input_ids, attention_mask
        (B, T), padded on either side.
    logits_at_once
        Bound on the number of logits held at a time.
    """
    inputs, ids, mask = _inputs(model, input_ids, attention_mask)
    scored = scored_positions(mask)
    states, head = _states_and_head(model, inputs)

    def chosen(part: Tensor, target: Tensor) -> Tensor:
        return head(part).log_softmax(-1).gather(-1, target[:, None])[:, 0]

    parts = []
    vocabulary = unwrap(model).config.get_text_config().vocab_size
    for part, target in _chunks(states[:, :-1][scored], ids[:, 1:][scored], vocabulary, logits_at_once):
        if torch.is_grad_enabled() and part.requires_grad:
            parts.append(checkpoint(chosen, part, target, use_reentrant=False))
        else:
            parts.append(chosen(part, target))
    log_probs = torch.zeros(scored.shape, dtype=torch.float32, device=ids.device)
    return log_probs.masked_scatter(scored, torch.cat(parts)) if parts else log_probs


@torch.no_grad()
def score_tokens(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    keep_hidden: bool = False,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> TokenScores:
    """Everything that confidence, detection and deferral methods ask of a token, in one pass without gradients.

    Runs in evaluation mode. Arguments as in :func:`token_log_probs`; ``keep_hidden`` also returns the predicting
    states.
    """
    with evaluating(model):
        inputs, ids, mask = _inputs(model, input_ids, attention_mask)
        scored = scored_positions(mask)
        if keep_hidden and not _stock_forward(model):
            raise ValueError(
                f"keep_hidden needs a model whose unembedding is known, {type(unwrap(model)).__name__} is not"
            )
        states, head = _states_and_head(model, inputs)
        columns: list[list[Tensor]] = [[], [], [], [], []]
        vocabulary = unwrap(model).config.get_text_config().vocab_size
        for part, target in _chunks(states[:, :-1][scored], ids[:, 1:][scored], vocabulary, logits_at_once):
            for column, values in zip(columns, _token_statistics(head(part), target), strict=True):
                column.append(values)

    def spread(column: list[Tensor], dtype: torch.dtype) -> Tensor:
        table = torch.zeros(scored.shape, dtype=dtype, device=ids.device)
        return table.masked_scatter(scored, torch.cat(column)) if column else table

    log_probs, entropy, best, rank, mass = columns
    return TokenScores(
        mask=scored,
        log_probs=spread(log_probs, torch.float32),
        entropy=spread(entropy, torch.float32),
        max_log_prob=spread(best, torch.float32),
        rank=spread(rank, torch.long),
        top_p_mass=spread(mass, torch.float32),
        hidden=states[:, :-1].masked_fill(~scored[..., None], 0) if keep_hidden else None,
    )


def _token_statistics(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    chosen = log_probs.gather(-1, target[:, None])
    entropy = torch.special.entr(probs).sum(-1)
    rank = (log_probs > chosen).sum(-1) + 1
    mass = probs.masked_fill(log_probs < chosen, 0.0).sum(-1)
    return chosen[:, 0], entropy, log_probs.max(-1).values, rank, mass


def windows(length: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """Overlapping windows over a sequence, each target in exactly one of them.

    Returns
    -------
    list
        ``(start, stop, first)``: tokens start .. stop - 1 are fed, tokens first .. stop - 1 are scored. From the second
        window on a scored token has at least ``window - stride`` tokens of context.
    """
    if not 1 <= stride < window:
        raise ValueError(f"stride must lie between 1 and window - 1 = {window - 1}, got {stride}")
    spans, first = [], 1
    for start in itertools.count(0, stride):
        stop = min(start + window, length)
        if first < stop:
            spans.append((start, stop, first))
            first = stop
        if stop == length:
            return spans
    raise AssertionError  # unreachable: the loop ends at the last token


def _sequence_scores(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int] | Tensor],
    *,
    window: int | None,
    stride: int | None,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood (N,) in nats, float64, and number of scored tokens (N,)."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if (window is None) != (stride is None):
        raise ValueError("window and stride go together: give both, or neither for whole sequences")
    pieces: list[tuple[int, int, Tensor]] = []
    counts = torch.zeros(len(sequences), dtype=torch.long)
    for index, sequence in enumerate(sequences):
        ids = torch.as_tensor(sequence, dtype=torch.long)
        whole = [(0, len(ids), 1)] if len(ids) > 1 else []
        spans = whole if window is None or stride is None else windows(len(ids), window, stride)
        pieces += [(index, stop - first, ids[start:stop]) for start, stop, first in spans]
        counts[index] = max(len(ids) - 1, 0)
    # alike lengths together: less padding; the result does not depend on the order
    pieces.sort(key=lambda piece: len(piece[2]))
    nll = torch.zeros(len(sequences), dtype=torch.float64)
    with torch.no_grad(), evaluating(model):
        for group in _groups(pieces, batch_size):
            ids, mask = left_pad([tokens for _, _, tokens in group], pad_id=0)
            scores = token_log_probs(model, ids, mask).double().cpu()
            for (index, last, _), row in zip(group, scores, strict=True):
                nll[index] -= row[-last:].sum()
    return nll, counts


def _groups(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def sequence_nll(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int] | Tensor],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> Tensor:
    """Negative log-likelihood of each sequence after its first token, (N,) nats, float64.

    Parameters
    ----------
    sequences
        N id sequences without padding.
    window, stride
        For texts longer than the model's context: see :func:`windows`. Each token is scored once. Default: whole
        sequences.
    batch_size
        Windows per forward.
    """
    return _sequence_scores(model, sequences, window=window, stride=stride, batch_size=batch_size)[0]


def perplexity(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int] | Tensor],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> float:
    """exp of the mean negative log-likelihood over all scored tokens of all sequences. Arguments: :func:`sequence_nll`.

    Comparable between models with the same tokenizer only; otherwise use :func:`bits_per_byte`.
    """
    nll, counts = _sequence_scores(model, sequences, window=window, stride=stride, batch_size=batch_size)
    if int(counts.sum()) == 0:
        raise ValueError("sequences has no token with a context: give sequences of at least two tokens")
    return math.exp(float(nll.sum()) / int(counts.sum()))


def text_bits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    bos_token_id: int,
    eos_token_id: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> tuple[Tensor, Tensor]:
    """Bits that the model needs for each text, and its length in UTF-8 bytes: (N,) float64, (N,) int64.

    Parameters
    ----------
    bos_token_id
        Fed before each text, so that the first token is paid for like every other; itself free of charge. The
        tokenizer's own special tokens are not added.
    eos_token_id
        If given, appended and paid for: the code is then that of a complete text.
    window, stride, batch_size
        As in :func:`sequence_nll`; the first window of a text begins with ``bos_token_id``, later ones in the text.

    Raises
    ------
    ValueError
        If the tokenizer loses something of a text (unknown characters, normalisation): its bits would be too few.
    """
    sequences = []
    for index, text in enumerate(texts):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
            raise ValueError(
                f"text {index} does not survive the tokenizer ({text[:40]!r}...): bits per byte would be too low; use "
                "a lossless (byte-level) tokenizer or texts within its alphabet"
            )
        sequences.append([bos_token_id, *ids] + ([] if eos_token_id is None else [eos_token_id]))
    nats = sequence_nll(model, sequences, window=window, stride=stride, batch_size=batch_size)
    return nats / math.log(2), torch.tensor([len(text.encode()) for text in texts])


def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    bos_token_id: int,
    eos_token_id: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
) -> float:
    """Bits of all texts over their UTF-8 bytes: comparable across tokenizers. Arguments: :func:`text_bits`."""
    bits, sizes = text_bits(
        model,
        tokenizer,
        texts,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        window=window,
        stride=stride,
        batch_size=batch_size,
    )
    if int(sizes.sum()) == 0:
        raise ValueError("texts holds no bytes: give at least one text that is not empty")
    return float(bits.sum()) / int(sizes.sum())


def continuation_scores(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int] | Tensor],
    continuations: Sequence[Sequence[int] | Tensor],
    *,
    batch_size: int = 8,
) -> tuple[Tensor, Tensor]:
    """log p(continuation | prompt) of N pairs of id sequences: summed nats (N,) float64, and token counts (N,)."""
    if len(prompts) != len(continuations):
        raise ValueError(f"{len(prompts)} prompts and {len(continuations)} continuations: one of each per pair")
    for name, sequences in (("prompt", prompts), ("continuation", continuations)):
        for index, sequence in enumerate(sequences):
            if len(sequence) == 0:
                raise ValueError(f"{name} {index} is empty: it needs at least one token")
    counts = torch.tensor([len(continuation) for continuation in continuations], dtype=torch.long)
    totals = torch.zeros(len(prompts), dtype=torch.float64)
    pairs = [[*map(int, p), *map(int, c)] for p, c in zip(prompts, continuations, strict=True)]
    order = sorted(range(len(pairs)), key=lambda index: len(pairs[index]))
    with torch.no_grad(), evaluating(model):
        for group in _groups(order, batch_size):
            ids, mask = left_pad([pairs[index] for index in group], pad_id=0)
            scores = token_log_probs(model, ids, mask).double().cpu()
            for index, row in zip(group, scores, strict=True):
                totals[index] = row[-int(counts[index]) :].sum()
    return totals, counts


def choice_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    choices: Sequence[Sequence[str]],
    *,
    normalise: Literal["sum", "mean"] = "sum",
    bos_token_id: int | None = None,
    batch_size: int = 8,
) -> list[Tensor]:
    """Score of every choice as the continuation of its prompt, for multiple choice by likelihood.

    Prompt and choice are tokenised together, as the model has seen text; scored are the tokens behind the longest
    prefix that the prompt and all its joined choices share, so that a token spanning the border counts, in every
    choice.

    Parameters
    ----------
    prompts, choices
        One list of choices per prompt, appended as they stand: mind the space between.
    normalise
        ``sum`` gives log p of the choice, ``mean`` divides it by the number of its tokens.
    bos_token_id
        Fed first; needed where the prompt is empty. The tokenizer's own special tokens are not added.

    Returns
    -------
    list
        Per prompt a tensor (number of choices,), nats, float64.
    """
    if normalise not in ("sum", "mean"):
        raise ValueError(f"normalise must be 'sum' or 'mean', got {normalise!r}")
    if len(prompts) != len(choices):
        raise ValueError(f"{len(prompts)} prompts and {len(choices)} lists of choices: one list per prompt")
    start = [] if bos_token_id is None else [bos_token_id]
    contexts, endings = [], []
    for index, (prompt, options) in enumerate(zip(prompts, choices, strict=True)):
        if len(options) == 0:
            raise ValueError(f"choices {index} is empty: give at least one")
        alone = start + tokenizer.encode(prompt, add_special_tokens=False)
        joined = [start + tokenizer.encode(prompt + option, add_special_tokens=False) for option in options]
        shared = min(_shared_prefix(alone, ids) for ids in joined)
        if shared == 0:
            raise ValueError(f"prompt {index} leaves the choices without context: give bos_token_id")
        contexts += [ids[:shared] for ids in joined]
        endings += [ids[shared:] for ids in joined]
        if any(len(ids) == shared for ids in joined):
            raise ValueError(f"a choice of prompt {index} adds no token: {list(options)!r}")
    totals, counts = continuation_scores(model, contexts, endings, batch_size=batch_size)
    scores = totals / counts if normalise == "mean" else totals
    return list(scores.split([len(options) for options in choices]))


def _shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def label_log_probs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    labels: Mapping[str, Sequence[str]],
    *,
    bos_token_id: int | None = None,
    batch_size: int = 8,
) -> Tensor:
    """log p(label | prompt), (N, number of labels) float64, a label's spellings summed in probability.

    ``labels`` maps a label to its spellings, such as ``{"yes": [" yes", " Yes"], "no": [" no", " No"]}``. Columns are
    in the order of the mapping and not renormalised over the labels.
    """
    spellings = [spelling for variants in labels.values() for spelling in variants]
    rows = choice_scores(
        model, tokenizer, prompts, [spellings] * len(prompts), bos_token_id=bos_token_id, batch_size=batch_size
    )
    sizes = [len(variants) for variants in labels.values()]
    columns = torch.stack(rows).split(sizes, dim=1)
    return torch.stack([column.logsumexp(1) for column in columns], dim=1)
