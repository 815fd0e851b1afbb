"""Multi-vector retrieval from retrieved tokens alone: XTR, and ColBERT beside it (arXiv 2304.01982).

A text is one vector per token. ColBERT finds candidates by their tokens, then fetches all token vectors of each to
score it. XTR trains the encoder on an imitation of token retrieval within the batch, so that the tokens that were
retrieved are enough: a document is scored from them, and where a query token retrieved nothing of it, by the best that
it could still have had.

>>> encoder = TokenEncoder.load(folder)                                                        # doctest: +SKIP
>>> index = TokenIndex.build(encoder.encode(documents))                                        # doctest: +SKIP
>>> XTRRetriever(index).search(encoder.encode([question])[0], k_prime=1000, top=10)            # doctest: +SKIP
>>> loss = xtr_loss(queries, documents, query_mask, document_mask, k_train=32, scale=20.0)     # doctest: +SKIP
"""

from papertrial.papers.retrieval.xtr.method.encoder import TokenEncoder
from papertrial.papers.retrieval.xtr.method.imputation import expected_rank, missing_similarities, power_law
from papertrial.papers.retrieval.xtr.method.index import TokenIndex
from papertrial.papers.retrieval.xtr.method.retrieval import (
    ColBERTRetriever,
    Hit,
    XTRRetriever,
    aggregate,
    multiply_adds,
    token_recall,
)
from papertrial.papers.retrieval.xtr.method.scoring import (
    colbert_loss,
    maxsim,
    retrieved_tokens,
    token_similarities,
    xtr_loss,
    xtr_score,
)
from papertrial.papers.retrieval.xtr.method.training import mine_negatives, train_encoder, vectors_of

__all__ = [
    "ColBERTRetriever",
    "Hit",
    "TokenEncoder",
    "TokenIndex",
    "XTRRetriever",
    "aggregate",
    "colbert_loss",
    "expected_rank",
    "maxsim",
    "mine_negatives",
    "missing_similarities",
    "multiply_adds",
    "power_law",
    "retrieved_tokens",
    "token_recall",
    "token_similarities",
    "train_encoder",
    "vectors_of",
    "xtr_loss",
    "xtr_score",
]
