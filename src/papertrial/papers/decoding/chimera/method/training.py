"""Training a draft on a frozen base model, and how often its guesses are right."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from papertrial.lm.anatomy import body, read_out
from papertrial.lm.generation import evaluating, position_ids
from papertrial.lm.losses import Batch, Loss
from papertrial.lm.training import TrainingReport, adamw, train, warmup_cosine
from papertrial.papers.decoding.chimera.method.drafts import Draft


@torch.no_grad()
def final_states(base: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The base model's final hidden states (B, T, D): what its head reads."""
    inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    if attention_mask is not None:
        inputs |= {"attention_mask": attention_mask, "position_ids": position_ids(attention_mask)}
    with evaluating(base):
        return body(base)(**inputs).last_hidden_state


def draft_loss(
    draft: Draft,
    base: PreTrainedModel,
    batch: Batch,
    *,
    distil: float = 1.0,
    regress: float = 1.0,
    own_drafts: bool = False,
    detach: bool = True,
) -> Loss:
    """Sum over positions and steps of the cross-entropy to the text, ``distil`` times the divergence from the base
    model and ``regress`` times the squared error of the estimated states.

    Parameters
    ----------
    batch
        Ids (B, T), or a mapping with ``input_ids`` and optionally ``attention_mask`` (B, T) and the base model's final
        ``hidden`` states (B, T, D), where they are at hand.
    distil
        Weight of KL(base || draft) at the place of the guess. The paper names cross-entropy and distillation and gives
        no weights; the released script trains on cross-entropy alone.
    regress
        Weight of the mean squared error between estimate and true state, for drafts that have estimates.
    own_drafts, detach
        See :meth:`Draft.training_steps`.

    Returns
    -------
    Loss
        Per position, steps summed; ``parts`` holds ``accuracy_s``, the share of right best guesses at each step.
    """
    inputs: Mapping[str, Tensor] = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    hidden = inputs["hidden"] if "hidden" in inputs else final_states(base, ids, mask)
    steps = draft.training_steps(ids, hidden, mask, own_drafts=own_drafts, detach=detach)
    places = steps[0].logits.shape[1]
    total = hidden.new_zeros((), dtype=torch.float32)
    parts: dict[str, Tensor | float] = {}
    weight: Tensor | float = float(len(ids) * places)
    for step, output in enumerate(steps, 1):
        target, truth = ids[:, step + 1 : places + step + 1], hidden[:, step : places + step]
        real = torch.ones_like(target, dtype=torch.bool)
        if mask is not None:  # the state that is continued and the token that is guessed must both be there
            real = mask[:, :places].bool() & mask[:, step + 1 : places + step + 1].bool()
            weight = real.sum() if step == 1 else weight
        logits = output.logits[real].float()
        total = total + nn.functional.cross_entropy(logits, target[real], reduction="sum")
        if distil:
            with torch.no_grad():
                teacher = read_out(base, truth[real].to(base.dtype)).float().log_softmax(-1)
            total = total + distil * nn.functional.kl_div(
                logits.log_softmax(-1), teacher, reduction="sum", log_target=True
            )
        if regress and output.states is not None:
            error = (output.states[real].float() - truth[real].float()).square().mean(-1)
            total = total + regress * error.sum()
        parts[f"accuracy_{step}"] = (logits.argmax(-1) == target[real]).float().mean()
    return Loss(total, weight, parts)


def train_draft(
    draft: Draft,
    base: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    steps: int,
    lr: float = 2e-4,
    warmup: float = 0.01,
    weight_decay: float = 0.0,
    accumulate: int = 1,
    distil: float = 1.0,
    regress: float = 1.0,
    own_drafts: bool = False,
    detach: bool = True,
    precision: Literal["fp32", "bf16"] = "fp32",
    **settings: Any,
) -> TrainingReport:
    """Train a draft in place; the base model is only read.

    Parameters
    ----------
    batches
        See :func:`draft_loss`. The authors use sequences of 1024 tokens, 4 at a time, 8 accumulated, for 2 epochs.
    steps, lr, warmup
        AdamW at ``lr`` (the authors' 2e-4), after a rise over the share ``warmup`` of the steps half a cosine to 0.
    distil, regress, own_drafts, detach
        See :func:`draft_loss`.
    **settings
        For ``lm.training.train``: ``checkpoint``, ``on_step``, ``on_progress`` ...

    Raises
    ------
    ValueError
        A share of warm-up outside [0, 1), sequences shorter than ``n_heads`` + 2 tokens, and what ``train`` raises.
    """
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup is a share of the steps in [0, 1), got {warmup}")

    def loss(_: nn.Module, batch: Batch) -> Loss:
        return draft_loss(draft, base, batch, distil=distil, regress=regress, own_drafts=own_drafts, detach=detach)

    return train(
        draft,
        batches,
        steps=steps,
        optimizer=adamw(lr, weight_decay=weight_decay),
        schedule=warmup_cosine(steps, int(warmup * steps), floor=0.0),
        loss=loss,
        accumulate=accumulate,
        precision=precision,
        **settings,
    )


@torch.no_grad()
def draft_accuracy(
    draft: Draft, base: PreTrainedModel, input_ids: Tensor, *, k: int = 1, start: int = 0
) -> list[float]:
    """How often each step's ``k`` best guesses hold the next token, where the tokens before it were drafted right.

    Parameters
    ----------
    input_ids
        Texts (B, T). On the base model's own greedy continuations this is the chance that verification accepts.
    start
        Positions before it are left out (a prompt that the base model did not write).

    Returns
    -------
    list of float
        One share per step.
    """
    if not 1 <= k <= draft.vocabulary:
        raise ValueError(f"k must lie between 1 and the {draft.vocabulary} tokens there are, got {k}")
    with evaluating(draft):
        steps = draft.training_steps(input_ids, final_states(base, input_ids))
    places = steps[0].logits.shape[1]
    if not 0 <= start < places:
        raise ValueError(f"start must lie between 0 and {places - 1}, got {start}")
    shares = []
    for step, output in enumerate(steps, 1):
        target = input_ids[:, step + 1 : places + step + 1, None]
        shares.append(float((output.logits.topk(k).indices == target).any(-1)[:, start:].float().mean()))
    return shares
