"""The whole recipe on somebody's checkpoint."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from transformers import PreTrainedModel

from papertrial.lm.anatomy import device_of, position_limit
from papertrial.lm.batches import random_batches
from papertrial.lm.changing import Changed
from papertrial.lm.generation import left_pad
from papertrial.lm.pruning import LayerSizes, parameter_counts, parameters_after, prune, require_ordinary, sizes
from papertrial.papers.compression.amp_pruning.method.importance import Batch, amp_importance
from papertrial.papers.compression.amp_pruning.method.options import Compensation, Grouping, MlpCriterion, Parts, one_of
from papertrial.papers.compression.amp_pruning.method.recovery import recover
from papertrial.papers.compression.amp_pruning.method.selection import amp_amounts, amp_plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from papertrial.lm.models import Checkpoint


_PROMPTS_AT_ONCE = 8


@dataclass(frozen=True)
class ApplyOptions:
    """Options of ``papertrial apply amp_pruning``.

    As in the authors' code, but for ``compensate``: a user who asks for a ratio wants that ratio.
    """

    ratio: Annotated[float, "share of all parameters to take out"] = 0.2
    mlp_criterion: Annotated[MlpCriterion, "importance of a neuron: its activation, or projected like a head's"] = (
        "activation"
    )
    compensate: Annotated[Compensation, "worth of a rounded-off head in neurons: the authors' code, or parameters"] = (
        "params"
    )
    groups: Annotated[
        Grouping, "heads that share keys: take out whole groups, or as many heads within each; auto: the finer steps"
    ] = "auto"
    parts: Annotated[Parts, "heads and neurons, or mlp for neurons only"] = "both"
    prompts: Annotated[int, "calibration prompts"] = 50
    prompt_tokens: Annotated[int, "longest calibration prompt"] = 256
    tune_steps: Annotated[int, "steps of LoRA recovery on the calibration texts; 0 for none"] = 0
    tune_rate: Annotated[float, "learning rate of the recovery"] = 3e-4
    tune_rank: Annotated[int, "rank of its adapters"] = 8
    tune_batch: Annotated[int, "sequences in each of its steps"] = 16


def apply(
    checkpoint: "Checkpoint",
    texts: Sequence[str],
    options: ApplyOptions,
    *,
    generator: torch.Generator,
    on_progress: Callable[[str, int, int | None], None] | None = None,
) -> Changed:
    """Prune a checkpoint with calibration texts, and recover it if asked; ``checkpoint`` is left as it was.

    Raises
    ------
    ValueError
        Before any work is done, where the cut model would not be an ordinary checkpoint.
    """
    _check_options(options)
    model = checkpoint.model
    before = sizes(model)[0]
    settings: dict[str, Any] = {name: getattr(options, name) for name in ("compensate", "groups", "parts")}
    amounts = amp_amounts(model, options.ratio, **settings)
    after = LayerSizes(
        before.heads - amounts.heads, before.key_value_heads - amounts.groups, before.neurons - amounts.neurons
    )
    try:
        require_ordinary(model, [after] * len(sizes(model)))
    except ValueError as error:
        raise ValueError(f"{error} (--parts mlp)") from error

    def progress(what: str) -> Callable[[int, int | None], None]:
        return lambda done, total: on_progress(what, done, total) if on_progress else None

    limit = position_limit(model)
    if limit is not None and options.prompt_tokens > limit:
        raise ValueError(f"prompt_tokens is {options.prompt_tokens} and the model has {limit} positions")
    pieces = calibration_pieces(checkpoint.tokenizer, texts, options.prompt_tokens)
    if len(pieces) < options.prompts:
        raise ValueError(
            f"the calibration texts give {len(pieces)} prompts of up to {options.prompt_tokens} tokens and "
            f"{options.prompts} are asked for: give more text, or lower prompts or prompt_tokens"
        )
    chosen = [pieces[i] for i in torch.randperm(len(pieces), generator=generator)[: options.prompts].tolist()]
    report = progress("measuring importance")

    def batches() -> Iterator[Batch]:
        for done in range(0, len(chosen), _PROMPTS_AT_ONCE):
            report(done, len(chosen))
            yield left_pad(chosen[done : done + _PROMPTS_AT_ONCE], 0)
        report(len(chosen), len(chosen))

    importance = amp_importance(model, batches(), mlp_criterion=options.mlp_criterion)
    plan = amp_plan(model, importance, options.ratio, **settings)
    whole, left = parameter_counts(model).total, parameters_after(model, plan)
    pruned = prune(model, plan)
    facts: dict[str, str | float] = {
        "heads per layer": f"{after.heads} of {before.heads}",
        "key/value heads per layer": f"{after.key_value_heads} of {before.key_value_heads}",
        "MLP neurons per layer": f"{after.neurons} of {before.neurons}",
        "parameters taken out": f"{100 * (1 - left / whole):.1f} % (asked for {100 * options.ratio:g} %)",
        "calibration prompts": f"{len(chosen)}, {sum(map(len, chosen)):,} tokens",
    }
    if type(pruned) is not type(model):
        facts["class"] = (
            f"{type(pruned).__name__}: the same function as {type(model).__name__}, whose configuration does not allow "
            f"{after.heads} heads beside a width of {model.config.hidden_size}"
        )
    if options.tune_steps:
        pruned = _recovered(pruned, pieces, options, generator, progress("recovering"))
        facts["recovery"] = f"LoRA of rank {options.tune_rank}, {options.tune_steps} steps of {options.tune_batch} rows"
    return Changed(pruned, _summary(before, after, options), facts)


def _summary(before: LayerSizes, after: LayerSizes, options: ApplyOptions) -> str:
    """What was taken out and what was not, in words that are true of these amounts."""
    gone, left, whole = [], [], ""
    if after.heads < before.heads:
        gone.append("the attention heads that write least into the residual stream")
        left.append(f"{after.heads} of {before.heads} heads")
    elif options.parts == "mlp":
        whole = f" All {before.heads} heads stay, as was asked for."
    else:
        whole = f" All {before.heads} heads stay: heads come in steps too coarse for the share asked for."
    if after.neurons < before.neurons:
        score = "are least active" if options.mlp_criterion == "activation" else "feed the residual stream least"
        gone.append(f"the MLP neurons that {score}")
        left.append(f"{after.neurons} of {before.neurons} neurons")
    else:
        whole = f" All {before.neurons} neurons stay: the heads alone hold the share asked for."
    tuned = "Then the model was tuned briefly." if options.tune_steps else "It was not tuned since."
    if not gone:
        return f"Nothing was taken out: {100 * options.ratio:g} % is less than half a neuron of every layer. {tuned}"
    return (
        f"In every layer {' and '.join(gone)} were taken out, as AMP (arXiv 2504.21174) ranks them: "
        f"{' and '.join(left)} are left.{whole} {tuned}"
    )


def _recovered(
    pruned: PreTrainedModel,
    pieces: Sequence[Sequence[int]],
    options: ApplyOptions,
    generator: torch.Generator,
    on_progress: Callable[[int, int | None], None],
) -> PreTrainedModel:
    stream = torch.cat([torch.tensor(piece) for piece in pieces]).to(device_of(pruned))
    length = min(options.prompt_tokens, len(stream))
    return recover(
        pruned,
        random_batches(stream, options.tune_batch, length, generator=generator),
        steps=options.tune_steps,
        generator=generator,
        rate=options.tune_rate,
        rank=options.tune_rank,
        alpha=2 * options.tune_rank,
        on_progress=on_progress,
    )


def calibration_pieces(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], length: int) -> list[list[int]]:
    """Every text as runs of up to ``length`` tokens; a run of one token, which says nothing, is left out."""
    pieces = []
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"]
        pieces += [ids[start : start + length] for start in range(0, len(ids), length)]
    return [piece for piece in pieces if len(piece) > 1]


def _check_options(options: ApplyOptions) -> None:
    one_of("mlp_criterion", options.mlp_criterion, MlpCriterion)
    for name, least in (("prompts", 1), ("prompt_tokens", 2), ("tune_steps", 0), ("tune_rank", 1), ("tune_batch", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(options, name)}")
    if not options.tune_rate > 0:
        raise ValueError(f"tune_rate must be positive, got {options.tune_rate}")
