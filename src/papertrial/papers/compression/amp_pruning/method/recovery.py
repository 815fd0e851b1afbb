"""The short tuning after the cut."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from papertrial.lm.anatomy import anatomy
from papertrial.lm.training import adamw, linear, train


def recover(
    model: PreTrainedModel,
    batches: Iterable[Any],
    *,
    steps: int,
    generator: torch.Generator,
    rate: float = 3e-4,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.05,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> PreTrainedModel:
    """A short LoRA tuning of a pruned model (2106.09685), merged back into its weights; ``model`` is changed.

    Defaults are the authors': adapters of rank 8 on all projections of attention and MLP, AdamW without weight decay,
    a rate that falls linearly to 0. They tune for two epochs of an instruction set.

    Parameters
    ----------
    batches
        What :func:`papertrial.lm.training.train` takes: ids (B, T), or mappings with ``labels``.
    generator
        On the CPU; adapters and dropout are drawn from seeds of it.
    """
    from peft import LoraConfig, get_peft_model

    wanted = {
        id(module)
        for block in anatomy(model).blocks
        for module in (
            *(block.projection(name) for name in ("query", "key", "value")),  # type: ignore[arg-type]
            *(block.output, block.gate, block.up, block.down),
        )
    }
    targets = [name for name, module in model.named_modules() if id(module) in wanted]
    seed = int(torch.randint(2**31, (1,), generator=generator))
    config = LoraConfig(r=rank, lora_alpha=cast(int, alpha), lora_dropout=dropout, target_modules=targets)
    config.fan_in_fan_out = isinstance(anatomy(model).blocks[0].output, Conv1D)
    with torch.random.fork_rng(), warnings.catch_warnings():
        # peft asks for an attribute that transformers is about to rename; nobody who prunes can do anything about it
        warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)
        torch.manual_seed(seed)
        tuned = get_peft_model(model, config)
    train(
        tuned,
        batches,
        steps=steps,
        optimizer=adamw(rate, weight_decay=0.0, betas=(0.9, 0.999)),
        schedule=linear(steps),
        seed=seed,
        on_progress=on_progress,
    )
    merged = cast(PreTrainedModel, cast(Any, tuned).merge_and_unload())
    merged.requires_grad_(True)
    return merged.eval()
