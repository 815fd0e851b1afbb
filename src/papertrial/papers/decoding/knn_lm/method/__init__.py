"""Nearest-neighbour language models and what explains them (arXiv 2301.02828; the model is from arXiv 1911.00172).

A language model is mixed with a second distribution: look up the k training contexts whose hidden state is nearest to
the current one, and let each vote for the token that followed it. The paper reads this as a second, huge softmax layer
and asks which of its differences from the ordinary one matter; so the pieces here come apart in the same way.

>>> stores = build_datastore(model, training_ids, folder, window=256)                       # doctest: +SKIP
>>> knn = NearestNeighbourLM(model, stores["ffn_input"], k=1024, lam=0.25, temperature=10)  # doctest: +SKIP
>>> knn.token_log_probs(input_ids)                                                          # doctest: +SKIP
>>> with knn.processor() as processor:                                                      # doctest: +SKIP
...     model.generate(**inputs, logits_processor=[processor])
>>> rows = allot_rows(token_counts, 3 * vocabulary)      # the same idea without retrieval  # doctest: +SKIP
>>> head = OverparameterizedHead.from_unembedding(weight, rows, generator=generator)        # doctest: +SKIP
"""

from papertrial.papers.decoding.knn_lm.method.head import OverparameterizedHead, allot_rows, train_head
from papertrial.papers.decoding.knn_lm.method.model import KNNLogitsProcessor, NearestNeighbourLM
from papertrial.papers.decoding.knn_lm.method.retrieval import (
    KEYS,
    build_datastore,
    generalized_log_probs,
    interpolate,
    knn_log_probs,
    knn_target_log_probs,
    values_of,
)

__all__ = [
    "KEYS",
    "KNNLogitsProcessor",
    "NearestNeighbourLM",
    "OverparameterizedHead",
    "allot_rows",
    "build_datastore",
    "generalized_log_probs",
    "interpolate",
    "knn_log_probs",
    "knn_target_log_probs",
    "train_head",
    "values_of",
]
