"""Where each family keeps its parts: one row of data per family, no code.

Paths are relative: ``layers``, ``embed_positions``, ``final_norm`` to the body (the model without its head), the others
to a block. To support a family, add a row; the tests run over all of them.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """Paths and conventions of one family, see the fields' comments."""

    model_types: tuple[str, ...]  # values of config.model_type
    layers: str
    attention: str  # the module that calls the attention function: it has layer_idx, scaling
    output: str  # output projection of attention
    head_size: str  # attribute of ``attention``
    up: str  # first projection of the feed-forward layer; of a gated one, the one without activation
    down: str
    activation: str
    attention_norm: str
    mlp_norm: str | None  # None: the block has one norm, read by both
    final_norm: str | None
    query: str | None = None
    key: str | None = None
    value: str | None = None
    fused: str | None = None  # one projection to queries, keys and values instead of three ...
    fused_by: Literal["blocks", "heads"] = "blocks"  # ... laid out as [q of all heads, k, v], or per head as [q, k, v]
    gate: str | None = None
    mlp: str | None = None  # the module that reads the feed-forward input; None: ``up`` reads it
    query_norm: str | None = None  # over the head size, before rotation; absent unless the config asks for it
    key_norm: str | None = None
    post_attention_norm: str | None = None  # on the branch, before it is added to the residual stream
    post_mlp_norm: str | None = None
    norm: Literal["layer", "rms"] = "rms"
    norm_offset: float = 0.0  # the gain of a norm is offset + weight
    placement: Literal["pre", "post"] = "pre"  # of the block's norms; post: on the sum, inside the residual stream
    parallel: bool | str = False  # attention and feed-forward both read the block's input; or the block's attribute
    embed_positions: str | None = None  # learned table
    position_offset: int | Literal["pad"] = 0  # rows of that table before position 0; pad: those up to the padding id
    scale_embeddings: bool = False  # the embedding module multiplies by sqrt(D)
    scaled_query: bool = False  # queries reach the attention function already multiplied by the scale
    causal: bool = True


_LLAMA = Family(
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    layers="layers",
    attention="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    head_size="head_dim",
    mlp="mlp",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    activation="mlp.act_fn",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    final_norm="norm",
)

_BERT = Family(
    model_types=("bert", "roberta"),
    layers="encoder.layer",
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    head_size="attention_head_size",
    mlp="intermediate",
    up="intermediate.dense",
    down="output.dense",
    activation="intermediate.intermediate_act_fn",
    attention_norm="attention.output.LayerNorm",
    mlp_norm="output.LayerNorm",
    final_norm=None,
    norm="layer",
    placement="post",
    embed_positions="embeddings.position_embeddings",
    causal=False,
)


def _like(base: Family, **changes: object) -> Family:
    return Family(**{**vars(base), **changes})  # type: ignore[arg-type]


FAMILIES: tuple[Family, ...] = (
    _LLAMA,
    _like(_LLAMA, model_types=("gemma",), norm_offset=1.0, scale_embeddings=True, query_norm=None, key_norm=None),
    _like(
        _LLAMA,
        model_types=("gemma2",),
        norm_offset=1.0,
        scale_embeddings=True,
        query_norm=None,
        key_norm=None,
        post_attention_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        post_mlp_norm="post_feedforward_layernorm",
    ),
    Family(
        model_types=("gpt2",),
        layers="h",
        attention="attn",
        fused="attn.c_attn",
        fused_by="blocks",
        output="attn.c_proj",
        head_size="head_dim",
        mlp="mlp",
        up="mlp.c_fc",
        down="mlp.c_proj",
        activation="mlp.act",
        attention_norm="ln_1",
        mlp_norm="ln_2",
        final_norm="ln_f",
        norm="layer",
        embed_positions="wpe",
    ),
    Family(
        model_types=("gpt_neox",),
        layers="layers",
        attention="attention",
        fused="attention.query_key_value",
        fused_by="heads",
        output="attention.dense",
        head_size="head_size",
        mlp="mlp",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        activation="mlp.act",
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        final_norm="final_layer_norm",
        norm="layer",
        parallel="use_parallel_residual",
    ),
    Family(
        model_types=("opt",),
        layers="layers",
        attention="self_attn",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.out_proj",
        head_size="head_dim",
        up="fc1",
        down="fc2",
        activation="activation_fn",
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
        final_norm="final_layer_norm",
        norm="layer",
        embed_positions="embed_positions",
        position_offset=2,
        scaled_query=True,
    ),
    Family(
        model_types=("phi",),
        layers="layers",
        attention="self_attn",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.dense",
        query_norm="self_attn.q_layernorm",
        key_norm="self_attn.k_layernorm",
        head_size="head_dim",
        mlp="mlp",
        up="mlp.fc1",
        down="mlp.fc2",
        activation="mlp.activation_fn",
        attention_norm="input_layernorm",
        mlp_norm=None,
        final_norm="final_layernorm",
        norm="layer",
        parallel=True,
    ),
    _like(_BERT, model_types=("bert",)),
    _like(_BERT, model_types=("roberta",), position_offset="pad"),
)

SUPPORTED: tuple[str, ...] = tuple(name for family in FAMILIES for name in family.model_types)


def family_of(model_type: str) -> Family | None:
    """The row for a ``config.model_type``, None if there is none."""
    return next((family for family in FAMILIES if model_type in family.model_types), None)
