"""Keys and values of every token of a text, on disk, and the search for nearest keys: what retrieval stands on.

    stores = build_datastore(model, sequences, folder, window=256)       # one forward pass over the text, resumable
    store = stores["key"]
    near = ExactSearch(store.keys).search(queries, k=256)                # scores (B, k), indices (B, k)
    index = ApproximateSearch.build(store.keys, kind="ivfpq", seed=0)    # faiss
    near = index.search(queries, k=256, candidates=1024, rescore=True)

Which activation is the key is a :class:`KeySite`, any site of :mod:`papertrial.lm.hooks`. The searches take any matrix
of vectors, so they serve token and passage retrieval as well.
"""

from papertrial.lm.datastore.approximate import ApproximateSearch
from papertrial.lm.datastore.building import build_datastore
from papertrial.lm.datastore.searching import ExactSearch, Neighbours, exact_scores
from papertrial.lm.datastore.states import KeySite, StateBatch, target_states
from papertrial.lm.datastore.store import Datastore

__all__ = [
    "ApproximateSearch",
    "Datastore",
    "ExactSearch",
    "KeySite",
    "Neighbours",
    "StateBatch",
    "build_datastore",
    "exact_scores",
    "target_states",
]
