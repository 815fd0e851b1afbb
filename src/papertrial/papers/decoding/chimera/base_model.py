"""A base model of the sizes that a scale asks for, where a house model is too small for what is claimed."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from papertrial.lm.batches import random_batches
from papertrial.lm.training import adamw, train, warmup_cosine

Model = TypeVar("Model", bound=PreTrainedModel)


def train_base(
    tokenizer: PreTrainedTokenizerFast,
    stream: Tensor,
    sizes: Mapping[str, Any],
    *,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int | None], None] | None = None,
) -> LlamaForCausalLM:
    """A Llama decoder trained from nothing on a stream of tokens.

    Parameters
    ----------
    tokenizer
        Of the stream.
    stream
        Token ids (N,).
    sizes
        ``layers``, ``width``, ``heads``; ``steps``, ``batch``, ``length``, ``lr`` of training; ``dtype``, the name of
        the precision that the weights have in the end (training is in float32, under autocast if it is another).
    generator
        Of initial weights and batches.

    Returns
    -------
    LlamaForCausalLM
        In evaluation mode, on ``device``.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes["width"],
        intermediate_size=sizes["width"] * 8 // 3 // 8 * 8,
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["heads"],
        max_position_embeddings=sizes["length"],
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    dtype = getattr(torch, sizes["dtype"])
    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global generator
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        model = LlamaForCausalLM(config)
    torch.nn.Module.to(model, device)
    steps = sizes["steps"]
    train(
        model,
        random_batches(stream.to(device), sizes["batch"], sizes["length"], generator=generator),
        steps=steps,
        optimizer=adamw(sizes["lr"], weight_decay=0.1),
        schedule=warmup_cosine(steps, steps // 20),
        precision="fp32" if dtype == torch.float32 else "bf16",
        on_progress=on_progress,
    )
    return in_precision(model, dtype)


def in_precision(model: Model, dtype: torch.dtype) -> Model:
    """Change the precision of a model's weights; the frequencies of its rotary positions stay in float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model
