"""Attention sinks: how to measure them in any checkpoint, and attention variants with and without them.

A head that has nothing to fetch still has to hand out a sum of one when its weights are a softmax; it learns to put
the surplus on a token that all others can see, the first, whose value then shrinks. Weights that need not sum to one,
or a learned key that costs nothing to look at, take away the reason.

    reports = measure_sinks(model, input_ids)                   # input_ids (100, 64)
    reports["natural"].first                                    # percent of heads that sink into the first token
    reports["repeat"].importance                                # (L, H, T)

    model = LlamaForCausalLM(config)
    with set_attention(model, "sigmoid"):                       # or k_bias, kv_bias, linear_norm ...: see VARIANTS
        train(model, batches, steps=2000, optimizer=adamw(3e-3))
        print(measure_sinks(model, input_ids)["natural"].first_proxy_importance)
    model.save_pretrained(folder)                               # set_attention(..., saved=folder) brings a bias back

Source: arXiv 2410.10781, sections 3 and 7, and the models of its authors' repository.
"""

from papertrial.papers.attention.attention_sink.method.measure import (
    column_excess,
    column_importance,
    proxy_scores,
    sink_metric,
    uniform_importance,
)
from papertrial.papers.attention.attention_sink.method.saved import SINK_PARAMETERS
from papertrial.papers.attention.attention_sink.method.survey import KINDS, Kind, SinkReport, measure_sinks
from papertrial.papers.attention.attention_sink.method.variants import (
    VARIANTS,
    FeatureMap,
    SinkBias,
    Variant,
    add_sink_token,
    attention_weights,
    forget_attention,
    prepend_sink_token,
    set_attention,
)

__all__ = [
    "KINDS",
    "SINK_PARAMETERS",
    "VARIANTS",
    "FeatureMap",
    "Kind",
    "SinkBias",
    "SinkReport",
    "Variant",
    "add_sink_token",
    "attention_weights",
    "column_excess",
    "column_importance",
    "forget_attention",
    "measure_sinks",
    "prepend_sink_token",
    "proxy_scores",
    "set_attention",
    "sink_metric",
    "uniform_importance",
]
