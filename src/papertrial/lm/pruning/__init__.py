"""Structured pruning: take heads, neurons and layers out of a model, for every family of :mod:`papertrial.lm.anatomy`.

    plan = Plan(heads=[[0, 2]] * layers, neurons=[range(256)] * layers)  # what is kept
    smaller = prune(model, plan)  # really smaller, not masked
    smaller.save_pretrained(folder)  # AutoModelForCausalLM.from_pretrained reads it

The weights are sliced, so that the model is smaller and faster, and its logits are those of the whole model with the
dropped parts zeroed (:func:`masked`, the oracle of the tests).

What reloads with plain transformers
------------------------------------
A stock configuration has one width for all layers. A model that was cut alike in every layer is an ordinary checkpoint
where its family can say what was cut:

- neurons and layers: every family;
- heads: those whose configuration has a head size of its own (Mistral, Qwen2, Qwen3, Gemma, Phi). Llama and Gemma2
  have one too, but their configurations insist that the number of heads divides the width. A Llama model without biases
  is the same function as a Mistral model without a window, and :func:`prune` returns it as one where that is needed;
- not heads of GPT-2, GPT-NeoX, OPT, BERT and RoBERTa, where the head size is always width / heads.

:func:`require_ordinary` says beforehand whether a cut has an ordinary form. What has none works in memory all the same;
it is saved by ``save_pretrained`` with its sizes in the configuration, and read by :func:`load_pruned`.
"""

from papertrial.lm.pruning.criteria import UnitScores, loss_change_scores, magnitude_scores, random_scores, wanda_scores
from papertrial.lm.pruning.ordinary import is_ordinary, load_pruned, require_ordinary
from papertrial.lm.pruning.plan import (
    LayerSizes,
    ParameterCounts,
    Plan,
    UnitCosts,
    parameter_counts,
    parameters_after,
    sizes,
    unit_costs,
    whole_plan,
)
from papertrial.lm.pruning.surgery import keep_layers, masked, prune
from papertrial.lm.pruning.visiting import visit

__all__ = [
    "LayerSizes",
    "ParameterCounts",
    "Plan",
    "UnitCosts",
    "UnitScores",
    "is_ordinary",
    "keep_layers",
    "load_pruned",
    "loss_change_scores",
    "magnitude_scores",
    "masked",
    "parameter_counts",
    "parameters_after",
    "prune",
    "random_scores",
    "require_ordinary",
    "sizes",
    "unit_costs",
    "visit",
    "wanda_scores",
    "whole_plan",
]
