"""Where attention goes: the sink metric of arXiv 2410.10781 (section 3), and what a sink looks like from inside.

A column of an attention map is important if its token receives much attention from those that can see it. The mean
over the rows that can is what makes columns comparable: an even causal map gives its first column 1/T (1 + 1/2 + ... +
1/T) all the same, 0.074 at T = 64, because early rows have few columns to share between.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from papertrial.lm.anatomy import anatomy, device_of, unwrap
from papertrial.lm.attention import record_attention, repeat_heads
from papertrial.lm.generation import evaluating
from papertrial.lm.hooks import record

Kind = Literal["natural", "random", "repeat"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_EPS = 1e-8


def uniform_importance(length: int) -> Tensor:
    """Importance of each column (T,) when every row spreads its attention evenly over what it sees, float64.

    alpha_k = (1 / (T - k + 1)) (1/k + ... + 1/T): the yardstick for a map in which nothing is preferred.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    shares = 1.0 / torch.arange(1, length + 1, dtype=torch.float64)
    return shares.flip(0).cumsum(0).flip(0) / torch.arange(length, 0, -1)


def proxy_scores(attn: Tensor) -> Tensor:
    """|A_ij| / sum_j |A_ij|: what share each key has of a row (..., T, S) that need not sum to one.

    Of maps that do it is the map itself. It says how uneven a row is, not how large: where all weights are tiny it can
    name a sink that carries nothing, so look at the plain weights as well.
    """
    sizes = attn.abs()
    return sizes / (sizes.sum(-1, keepdim=True) + _EPS)


def column_importance(attn: Tensor, *, causal: bool = True) -> Tensor:
    """alpha_k = mean over the rows i that see column k of A_ik: (B, H, T, T) to (B, H, T).

    Parameters
    ----------
    attn
        Weights; rows are queries. In a causal map rows k..T see column k, in others all T rows do.

    Raises
    ------
    ValueError
        For maps that are not square or shorter than two tokens, and for a causal one with weight above its diagonal.
    """
    if attn.ndim != 4 or attn.shape[-1] != attn.shape[-2]:
        raise ValueError(f"attn must be (B, H, T, T), got {tuple(attn.shape)}")
    length = attn.shape[-1]
    if length < 2:
        raise ValueError(f"attn must be of at least 2 tokens, got {length}")
    if not causal:
        return attn.mean(-2)
    if bool(attn.triu(1).any()):
        raise ValueError("attn has weight above the diagonal; of bidirectional attention pass causal=False")
    return attn.sum(-2) / torch.arange(length, 0, -1, device=attn.device)


def sink_metric(
    attentions: Sequence[Tensor],
    eps: float = 0.3,
    positions: int | None = None,
    normalize: bool = False,
    *,
    causal: bool = True,
) -> Tensor:
    """Sink_k: in how many percent of (sample, layer, head) the importance of position k exceeds ``eps``, (T,).

    Parameters
    ----------
    attentions
        (B, H, T, T) per layer, as ``output_attentions`` gives them.
    eps
        Between 0 and 1; 0.3 in the paper.
    positions
        Look at the first so many tokens only (64 in the paper); causal maps are the same for a shorter text.
    normalize
        Judge :func:`proxy_scores` instead of the weights.

    Raises
    ------
    ValueError
        For no layers, ``eps`` outside (0, 1), fewer than two positions or more than there are, a cut through
        bidirectional maps, and all that :func:`column_importance` refuses.
    """
    _check_eps(eps)
    if not attentions:
        raise ValueError("attentions is empty: give one map per layer")
    exceeding = []
    for attn in attentions:
        if positions is not None:
            attn = _first(attn, positions, causal)
        alpha = column_importance(proxy_scores(attn) if normalize else attn, causal=causal)
        exceeding.append((alpha > eps).flatten(0, 1))
    return 100 * torch.cat(exceeding).float().mean(0)


def _check_eps(eps: float) -> None:
    if not 0 < eps < 1:
        raise ValueError(f"eps must lie between 0 and 1, got {eps}")


def _first(attn: Tensor, positions: int, causal: bool) -> Tensor:
    length = attn.shape[-1]
    if not 2 <= positions <= length:
        raise ValueError(f"positions must lie in 2..{length}, the length of the maps; got {positions}")
    if not causal and positions < length:
        raise ValueError("bidirectional maps cannot be cut: their rows are spread over the whole text")
    return attn[..., :positions, :positions]


