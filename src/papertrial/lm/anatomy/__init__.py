"""Where things are in a transformer: blocks, projections, norms and embeddings of a dozen families in one convention.

    parts = anatomy(model)
    parts.blocks[3].W_O          # (H, d_h, D)
    parts.W_U                    # (D, V)

Works on models with a head or without, and through peft. Weights follow ``y = x W + b`` with row vectors. Families are
rows of a table, see :mod:`papertrial.lm.anatomy.families`.
"""

# ruff: noqa: N802 - W_E, W_U and the like are the field's names

from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from papertrial.lm.anatomy.families import SUPPORTED, Family, family_of
from papertrial.lm.anatomy.parts import Block, Norm, matrix, offset, part

__all__ = [
    "SUPPORTED",
    "Anatomy",
    "Block",
    "Family",
    "Norm",
    "anatomy",
    "body",
    "device_of",
    "position_limit",
    "read_out",
    "reads_out",
    "unwrap",
]


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside ``model``: itself, or what a peft wrapper or DistributedDataParallel holds."""
    if hasattr(model, "get_base_model"):
        model = cast(Any, model).get_base_model()
    while not isinstance(model, PreTrainedModel) and isinstance(getattr(model, "module", None), nn.Module):
        model = cast(nn.Module, model.module)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    return model


def body(model: nn.Module) -> PreTrainedModel:
    """The model without its head; its ``last_hidden_state`` (B, T, D) is after the final norm."""
    # not base_model: OPT's language model calls the decoder inside it directly
    return cast(PreTrainedModel, unwrap(model).get_decoder())


def device_of(model: nn.Module) -> torch.device:
    """Where the model wants its token ids: the device of its embedding."""
    return cast(Tensor, unwrap(model).get_input_embeddings().weight).device


class Anatomy:
    """The parts of one model; made by :func:`anatomy`.

    Attributes
    ----------
    model, body
        The transformers model, and the part of it without a head.
    family
        The row of the table that describes it.
    blocks
        Its layers, see :class:`Block`.
    """

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self.model, self.body, self.family = model, body(model), family
        layers = part(self.body, family.layers)
        if not isinstance(layers, nn.ModuleList):
            raise ValueError(f"{type(model).__name__} has no list of layers at {family.layers!r}")
        self.blocks = [Block(family, layer, index) for index, layer in enumerate(layers)]

    @property
    def embed(self) -> nn.Module:
        """The token embedding module (Gemma's multiplies by sqrt(D) itself)."""
        return self.model.get_input_embeddings()

    @property
    def embed_positions(self) -> nn.Module | None:
        """The learned position table, None for rotary models."""
        return part(self.body, self.family.embed_positions)

    @property
    def unembed(self) -> nn.Module | None:
        """The projection to the vocabulary, None for a model without a head."""
        return self.model.get_output_embeddings()

    @property
    def final_norm(self) -> Norm | None:
        """Before the unembedding; None for post-norm encoders."""
        module = part(self.body, self.family.final_norm)
        return None if module is None else Norm(module, self.family.norm, self.family.norm_offset)

    @property
    def tied(self) -> bool:
        """Whether embedding and unembedding are one parameter."""
        head = self.unembed
        return head is not None and head.weight is self.embed.weight

    @property
    def width(self) -> int:
        """D."""
        return self.blocks[0].W_in.shape[0] if self.blocks else int(self.model.config.hidden_size)

    @property
    def W_E(self) -> Tensor:
        """(V, D) as stored; the vector that enters the model is ``embedding_scale`` times a row."""
        return cast(Tensor, self.embed.weight)

    @cached_property
    def embedding_scale(self) -> float:
        """What the embedding module multiplies its rows by: sqrt(D) for Gemma, else 1."""
        return self.W_E.shape[1] ** 0.5 if self.family.scale_embeddings else 1.0

    @property
    def W_pos(self) -> Tensor | None:
        """(positions, D) from position 0 on, None for rotary models."""
        table = self.embed_positions
        return None if table is None else cast(Tensor, table.weight)[_position_offset(self.model, self.family) :]

    @property
    def W_U(self) -> Tensor:
        """(D, V)."""
        return matrix(self._head())

    @property
    def b_U(self) -> Tensor | None:
        """(V,), None if there is none."""
        return offset(self._head())

    def _head(self) -> nn.Module:
        head = self.unembed
        if head is None:
            raise ValueError(f"{type(self.model).__name__} has no unembedding: load it with a language-model head")
        return head


def anatomy(model: nn.Module) -> Anatomy:
    """Describe a model.

    Parameters
    ----------
    model
        A transformers model of a supported family, with or without a head, or wrapped by peft.

    Raises
    ------
    ValueError
        For any other architecture, naming those that are supported.
    """
    inner = unwrap(model)
    family = family_of(inner.config.model_type)
    if family is None or getattr(inner.config, "do_layer_norm_before", True) is False:
        detail = "" if family is None else " with post-norm layers"
        raise ValueError(
            f"no anatomy for {type(inner).__name__} (model type {inner.config.model_type!r}{detail}); "
            f"supported: {', '.join(SUPPORTED)}"
        )
    return Anatomy(inner, family)


def position_limit(model: nn.Module) -> int | None:
    """How many positions a learned table holds; None for rotary models and for families without a table here."""
    inner = unwrap(model)
    family = family_of(inner.config.model_type)
    table = None if family is None else part(body(inner), family.embed_positions)
    if table is None or family is None:
        return None
    return cast(Tensor, table.weight).shape[0] - _position_offset(inner, family)


def _position_offset(model: PreTrainedModel, family: Family) -> int:
    return family.position_offset if family.position_offset != "pad" else int(model.config.pad_token_id) + 1


def reads_out(model: nn.Module) -> bool:
    """Whether :func:`read_out` knows this model's way from final hidden states to logits: a causal family with head."""
    inner = unwrap(model)
    family = family_of(inner.config.model_type)
    return family is not None and family.causal and inner.get_output_embeddings() is not None


def read_out(model: nn.Module, hidden: Tensor) -> Tensor:
    """Logits (..., V) of final hidden states (..., D), with the soft cap of Gemma2."""
    inner = unwrap(model)
    if not reads_out(inner):
        raise ValueError(f"{type(inner).__name__} has no next-token head that is known here")
    logits = inner.get_output_embeddings()(hidden)
    cap = getattr(inner.config, "final_logit_softcapping", None)
    return cast(Tensor, logits if cap is None else (logits / cap).tanh() * cap)
