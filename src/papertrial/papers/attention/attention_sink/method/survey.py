"""The sinks of a whole model on natural, random and repeated tokens, and what a sink looks like from inside."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papertrial.lm.anatomy import anatomy, device_of, unwrap
from papertrial.lm.attention import record_attention, repeat_heads
from papertrial.lm.generation import evaluating
from papertrial.lm.hooks import record
from papertrial.papers.attention.attention_sink.method.measure import (
    check_eps,
    column_excess,
    column_importance,
    percent_above,
    proxy_scores,
)

Kind = Literal["natural", "random", "repeat"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class SinkReport:
    """What :func:`measure_sinks` saw on one kind of input; L layers, H heads, G key/value heads, T tokens.

    Where texts are of unlike length, T is the longest and position k is a mean over the texts that reach it.

    Attributes
    ----------
    sink : (T,) percent, Sink_k of the weights as the model uses them.
    proxy_sink : (T,) percent, Sink_k of their shares; the same for softmax.
    importance, proxy_importance : (L, H, T), alpha_k of weights and shares, mean over samples.
    excess : (L, H, T), alpha_k of the weights as a multiple of its even share, see :func:`column_excess`.
    row_sum : (L, H), mean sum of a row: 1 for softmax, less where a learned key takes some of it.
    hidden_norm : (L + 1, T), length of the residual stream before the first block and after each.
    key_norm, value_norm : (L, G, T).
    query_key_cosine : (L, H, T), cosine of the query at each token and the key of the first.
    contribution : (L, H, T), alpha_k times the length of the k-th value: how much a token adds to the heads' outputs.
    contribution_excess : (L, H, T), the same as a multiple of its even share: 1 is what the average token adds that the
        same queries see.
    """

    sink: Tensor
    proxy_sink: Tensor
    importance: Tensor
    proxy_importance: Tensor
    excess: Tensor
    row_sum: Tensor
    hidden_norm: Tensor
    key_norm: Tensor
    value_norm: Tensor
    query_key_cosine: Tensor
    contribution: Tensor
    contribution_excess: Tensor

    @property
    def first(self) -> float:
        """Sink_1 in percent."""
        return float(self.sink[0])

    @property
    def strongest(self) -> float:
        """The largest Sink_k in percent, wherever it is; the last columns are means of few rows and exceed easily."""
        return float(self.sink.max())

    @property
    def first_importance(self) -> float:
        """alpha_1 of the head that looks most at the first token."""
        return float(self.importance[..., 0].max())

    @property
    def first_proxy_importance(self) -> float:
        """The same of the shares."""
        return float(self.proxy_importance[..., 0].max())

    @property
    def first_excess(self) -> float:
        """The largest excess that a head has at the first token."""
        return float(self.excess[..., 0].max())


@torch.no_grad()
def measure_sinks(
    model: nn.Module,
    input_ids: Tensor,
    eps: float = 0.3,
    kinds: Sequence[Kind] = KINDS,
    *,
    attention_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    vocabulary: Tensor | None = None,
    causal: bool | None = None,
    batch_size: int = 32,
) -> dict[Kind, SinkReport]:
    """Measure the attention sinks of any decoder or encoder, under whatever attention it runs with at the moment.

    Parameters
    ----------
    model
        A transformers model that :func:`papertrial.lm.anatomy.anatomy` knows; inside a block of ``set_attention`` its
        variant is measured. Nothing of it is changed.
    input_ids
        (N, T) natural text; the paper takes 100 texts of 64 tokens, beginning where texts begin.
    eps
        Threshold of the metric.
    kinds
        ``natural`` is ``input_ids``; ``random`` as many tokens, each drawn by itself; ``repeat`` one token a sample,
        drawn, T times.
    attention_mask
        (N, T), 1 for tokens and 0 for padding, on either side; None says that there is no padding. Position 1 is each
        row's first real token, and each row is measured as it would be alone, without its padding. The even share
        depends on the length, so compare texts of one length where you can.
    generator
        Of the draws; None draws from the global one.
    vocabulary
        Ids that ``random`` and ``repeat`` draw from, default every row of the embedding.
    causal
        Whether tokens see the past only; None knows it from the architecture.
    batch_size
        Samples that pass at once; the report does not depend on it.

    Raises
    ------
    ValueError
        For ids that are not (N, T) with T >= 2 or that the model does not have, a mask of another shape, with gaps or
        with fewer than two tokens in a row, ``eps`` outside (0, 1), an unknown kind, an empty vocabulary, and a model
        whose weights come out as NaN.
    TypeError
        For ids that are not integers.
    """
    check_eps(eps)
    if input_ids.ndim != 2 or input_ids.shape[0] < 1 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids must be (N, T) with N >= 1 and T >= 2, got {tuple(input_ids.shape)}")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"unknown kind {unknown[0]!r}; known: {', '.join(KINDS)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    parts = anatomy(model)
    known = parts.W_E.shape[0]
    pool = torch.arange(known) if vocabulary is None else vocabulary.cpu()
    if pool.ndim != 1 or not len(pool):
        raise ValueError(f"vocabulary must be ids (V,), got the shape {tuple(pool.shape)}")
    starts, lengths = _spans(input_ids, attention_mask)
    input_ids = input_ids.cpu()
    _check_ids("input_ids", input_ids, known)
    _check_ids("vocabulary", pool, known)
    causal = parts.family.causal if causal is None else causal
    reports: dict[Kind, SinkReport] = {}
    for kind in kinds:
        ids = input_ids if kind == "natural" else _drawn(input_ids.shape, kind, pool, generator)
        seen: list[tuple[int, SinkReport]] = []
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()[:, 0]
            texts = ids[rows[:, None], starts[rows, None] + torch.arange(length)]  # (rows, length), padding left away
            seen += [(len(batch), _observe(model, batch, eps, causal)) for batch in texts.split(batch_size)]
        reports[kind] = _mean(seen)
    return reports


def _spans(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where the text of each row starts (N,), and how many tokens it has (N,)."""
    if mask is None:
        return torch.zeros(len(ids), dtype=torch.long), torch.full((len(ids),), ids.shape[1])
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids, {tuple(ids.shape)}; got {tuple(mask.shape)}"
        )
    real = mask.cpu().bool()
    starts, lengths = real.int().argmax(1), real.sum(1)
    place = torch.arange(ids.shape[1])
    text = (place >= starts[:, None]) & (place < (starts + lengths)[:, None])
    if not torch.equal(real, text):
        raise ValueError("attention_mask has gaps: the tokens of a row must stand side by side")
    if int(lengths.min()) < 2:
        raise ValueError(f"attention_mask leaves row {int(lengths.argmin())} with {int(lengths.min())} of 2 tokens")
    return starts, lengths


