"""An early look into the large model: states of its first layers, which cost a fraction of its answer."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from papertrial.lm.anatomy import anatomy, body, device_of, unwrap
from papertrial.lm.generation import evaluating, position_ids


class _ReachedError(Exception):
    """The layer that is asked for has run: nothing behind it is needed."""


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that write the answer, of a decoder or an encoder-decoder."""
    if model.config.is_encoder_decoder:
        return list(next(part for part in body(model).children() if isinstance(part, nn.ModuleList)))
    return [block.module for block in anatomy(model).blocks]


def start_token(model: PreTrainedModel) -> int:
    """The token an encoder-decoder's answers start from."""
    for source in (model.generation_config, model.config):
        start = getattr(source, "decoder_start_token_id", None)
        if start is not None:
            return int(start)
    raise ValueError(f"model: {type(model).__name__} names no decoder_start_token_id; set it in its generation_config")


@torch.no_grad()
def early_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, *, layer: int = 1) -> Tensor:
    """What a model knows of inputs early on, (N, 2D) float32: how it read them, and how it is about to answer.

    Of an encoder-decoder: the mean of the encoder's output over the input, and the state behind layer ``layer`` of the
    decoder at its first place. A decoder reads with the layers it writes with: the mean over the input, and the state
    at its last place, from which the first token is predicted, both behind layer ``layer``. No later layer is run.

    Parameters
    ----------
    input_ids, attention_mask
        Inputs (N, S), padded on the left for decoders.
    layer
        Counted from 1.

    Raises
    ------
    ValueError
        If the model has no such layer, or is an encoder-decoder without a start token.

    References
    ----------
    arXiv 2404.10136; which layer is meant is not known to us.
    """
    blocks = decoder_layers(model)
    if not 1 <= layer <= len(blocks):
        raise ValueError(f"layer must lie between 1 and {len(blocks)}, got {layer}")
    seen: list[Tensor] = []

    def stop(module: nn.Module, arguments: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)
        raise _ReachedError

    device = device_of(model)
    input_ids, attention_mask = input_ids.to(device), attention_mask.to(device=device, dtype=torch.long)
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    with evaluating(model):
        if model.config.is_encoder_decoder:
            read = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)
            inputs |= {"encoder_outputs": read, "input_ids": None}
            inputs["decoder_input_ids"] = torch.full_like(input_ids[:, :1], start_token(model))
        elif "position_ids" in inspect.signature(unwrap(model).forward).parameters:
            inputs["position_ids"] = position_ids(attention_mask)
        handle = blocks[layer - 1].register_forward_hook(stop)
        try:
            model(**inputs)
        except _ReachedError:
            pass
        finally:
            handle.remove()
    state = seen[0].float()
    whole = read.last_hidden_state.float() if model.config.is_encoder_decoder else state
    weight = attention_mask[..., None].to(whole)
    return torch.cat([(whole * weight).sum(1) / weight.sum(1), state[:, -1]], 1)
