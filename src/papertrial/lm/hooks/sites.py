"""Named places in a forward pass, and where they are found in each family.

| site | tensor | is |
|---|---|---|
| ``resid_pre`` | (B, T, D) | the residual stream that enters a block |
| ``attn_in`` | (B, T, D) | what the query, key and value projections read |
| ``query``, ``key``, ``value`` | (B, T, H or G, d_h) | their outputs per head, before head norms and rotation |
| ``head_out`` | (B, T, H, d_h) | what the output projection reads; times ``W_O`` it is each head's contribution |
| ``attn_out`` | (B, T, D) | output of the output projection |
| ``resid_mid`` | (B, T, D) | the residual stream between attention and feed-forward layer; none in parallel blocks |
| ``ffn_in`` | (B, T, D) | what the feed-forward layer reads, after its norm |
| ``mlp_act`` | (B, T, F) | what the last feed-forward projection reads: the neurons |
| ``mlp_out`` | (B, T, D) | its output |
| ``resid_post`` | (B, T, D) | the residual stream that leaves a block, without any final norm |
| ``final_hidden`` | (B, T, D) | after the final norm: what the unembedding reads (of an encoder, the last layer's
output) |

In Gemma2 ``attn_out`` and ``mlp_out`` pass a norm before they are added. In post-norm encoders ``resid_mid`` and
``resid_post`` are after the norm.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from papertrial.lm.anatomy import Anatomy, Block

BLOCK_SITES = (
    "resid_pre",
    "attn_in",
    "query",
    "key",
    "value",
    "head_out",
    "attn_out",
    "resid_mid",
    "ffn_in",
    "mlp_act",
    "mlp_out",
    "resid_post",
)
SITES = (*BLOCK_SITES, "final_hidden")
HEAD_SITES = ("query", "key", "value", "head_out")
"""Sites with a head axis: ``units`` are heads there, and entries of the last axis elsewhere."""


@dataclass(frozen=True)
class Tap:
    """Where to listen: the input or the output of ``module``.

    ``view`` maps the module's tensor to the site's shape without copying. ``in_place`` marks a tensor that the block
    goes on using behind the module's back, so that an edit has to be written into it. ``block`` is the block that knows
    (B, T).
    """

    module: nn.Module
    side: Literal["input", "output"]
    view: Callable[[Tensor], Tensor]
    in_place: bool = False
    block: nn.Module | None = None


def _whole(values: Tensor) -> Tensor:
    return values


def locate(parts: Anatomy, site: str, layer: int | None) -> Tap:
    """The tap of a site; ValueError for an unknown site, a layer out of range, or a site the model does not have."""
    if site not in SITES:
        raise ValueError(f"unknown site {site!r}; known: {', '.join(SITES)}")
    if site == "final_hidden":
        if layer is not None:
            raise ValueError("final_hidden belongs to no layer: leave layer out")
        return Tap(parts.body, "output", _whole)
    if layer is None or not -len(parts.blocks) <= layer < len(parts.blocks):
        raise ValueError(f"{site} needs a layer in 0 .. {len(parts.blocks) - 1}, got {layer}")
    return _locate_in_block(parts.blocks[layer], site)


def _locate_in_block(block: Block, site: str) -> Tap:
    if site == "resid_pre":
        return Tap(block.module, "input", _whole)
    if site == "resid_post":
        return Tap(block.module, "output", _whole)
    if site == "resid_mid":
        return _middle(block)
    if site == "attn_in":
        return Tap(block.attention, "input", _whole)
    if site in ("query", "key", "value"):
        return Tap(block.projection(site), "output", lambda values: block.split_heads(values, site))  # type: ignore[arg-type]
    if site == "head_out":
        return Tap(block.output, "input", lambda values: values.unflatten(-1, (-1, block.head_size)))
    module, side = {
        "attn_out": (block.output, "output"),
        "ffn_in": (block.mlp_reader, "input"),
        "mlp_act": (block.down, "input"),
        "mlp_out": (block.down, "output"),
    }[site]
    return Tap(module, side, _whole, block=block.module)  # type: ignore[arg-type]


def _middle(block: Block) -> Tap:
    if block.parallel:
        raise ValueError(
            f"layer {block.index} runs attention and feed-forward layer in parallel: it has no resid_mid; use attn_out"
        )
    if block.family.placement == "post":
        return Tap(block.attention_norm.module, "output", _whole)
    # the block keeps the tensor that it hands to the norm and adds the feed-forward output to it
    return Tap(block.mlp_norm.module, "input", _whole, in_place=True, block=block.module)