def _check_ids(argument: str, ids: Tensor, known: int) -> None:
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"{argument} must be integers, got {ids.dtype}")
    outside = ids[(ids < 0) | (ids >= known)]
    if len(outside):
        raise ValueError(f"{argument} holds {int(outside[0])}; the model has the tokens 0..{known - 1}")


def _drawn(shape: torch.Size, kind: Kind, pool: Tensor, generator: torch.Generator | None) -> Tensor:
    drawn = pool[torch.randint(len(pool), (shape[0], shape[1] if kind == "random" else 1), generator=generator)]
    return drawn.expand(shape)


def _mean(seen: Sequence[tuple[int, SinkReport]]) -> SinkReport:
    """Over batches of so many samples each; a position over those that are long enough to have it."""
    longest = max(len(report.sink) for _, report in seen)
    counts = torch.tensor([float(count) for count, _ in seen])  # (batches,)

    def padded(value: Tensor) -> Tensor:
        return F.pad(value, (0, longest - value.shape[-1]))

    reach = torch.stack([padded(torch.ones_like(report.sink)) for _, report in seen])  # (batches, T)
    means: dict[str, Tensor] = {}
    for field in fields(SinkReport):
        values = [getattr(report, field.name) for _, report in seen]  # (..., length), but row_sum (L, H)
        if field.name == "row_sum":
            means[field.name] = torch.tensordot(counts, torch.stack(values), 1) / counts.sum()
        else:
            means[field.name] = torch.tensordot(counts, torch.stack([padded(v) for v in values]), 1) / (counts @ reach)
    return SinkReport(**means)


def _observe(model: nn.Module, ids: Tensor, eps: float, causal: bool) -> SinkReport:
    """One batch without padding; every field is a mean over its samples."""
    with evaluating(model), record_attention(model) as seen, record(model, ["resid_pre", "resid_post"]) as states:
        unwrap(model)(input_ids=ids.to(device_of(model)))
    layers = seen.layers
    patterns = [seen[layer].float() for layer in layers]
    raw = [column_importance(attn, causal=causal) for attn in patterns]  # (B, H, T) each
    proxy = [column_importance(proxy_scores(attn), causal=causal) for attn in patterns]
    lengths = [  # (B, H, T) each, of the values that the heads read
        repeat_heads(seen.values(layer).float(), attn.shape[1]).norm(dim=-1)
        for layer, attn in zip(layers, patterns, strict=True)
    ]
    cosines = []
    for layer in layers:
        query = seen.queries(layer).float()
        first = repeat_heads(seen.keys(layer).float(), query.shape[1])[:, :, :1]
        cosines.append(torch.cosine_similarity(query, first, dim=-1).mean(0))
    stream = [states["resid_pre"][layers[0]], *(states["resid_post"][layer] for layer in layers)]
    added = [attn * length[..., None, :] for attn, length in zip(patterns, lengths, strict=True)]
    return SinkReport(
        sink=percent_above(raw, eps).cpu(),
        proxy_sink=percent_above(proxy, eps).cpu(),
        importance=_stacked([alpha.mean(0) for alpha in raw]),
        proxy_importance=_stacked([alpha.mean(0) for alpha in proxy]),
        excess=_stacked([column_excess(attn, causal=causal).mean(0) for attn in patterns]),
        row_sum=_stacked([attn.sum(-1).mean((0, 2)) for attn in patterns]),
        hidden_norm=_stacked([hidden.float().norm(dim=-1).mean(0) for hidden in stream]),
        key_norm=_stacked([seen.keys(layer).float().norm(dim=-1).mean(0) for layer in layers]),
        value_norm=_stacked([seen.values(layer).float().norm(dim=-1).mean(0) for layer in layers]),
        query_key_cosine=_stacked(cosines),
        contribution=_stacked([column_importance(part, causal=causal).mean(0) for part in added]),
        contribution_excess=_stacked([column_excess(part, causal=causal).mean(0) for part in added]),
    )


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(rows)).cpu()