# -- a whole model -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SinkReport:
    """What :func:`measure_sinks` saw on one kind of input; L layers, H heads, G key/value heads, T tokens.

    Attributes
    ----------
    sink : (T,) percent, Sink_k of the weights as the model uses them.
    proxy_sink : (T,) percent, Sink_k of their shares; the same for softmax.
    importance, proxy_importance : (L, H, T), alpha_k of weights and shares, mean over samples.
    row_sum : (L, H), mean sum of a row: 1 for softmax, less where a learned key takes some of it.
    hidden_norm : (L + 1, T), length of the residual stream before the first block and after each.
    key_norm, value_norm : (L, G, T).
    query_key_cosine : (L, H, T), cosine of the query at each token and the key of the first.
    contribution : (L, H, T), alpha_k times the length of the k-th value: how much a token adds to the heads' outputs.
    """

    sink: Tensor
    proxy_sink: Tensor
    importance: Tensor
    proxy_importance: Tensor
    row_sum: Tensor
    hidden_norm: Tensor
    key_norm: Tensor
    value_norm: Tensor
    query_key_cosine: Tensor
    contribution: Tensor

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


@torch.no_grad()
def measure_sinks(
    model: nn.Module,
    input_ids: Tensor,
    eps: float = 0.3,
    kinds: Sequence[Kind] = KINDS,
    *,
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
        (N, T) natural text without padding; the paper takes 100 texts of 64 tokens, beginning where texts begin.
    eps
        Threshold of the metric.
    kinds
        ``natural`` is ``input_ids``; ``random`` as many tokens, each drawn by itself; ``repeat`` one token a sample,
        drawn, T times.
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
        For ids that are not (N, T) with T >= 2, ``eps`` outside (0, 1), an unknown kind, an empty vocabulary.
    """
    _check_eps(eps)
    if input_ids.ndim != 2 or input_ids.shape[0] < 1 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids must be (N, T) with N >= 1 and T >= 2, got {tuple(input_ids.shape)}")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"unknown kind {unknown[0]!r}; known: {', '.join(KINDS)}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    parts = anatomy(model)
    pool = torch.arange(parts.W_E.shape[0]) if vocabulary is None else vocabulary
    if pool.ndim != 1 or not len(pool):
        raise ValueError(f"vocabulary must be ids (V,), got the shape {tuple(pool.shape)}")
    causal = parts.family.causal if causal is None else causal
    reports: dict[Kind, SinkReport] = {}
    for kind in kinds:
        ids = input_ids if kind == "natural" else _drawn(input_ids.shape, kind, pool.cpu(), generator)
        seen = [_observe(model, rows, eps, causal) for rows in ids.split(batch_size)]
        means = {
            field.name: sum(
                len(rows) * getattr(one, field.name) for rows, one in zip(ids.split(batch_size), seen, strict=True)
            )
            / len(ids)
            for field in fields(SinkReport)
        }
        reports[kind] = SinkReport(**means)
    return reports


def _drawn(shape: torch.Size, kind: Kind, pool: Tensor, generator: torch.Generator | None) -> Tensor:
    drawn = pool[torch.randint(len(pool), (shape[0], shape[1] if kind == "random" else 1), generator=generator)]
    return drawn.expand(shape)


def _observe(model: nn.Module, ids: Tensor, eps: float, causal: bool) -> SinkReport:
    """One batch; every field is a mean over its samples."""
    with evaluating(model), record_attention(model) as seen, record(model, ["resid_pre", "resid_post"]) as states:
        unwrap(model)(input_ids=ids.to(device_of(model)))
    layers = seen.layers
    patterns = [seen[layer].float() for layer in layers]
    raw = [column_importance(attn, causal=causal) for attn in patterns]  # (B, H, T) each
    proxy = [column_importance(proxy_scores(attn), causal=causal) for attn in patterns]
    values = [
        repeat_heads(seen.values(layer).float(), alpha.shape[1]) for layer, alpha in zip(layers, raw, strict=True)
    ]
    cosines = []
    for layer in layers:
        query = seen.queries(layer).float()
        first = repeat_heads(seen.keys(layer).float(), query.shape[1])[:, :, :1]
        cosines.append(torch.cosine_similarity(query, first, dim=-1).mean(0))
    stream = [states["resid_pre"][layers[0]], *(states["resid_post"][layer] for layer in layers)]
    pairs = list(zip(raw, values, strict=True))
    return SinkReport(
        sink=_share(raw, eps),
        proxy_sink=_share(proxy, eps),
        importance=_stacked([alpha.mean(0) for alpha in raw]),
        proxy_importance=_stacked([alpha.mean(0) for alpha in proxy]),
        row_sum=_stacked([attn.sum(-1).mean((0, 2)) for attn in patterns]),
        hidden_norm=_stacked([hidden.float().norm(dim=-1).mean(0) for hidden in stream]),
        key_norm=_stacked([seen.keys(layer).float().norm(dim=-1).mean(0) for layer in layers]),
        value_norm=_stacked([seen.values(layer).float().norm(dim=-1).mean(0) for layer in layers]),
        query_key_cosine=_stacked(cosines),
        contribution=_stacked([(alpha * value.norm(dim=-1)).mean(0) for alpha, value in pairs]),
    )


def _share(importances: Sequence[Tensor], eps: float) -> Tensor:
    return 100 * torch.cat([(alpha > eps).flatten(0, 1) for alpha in importances]).float().mean(0).cpu()


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(rows)).cpu()
