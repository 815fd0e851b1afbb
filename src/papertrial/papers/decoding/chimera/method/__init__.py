"""Chimera: lossless tree drafting that reads every drafted token (arXiv 2402.15758).

A frozen language model gets a small draft model: an encoder of token trigrams, one attention layer over the model's own
last hidden states and the drafted trigrams, and one head per drafted position. Its drafts form a token tree that the
model checks in one forward pass; what is returned is what the model would have written alone.

>>> draft = ChimeraDraft(model, n_heads=4, generator=torch.Generator().manual_seed(0))               # doctest: +SKIP
>>> train_draft(draft, model, batches, steps=1000)                                                   # doctest: +SKIP
>>> tree = TokenTree.likely(nodes=24, depth=4)                                                       # doctest: +SKIP
>>> out = speculative_generate(model, draft, input_ids, tree=tree, max_new_tokens=128)               # doctest: +SKIP
>>> out.tokens, out.stats.tokens_per_forward                                                         # doctest: +SKIP
>>> model.generate(input_ids, custom_generate=speculative_decoding(draft, tree), max_new_tokens=128) # doctest: +SKIP
"""

from papertrial.papers.decoding.chimera.method.acceptance import acceptance
from papertrial.papers.decoding.chimera.method.chimera import ChimeraDraft
from papertrial.papers.decoding.chimera.method.decoding import (
    SpeculativeOutput,
    speculative_decoding,
    speculative_generate,
)
from papertrial.papers.decoding.chimera.method.drafts import Draft, DraftState, DraftTree, StepOutput
from papertrial.papers.decoding.chimera.method.medusa import MedusaDraft
from papertrial.papers.decoding.chimera.method.stats import SpecStats, modelled_speedup
from papertrial.papers.decoding.chimera.method.training import draft_accuracy, draft_loss, train_draft
from papertrial.papers.decoding.chimera.method.trees import TokenTree

__all__ = [
    "ChimeraDraft",
    "Draft",
    "DraftState",
    "DraftTree",
    "MedusaDraft",
    "SpecStats",
    "SpeculativeOutput",
    "StepOutput",
    "TokenTree",
    "acceptance",
    "draft_accuracy",
    "draft_loss",
    "modelled_speedup",
    "speculative_decoding",
    "speculative_generate",
    "train_draft",
]
