"""Norms, projections and blocks of a model in one convention: row vectors, ``y = x W + b``."""

# ruff: noqa: N802 - W_Q, W_O and the like are the field's names

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from papertrial.lm.anatomy.families import Family


def part(module: nn.Module, path: str | None) -> nn.Module | None:
    """The submodule at a dotted path, None if there is no such path or nothing at it."""
    if path is None:
        return None
    for name in path.split("."):
        module = getattr(module, name, None)  # type: ignore[assignment]
        if module is None:
            return None
    return module


def matrix(module: nn.Module) -> Tensor:
    """Weight of a Linear or Conv1D as (inputs, outputs): a view of the parameter, gradients and in-place edits pass."""
    if hasattr(module, "base_layer"):
        if not getattr(module, "merged", False):
            raise ValueError("this projection carries an adapter that its weight does not show: merge it first")
        module = cast(nn.Module, module.base_layer)
    weight = cast(Tensor, module.weight)
    if not weight.is_floating_point():
        raise ValueError(f"weights of type {weight.dtype} have no view: load the model without quantisation")
    return weight if isinstance(module, Conv1D) else weight.t()


def offset(module: nn.Module) -> Tensor | None:
    """Bias (outputs,) of a Linear or Conv1D, None if it has none."""
    return cast("Tensor | None", getattr(getattr(module, "base_layer", module), "bias", None))


