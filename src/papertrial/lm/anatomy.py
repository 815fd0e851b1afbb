"""Where things are in a transformer checkpoint."""

from typing import cast

from torch import nn
from transformers import PreTrainedModel


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside ``model``: itself, or what a peft wrapper or DistributedDataParallel holds."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    while not isinstance(model, PreTrainedModel) and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    return model


def body(model: nn.Module) -> PreTrainedModel:
    """The model without its head; its ``last_hidden_state`` is after the final norm."""
    return cast(PreTrainedModel, unwrap(model).get_decoder())


def position_limit(model: nn.Module) -> int | None:
    """How many positions a learned table holds; None for rotary models and for families without an entry here."""
    core = body(model)
    for path, reserved in (("wpe", 0), ("decoder.embed_positions", 2)):
        try:
            table = core.get_submodule(path)
        except AttributeError:
            continue
        return table.weight.shape[0] - reserved
    return None


def reads_out(model: nn.Module) -> bool:
    """Whether :func:`read_out` knows the head of this model."""
    inner = unwrap(model)
    return type(inner).__name__.endswith(("ForCausalLM", "GPT2LMHeadModel")) and inner.config.model_type in _CAUSAL


_CAUSAL = {"gpt2", "gpt_neox", "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "opt", "phi"}


def read_out(model: nn.Module, hidden):
    """Logits of final hidden states."""
    inner = unwrap(model)
    logits = inner.get_output_embeddings()(hidden)
    cap = getattr(inner.config, "final_logit_softcapping", None)
    return logits if cap is None else (logits / cap).tanh() * cap
