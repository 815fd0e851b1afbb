"""One forward pass made ready for scoring: inputs with positions, and logits of as few places at a time as wanted."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from papertrial.lm.anatomy import body, device_of, position_limit, read_out, reads_out, unwrap
from papertrial.lm.generation import position_ids


def forward_inputs(
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


def stock_forward(model: nn.Module) -> bool:
    """Whether body, then unembedding, is all that ``model.forward`` does: no wrapper, subclass or patched method."""
    if hasattr(model, "get_base_model"):
        configs = getattr(model, "peft_config", {})
        if any(getattr(config, "is_prompt_learning", False) for config in configs.values()) or "forward" in vars(model):
            return False
        model = cast(Any, model).get_base_model()
    stock = type(model).__module__.startswith("transformers.") and "forward" not in vars(model)
    return stock and reads_out(model)


def states_and_head(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Per-position vectors (B, T, ...) and the function from some of them to float32 logits."""
    if stock_forward(model):
        hidden = body(model)(**inputs).last_hidden_state
        return hidden, lambda states: read_out(model, states).float()
    logits = model(**inputs).logits
    if logits.shape[:2] != inputs["input_ids"].shape:
        raise ValueError(f"the model returned logits {tuple(logits.shape)} for ids {tuple(inputs['input_ids'].shape)}")
    return logits, lambda states: states.float()


def chunks(states: Tensor, targets: Tensor, vocabulary: int, logits_at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
    """States (N, ...) and what belongs to them (N, ...) in pieces whose logits stay within ``logits_at_once``."""
    if logits_at_once < 1:
        raise ValueError(f"logits_at_once must be at least 1, got {logits_at_once}")
    size = max(1, logits_at_once // vocabulary)
    return zip(states.split(size), targets.split(size), strict=True)