@dataclass(frozen=True)
class Norm:
    """A LayerNorm or RMSNorm with its effective gain: Gemma stores the gain minus one."""

    module: nn.Module
    kind: Literal["layer", "rms"]
    offset: float

    @property
    def gain(self) -> Tensor:
        """(D,)."""
        return cast(Tensor, self.module.weight) + self.offset

    @property
    def bias(self) -> Tensor | None:
        """(D,), None for an RMSNorm."""
        return cast("Tensor | None", getattr(self.module, "bias", None))

    @property
    def eps(self) -> float:
        """Added to the variance, or to the mean square."""
        return float(getattr(self.module, "variance_epsilon", None) or self.module.eps)  # type: ignore[arg-type]

    def normalise(self, x: Tensor) -> Tensor:
        """The norm without gain and bias, in float32 at least."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


class Block:
    """One layer. H query heads, G key/value heads, d_h head size, D width, F feed-forward width.

    All weights are views of the parameters unless said otherwise: gradients flow, and in-place edits under
    ``torch.no_grad()`` change the model. Sizes are read from the weights, so that pruned layers are described as they
    are.
    """

    def __init__(self, family: Family, module: nn.Module, index: int) -> None:
        self.family, self.module, self.index = family, module, index

    def _get(self, path: str | None, what: str) -> nn.Module:
        found = part(self.module, path)
        if found is None:
            raise ValueError(f"layer {self.index} ({type(self.module).__name__}) has no {what} (looked for {path!r})")
        return found

    def _norm(self, path: str | None) -> Norm | None:
        module = part(self.module, path)
        return None if module is None else Norm(module, self.family.norm, self.family.norm_offset)

    # modules

    @property
    def attention(self) -> nn.Module:
        """The module that calls the attention function."""
        return self._get(self.family.attention, "attention")

    @property
    def output(self) -> nn.Module:
        """The output projection of attention."""
        return self._get(self.family.output, "output projection")

    @property
    def up(self) -> nn.Module:
        """The first feed-forward projection (in a gated layer the one without activation)."""
        return self._get(self.family.up, "feed-forward projection")

    @property
    def gate(self) -> nn.Module | None:
        """The gate projection of a gated feed-forward layer."""
        return part(self.module, self.family.gate)

    @property
    def down(self) -> nn.Module:
        """The last feed-forward projection."""
        return self._get(self.family.down, "feed-forward output projection")

    @property
    def mlp_reader(self) -> nn.Module:
        """The module whose input is the feed-forward layer's input."""
        return self._get(self.family.mlp or self.family.up, "feed-forward layer")

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        """The feed-forward non-linearity."""
        return self._get(self.family.activation, "activation")

    def projection(self, name: Literal["query", "key", "value"]) -> nn.Module:
        """The module that computes queries, keys or values; in a fused family the same one for all three."""
        return self._get(self.family.fused or getattr(self.family, name), f"{name} projection")

    # norms

    @property
    def attention_norm(self) -> Norm:
        """Read by attention (pre-norm), or applied to input plus attention (post-norm)."""
        return Norm(self._get(self.family.attention_norm, "attention norm"), self.family.norm, self.family.norm_offset)

    @property
    def mlp_norm(self) -> Norm:
        """Read by the feed-forward layer, or applied after it (post-norm); Phi shares the attention norm."""
        return self._norm(self.family.mlp_norm) or self.attention_norm

    @property
    def post_attention_norm(self) -> Norm | None:
        """Applied to the attention branch before it is added (Gemma2)."""
        return self._norm(self.family.post_attention_norm)

    @property
    def post_mlp_norm(self) -> Norm | None:
        """Applied to the feed-forward branch before it is added (Gemma2)."""
        return self._norm(self.family.post_mlp_norm)

    @property
    def query_norm(self) -> Norm | None:
        """Over each query head, before rotation (Qwen3, some Phi)."""
        return self._norm(self.family.query_norm)

    @property
    def key_norm(self) -> Norm | None:
        """Over each key head, before rotation."""
        return self._norm(self.family.key_norm)

    # conventions

    @property
    def parallel(self) -> bool:
        """Attention and feed-forward layer both read the block's input; there is no middle of the residual stream."""
        rule = self.family.parallel
        return bool(getattr(self.module, rule)) if isinstance(rule, str) else rule

    @property
    def scaling(self) -> float:
        """What attention scores are multiplied by."""
        return float(self.attention.scaling)  # type: ignore[arg-type]

    @property
    def softcap(self) -> float | None:
        """Scores s become ``softcap * tanh(s / softcap)`` (Gemma2)."""
        return cast("float | None", getattr(self.attention, "attn_logit_softcapping", None))

    # sizes

    @property
    def head_size(self) -> int:
        """d_h."""
        return int(getattr(self.attention, self.family.head_size))

    @property
    def heads(self) -> int:
        """H."""
        return matrix(self.output).shape[0] // self.head_size

    @property
    def key_value_heads(self) -> int:
        """G; H is a multiple of it."""
        if self.family.fused:
            return self.heads
        return matrix(self.projection("key")).shape[1] // self.head_size

    @property
    def neurons(self) -> int:
        """F."""
        return matrix(self.down).shape[0]

    # weights

    def _split(self, values: Tensor, which: int) -> Tensor:
        """The part of a fused projection's outputs (last axis) for query, key or value, as (..., heads, d_h)."""
        size = self.head_size
        if self.family.fused is None:
            return values.unflatten(-1, (-1, size))
        if self.family.fused_by == "heads":
            return values.unflatten(-1, (-1, 3, size))[..., which, :]
        third = values.shape[-1] // 3
        return values[..., which * third : (which + 1) * third].unflatten(-1, (-1, size))

    def split_heads(self, values: Tensor, name: Literal["query", "key", "value"]) -> Tensor:
        """A view (..., heads, d_h) of the outputs of :meth:`projection` that belong to ``name``."""
        return self._split(values, ("query", "key", "value").index(name))

    def head_weights(self, name: Literal["query", "key", "value"]) -> Tensor:
        """(H, D, d_h) for queries, (G, D, d_h) for keys and values: a view, also for fused projections."""
        return self.split_heads(matrix(self.projection(name)), name).permute(1, 0, 2)

    def head_biases(self, name: Literal["query", "key", "value"]) -> Tensor | None:
        """(H, d_h) or (G, d_h) view of the bias, None if there is none."""
        bias = offset(self.projection(name))
        return None if bias is None else self.split_heads(bias, name)

    def _per_query_head(self, values: Tensor) -> Tensor:
        return values if len(values) == self.heads else values.repeat_interleave(self.heads // len(values), dim=0)

    def _bias_per_query_head(self, name: Literal["query", "key", "value"]) -> Tensor | None:
        bias = self.head_biases(name)
        return None if bias is None else self._per_query_head(bias)

    @property
    def W_Q(self) -> Tensor:
        """(H, D, d_h)."""
        return self.head_weights("query")

    @property
    def W_K(self) -> Tensor:
        """(H, D, d_h): repeated per query head where heads share keys, then a copy; see :meth:`head_weights`."""
        return self._per_query_head(self.head_weights("key"))

    @property
    def W_V(self) -> Tensor:
        """(H, D, d_h): as :attr:`W_K`."""
        return self._per_query_head(self.head_weights("value"))

    @property
    def W_O(self) -> Tensor:
        """(H, d_h, D)."""
        return matrix(self.output).unflatten(0, (-1, self.head_size))

    @property
    def b_Q(self) -> Tensor | None:
        """(H, d_h)."""
        return self.head_biases("query")

    @property
    def b_K(self) -> Tensor | None:
        """(H, d_h), repeated where heads share keys."""
        return self._bias_per_query_head("key")

    @property
    def b_V(self) -> Tensor | None:
        """(H, d_h), repeated where heads share values."""
        return self._bias_per_query_head("value")

    @property
    def b_O(self) -> Tensor | None:
        """(D,)."""
        return offset(self.output)

    @property
    def W_in(self) -> Tensor:
        """(D, F)."""
        return matrix(self.up)

    @property
    def W_gate(self) -> Tensor | None:
        """(D, F), None unless the layer is gated: ``act(x W_gate) * (x W_in)``."""
        return None if self.gate is None else matrix(self.gate)

    @property
    def W_out(self) -> Tensor:
        """(F, D)."""
        return matrix(self.down)

    @property
    def b_in(self) -> Tensor | None:
        """(F,)."""
        return offset(self.up)

    @property
    def b_gate(self) -> Tensor | None:
        """(F,)."""
        return None if self.gate is None else offset(self.gate)

    @property
    def b_out(self) -> Tensor | None:
        """(D,)."""
        return offset(self.down)
