"""What answers cost: multiplications and additions of the models' weights."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from papertrial.papers.decoding.cascades.method.early import decoder_layers


def forward_flops(
    model: PreTrainedModel, prompt_lengths: Tensor, answer_lengths: Tensor | None = None, *, layer: int | None = None
) -> Tensor:
    """Multiplications and additions (N,) of answering inputs: two per weight of the layers and of the head, and token.

    Parameters
    ----------
    prompt_lengths, answer_lengths
        Tokens (N,). Without answers: of reading the inputs alone.
    layer
        Only the first ``layer`` layers of the decoder, as :func:`early_states` runs them, and no head.
    """
    head = model.get_output_embeddings()
    per_output = 0 if layer is not None or head is None else cast(Tensor, head.weight).numel()
    written = torch.zeros_like(prompt_lengths) if answer_lengths is None else answer_lengths

    def weights(parts: Sequence[nn.Module]) -> int:
        return sum(p.numel() for part in parts for p in part.parameters() if p.dim() > 1)

    if model.config.is_encoder_decoder:
        encoder = next(part for part in model.get_encoder().children() if isinstance(part, nn.ModuleList))
        steps = written.clamp(min=1) if layer is not None else written
        read, made = weights(list(encoder)), weights(decoder_layers(model)[:layer])
        return 2.0 * (read * prompt_lengths + made * steps + per_output * written).double()
    made = weights(decoder_layers(model)[:layer])
    return 2.0 * (made * (prompt_lengths + written) + per_output * written).double()
