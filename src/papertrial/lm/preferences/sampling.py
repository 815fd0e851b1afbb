"""Pairs that a model makes itself: several answers to a prompt, the best against the worst by some reward."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from papertrial.lm.generation import Generation, sample
from papertrial.lm.preferences.pairs import PreferencePair, check_ids
from papertrial.lm.preferences.reference import vocabulary_of


def pairs_from_samples(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    reward: Callable[[Generation], Tensor],
    max_new_tokens: int,
    generator: torch.Generator,
    num_samples: int = 2,
    eos_token_id: int | Sequence[int] | None = None,
    batch_size: int = 256,
) -> list[PreferencePair]:
    """Sample ``num_samples`` answers to each prompt at temperature 1 and pair the best with the worst.

    Parameters
    ----------
    model
        Usually the supervised model that training will start from.
    prompt_ids, attention_mask
        (P, S), padded on the left.
    reward
        Function of the samples to one number (N,) each. The first of equals counts as best and as worst.
    generator
        Draws the samples; the pairs do not depend on ``batch_size``.
    batch_size
        Prompts at a time.

    Returns
    -------
    list of PreferencePair
        In the order of the prompts; a prompt whose answers all have one reward gives none, so there may be fewer than
        prompts, or none at all.

    Raises
    ------
    ValueError
        Fewer than two samples, prompts with unknown ids, a reward that is not one number a sample, or NaN.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples must be at least 2 to make a pair, got {num_samples}")
    check_ids("prompt_ids", prompt_ids, vocabulary_of(model))
    if attention_mask is None:
        attention_mask = torch.ones_like(prompt_ids)
    pairs = []
    for ids, mask in zip(prompt_ids.split(batch_size), attention_mask.split(batch_size), strict=True):
        drawn = sample(
            model,
            ids,
            mask,
            max_new_tokens=max_new_tokens,
            generator=generator,
            num_samples=num_samples,
            eos_token_id=eos_token_id,
        )
        values = reward(drawn)
        if values.shape != drawn.mask.shape[:1] or bool(values.isnan().any()):
            raise ValueError(
                f"reward must give one number for each of the {len(drawn.mask)} samples, got the shape "
                f"{tuple(values.shape)}{' with NaN' if bool(values.isnan().any()) else ''}"
            )
        answers = drawn.continuations()
        for row, of_prompt in enumerate(values.view(-1, num_samples)):
            best, worst = int(of_prompt.argmax()), int(of_prompt.argmin())
            if of_prompt[best] > of_prompt[worst]:
                prompt = ids[row][mask[row].bool()]
                pairs.append(
                    PreferencePair(prompt.cpu(), answers[row * num_samples + best], answers[row * num_samples + worst])  # type: ignore[arg-type]
                )
    return pairs
