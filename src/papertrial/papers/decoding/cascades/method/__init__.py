"""Cascades of a small and a large language model with token-level deferral rules (arXiv 2404.10136).

The small model answers; a rule reads the uncertainty of its tokens and decides whether the large model answers instead.
With two checkpoints, ``small`` and ``large``, and prompts with known answers (:func:`papertrial.lm.models.load` loads
decoders; of encoder-decoders, take model and tokenizer from transformers, ``AutoModelForSeq2SeqLM``):

>>> ours, theirs = (answer_texts(each.model, each.tokenizer, prompts, max_new_tokens=32)             # doctest: +SKIP
...                 for each in (small, large))
>>> small_quality, large_quality = (                                                                 # doctest: +SKIP
...     [float(made == right) for made, right in zip(each.texts, answers)] for each in (ours, theirs))
>>> rule = PostHocDeferral("quantile", generator=torch.Generator().manual_seed(0))                   # doctest: +SKIP
>>> rule.fit(ours.records, small_quality, large_quality)                                             # doctest: +SKIP

On other prompts with known answers (``test``, made likewise), how good it is and where to cut; then on any:

>>> rates, quality = deferral_curve(rule.score(test.records), test_small, test_large)                # doctest: +SKIP
>>> threshold = threshold_at(rule.score(test.records), rate=0.3)                                     # doctest: +SKIP
>>> cascade = Cascade(small.model, large.model, rule, threshold=threshold, max_new_tokens=32,        # doctest: +SKIP
...                   tokenizers=(small.tokenizer, large.tokenizer))
>>> cascade.answer(["The capital of France is"]).texts                                               # doctest: +SKIP

:func:`answer` and :meth:`Cascade.generate` do the same with token ids.
"""

from papertrial.papers.decoding.cascades.method.answers import Records, answer
from papertrial.papers.decoding.cascades.method.cascade import Cascade, CascadeOutput
from papertrial.papers.decoding.cascades.method.confidence import (
    ALPHAS,
    chow_average,
    chow_quantile,
    chow_sum,
    quantile_features,
)
from papertrial.papers.decoding.cascades.method.cost import forward_flops
from papertrial.papers.decoding.cascades.method.curves import (
    LengthBias,
    auc_df,
    cost_curve,
    deferral_curve,
    length_bias_report,
    oracle_score,
    random_auc,
    relative_gain,
    threshold_at,
)
from papertrial.papers.decoding.cascades.method.early import early_states
from papertrial.papers.decoding.cascades.method.post_hoc import PostHocDeferral
from papertrial.papers.decoding.cascades.method.texts import TextAnswers, answer_texts

__all__ = [
    "ALPHAS",
    "Cascade",
    "CascadeOutput",
    "LengthBias",
    "PostHocDeferral",
    "Records",
    "TextAnswers",
    "answer",
    "answer_texts",
    "auc_df",
    "chow_average",
    "chow_quantile",
    "chow_sum",
    "cost_curve",
    "deferral_curve",
    "early_states",
    "forward_flops",
    "length_bias_report",
    "oracle_score",
    "quantile_features",
    "random_auc",
    "relative_gain",
    "threshold_at",
]
