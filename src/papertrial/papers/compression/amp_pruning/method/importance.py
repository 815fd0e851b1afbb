"""AMP's importance of heads and neurons: one pass over calibration prompts."""

import inspect
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from papertrial.lm.anatomy import anatomy, body, device_of
from papertrial.lm.generation import evaluating, position_ids
from papertrial.lm.pruning import UnitScores, visit
from papertrial.papers.compression.amp_pruning.method.options import MlpCriterion, one_of

Batch = Tensor | tuple[Tensor, Tensor]
"""Ids (B, T), one prompt a row; or ids and attention mask (B, T) where rows are padded."""


@torch.no_grad()
def amp_importance(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    mlp_criterion: MlpCriterion = "activation",
    average: Literal["prompts", "tokens"] = "prompts",
) -> UnitScores:
    """AMP's importance of every head and neuron, from one forward pass over calibration prompts.

    A head's is the mean over tokens of ``||z_h W_h||_1``, its contribution to the residual stream; a neuron's the mean
    of ``|a_j|``. Computed in float32 at least, whatever the model's type.

    Parameters
    ----------
    model
        Causal or not, of a family that :func:`papertrial.lm.anatomy.anatomy` knows.
    batches
        Calibration prompts; padded places do not count.
    mlp_criterion
        ``activation`` as in the authors' code; ``projected`` weights it by the row of the output matrix,
        ``|a_j| ||W_j||_1``, which is for a neuron what the head rule is for a head.
    average
        ``prompts`` (the authors'): over the tokens of each prompt, then over prompts; ``tokens``: over all tokens.

    Raises
    ------
    ValueError
        For an unknown family, no prompts, or a prompt without a token.
    """
    one_of("mlp_criterion", mlp_criterion, MlpCriterion)
    one_of("average", average, Literal["prompts", "tokens"])
    blocks = anatomy(model).blocks
    heads = [torch.zeros(block.heads, dtype=torch.float64) for block in blocks]
    neurons = [torch.zeros(block.neurons, dtype=torch.float64) for block in blocks]
    weights = torch.empty(0)  # (B, T), of the batch that is passing

    def add(site: str, layer: int, values: Tensor) -> None:
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        block = blocks[layer]
        if site == "head_out":  # (B, T, H, d_h); head by head, all at once would hold (B, T, H, D)
            for head, w in enumerate(block.W_O.to(values)):
                heads[layer][head] += float((weights * (values[:, :, head] @ w).abs().sum(-1)).sum())
        else:  # (B, T, F)
            total = torch.einsum("bt,btf->f", weights.to(values), values.abs())
            if mlp_criterion == "projected":
                total = total * block.W_out.to(values).abs().sum(1)
            neurons[layer] += total.double().cpu()

    count = 0.0
    with evaluating(model), visit(model, ["head_out", "mlp_act"], add):
        for batch in batches:
            inputs, mask = _inputs(model, batch)
            lengths = mask.sum(1, keepdim=True)
            if int(lengths.min()) == 0:
                raise ValueError(f"prompt {int(lengths.argmin())} of a batch has no token: drop it")
            weights = mask / lengths if average == "prompts" else mask.float()
            count += len(mask) if average == "prompts" else float(mask.sum())
            body(model)(**inputs)
    if not count:
        raise ValueError("batches is empty: importance needs at least one prompt (the authors use 50)")
    return UnitScores(tuple(row / count for row in heads), tuple(row / count for row in neurons))


def _inputs(model: PreTrainedModel, batch: Batch) -> tuple[dict[str, Any], Tensor]:
    ids, mask = (batch, torch.ones_like(batch)) if isinstance(batch, Tensor) else batch
    if ids.dim() != 2 or ids.shape != mask.shape:
        raise ValueError(
            f"a batch is ids (B, T) with a mask of that shape; got {tuple(ids.shape)}, {tuple(mask.shape)}"
        )
    ids, mask = ids.to(device_of(model)), mask.to(device_of(model))
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if anatomy(model).family.causal:
        inputs["use_cache"] = False
        if "position_ids" in inspect.signature(body(model).forward).parameters:
            inputs["position_ids"] = position_ids(mask)
    return inputs, mask
