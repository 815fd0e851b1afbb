"""Cascades of a small and a large language model with token-level deferral rules (arXiv 2404.10136).

The small model answers; a rule reads the uncertainty of its tokens and decides whether the large model answers instead.

>>> records = answer(small, input_ids, attention_mask, max_new_tokens=32, eos_token_id=2)            # doctest: +SKIP
>>> rule = PostHocDeferral("quantile", generator=torch.Generator().manual_seed(0))                   # doctest: +SKIP
>>> rule.fit(records, small_quality, large_quality)                                                  # doctest: +SKIP
>>> rates, quality = deferral_curve(rule.score(test_records), test_small, test_large)                # doctest: +SKIP
>>> cascade = Cascade(small, large, rule, threshold=0.3, max_new_tokens=32, eos_token_id=2)          # doctest: +SKIP
>>> cascade.generate(input_ids, attention_mask).outputs                                              # doctest: +SKIP
"""

from papertrial.papers.decoding.cascades.method.answers import Records, answer, first_layer_states, forward_flops
from papertrial.papers.decoding.cascades.method.cascade import Cascade, CascadeOutput
from papertrial.papers.decoding.cascades.method.confidence import (
    ALPHAS,
    chow_average,
    chow_quantile,
    chow_sum,
    quantile_features,
)
from papertrial.papers.decoding.cascades.method.curves import (
    LengthBias,
    auc_df,
    cost_curve,
    deferral_curve,
    length_bias_report,
    oracle_score,
    random_auc,
    relative_gain,
)
from papertrial.papers.decoding.cascades.method.post_hoc import PostHocDeferral

__all__ = [
    "ALPHAS",
    "Cascade",
    "CascadeOutput",
    "LengthBias",
    "PostHocDeferral",
    "Records",
    "answer",
    "auc_df",
    "chow_average",
    "chow_quantile",
    "chow_sum",
    "cost_curve",
    "deferral_curve",
    "first_layer_states",
    "forward_flops",
    "length_bias_report",
    "oracle_score",
    "quantile_features",
    "random_auc",
    "relative_gain",
]
