"""Recommendations learned from what a reader tagged, with the words that explain them.

A logistic regression over tf-idf of words and word pairs: the tagged papers against all others at hand, both sides
weighing the same,

    min_w,b  sum_i c_i log(1 + exp(-y_i (w x_i + b))) + |w|^2 / (2 C)

with y = 1 for tagged papers and -1 for the rest. A linear model says why: the contribution of a word to a paper's score
is its weight times its value there, and the words that contribute most are shown. The same papers and tags give the
same recommendations; nothing is drawn at random.
"""

import logging
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from papertrial.feed.records import Paper
from papertrial.feed.schema import papers
from papertrial.feed.store import Store

log = logging.getLogger("papertrial.site")

#: Papers at hand: the newest of the catalogue, and whatever the reader tagged.
NEWEST = 4_000
FEATURES = 20_000
STRENGTH = 10.0
FRESH_SECONDS = 600.0

_WORD = re.compile(r"[a-z][a-z0-9]+(?:-[a-z0-9]+)*")
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a about after again all also although among an and any are as at be because been before being between both but
        by can could did do does during each either even every for from further given had has have having hence here how
        however if in into is it its itself just like many may might more moreover most much must nor not of often on
        once one only or other our out over own paper propose proposed rather recent recently results same several she
        should show shows since so some such than that the their them then there therefore these they this those three
        through thus to too two under until up upon us use used using via was we well were what when where whether which
        while who whose why will with within without would yet you your
        """,
    )
)


@dataclass(frozen=True, slots=True)
class Recommendation:
    """A paper, the probability that the reader would tag it so (as the model sees it), and the words for it."""

    paper_id: int
    score: float
    words: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Recommendations:
    """The best first; ``words`` are those that speak most for and against, with their weights."""

    items: tuple[Recommendation, ...]
    words: tuple[tuple[str, float], ...]
    learned_from: int


@dataclass(frozen=True)
class _Features:
    """tf-idf rows of unit length, by paper."""

    matrix: Any  # scipy.sparse.csr_matrix (papers, words), float64
    vocabulary: list[str]
    ids: NDArray[np.int64]
    made: float
    revision: int


def terms(text: str) -> list[str]:
    """The words of a text and the pairs of neighbours, function words left out."""
    words = _WORD.findall(text.lower())
    kept = [word for word in words if len(word) > 2 and word not in _FUNCTION_WORDS]
    pairs = [f"{a} {b}" for a, b in pairwise(words) if not {a, b} & _FUNCTION_WORDS and min(len(a), len(b)) > 2]
    return kept + pairs


def described(paper: Paper) -> str:
    """What of a paper counts."""
    return "\n".join((paper.title, paper.title, paper.abstract or paper.summary or "", " . ".join(paper.keywords)))


class Recommender:
    """Keeps the features of the papers at hand, and fits a model for whoever asks."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._clock = store, clock
        self._lock = threading.Lock()
        self._features: _Features | None = None

    def recommend(
        self, tagged: Sequence[int], *, limit: int = 20, leave_out: Collection[int] = (), words: int = 5
    ) -> Recommendations:
        """Papers like the tagged ones.

        Parameters
        ----------
        tagged
            Papers under the reader's tag.
        limit
            How many at most.
        leave_out
            Papers that are not to be recommended (hidden ones), beside the tagged ones.
        words
            How many words explain a paper.
        """
        features = self._at_hand(tagged)
        chosen = np.isin(features.ids, np.asarray(tagged, dtype=np.int64))
        if not chosen.any() or chosen.all():
            return Recommendations((), (), int(chosen.sum()))
        weights, bias = fit(features.matrix, chosen)
        scores = features.matrix @ weights + bias
        open_ = ~chosen & ~np.isin(features.ids, np.asarray(sorted(leave_out), dtype=np.int64))
        candidates = np.flatnonzero(open_)
        best = candidates[np.lexsort((features.ids[candidates], -scores[candidates]))][:limit]
        items = tuple(
            Recommendation(
                int(features.ids[row]), _probability(scores[row]), _speaking(features, weights, int(row), words)
            )
            for row in best
        )
        order = np.argsort(weights)
        told = [*order[::-1][:10], *order[:5]]
        return Recommendations(
            items, tuple((features.vocabulary[i], round(float(weights[i]), 3)) for i in told), int(chosen.sum())
        )

    def _at_hand(self, tagged: Sequence[int]) -> _Features:
        revision = self._store.revision()
        with self._lock:
            held = self._features
            fresh = held is not None and (held.revision == revision or self._clock() - held.made < FRESH_SECONDS)
            if held is None or not fresh or not set(tagged) <= set(held.ids.tolist()):
                extra = set(tagged) | (set(held.ids[-2_000:].tolist()) if held is not None else set())
                self._features = held = self._make(extra, revision)
            return held

    def _make(self, tagged: Iterable[int], revision: int) -> _Features:
        query = sa.select(papers.c.id).order_by(papers.c.feed_day.desc(), papers.c.id.desc()).limit(NEWEST)
        with self._store.reading() as connection:
            newest = connection.execute(query).scalars().all()
        wanted = list(dict.fromkeys([*newest, *sorted(tagged)]))
        found = [paper for paper in self._store.by_ids(wanted) if paper is not None]
        matrix, vocabulary = tfidf([described(paper) for paper in found])
        ids = np.asarray([paper.id for paper in found], dtype=np.int64)
        return _Features(matrix, vocabulary, ids, self._clock(), revision)


def tfidf(texts: Sequence[str]) -> tuple[Any, list[str]]:
    """tf-idf of texts: ``(1 + log tf) * log((1 + n) / (1 + df)) + 1``, rows of unit length.

    Returns
    -------
    scipy.sparse.csr_matrix (len(texts), words), list of str
        Words that at least two texts have and at most half of them, the most common `FEATURES`.
    """
    from scipy.sparse import csr_matrix

    counts = [Counter(terms(text)) for text in texts]
    frequency: Counter[str] = Counter()
    for count in counts:
        frequency.update(count.keys())
    most = max(2, len(texts) // 2)
    common = [(n, term) for term, n in frequency.items() if 2 <= n <= most]
    vocabulary = sorted(term for _, term in sorted(common, key=lambda pair: (-pair[0], pair[1]))[:FEATURES])
    place = {term: i for i, term in enumerate(vocabulary)}
    idf = {term: math.log((1 + len(texts)) / (1 + frequency[term])) + 1 for term in vocabulary}
    values: list[float] = []
    columns: list[int] = []
    starts = [0]
    for count in counts:
        row = {place[term]: (1 + math.log(n)) * idf[term] for term, n in count.items() if term in place}
        length = math.sqrt(math.fsum(value * value for value in row.values())) or 1.0
        columns += row.keys()
        values += [value / length for value in row.values()]
        starts.append(len(columns))
    shape = (len(texts), max(1, len(vocabulary)))
    return csr_matrix((np.asarray(values), np.asarray(columns, dtype=np.int32), starts), shape=shape), vocabulary


def fit(matrix: Any, chosen: NDArray[np.bool_], strength: float = STRENGTH) -> tuple[NDArray[np.float64], float]:
    """The regression of the module's formula; both classes weigh the same.

    Parameters
    ----------
    matrix : scipy.sparse.csr_matrix (n, words)
    chosen : bool array (n,)
        The tagged rows; at least one is True and one False.
    strength : float
        C, in (0, inf): the larger, the more the data count against the regulariser.

    Returns
    -------
    float64 array (words,), float
        Weights and bias.
    """
    from scipy.optimize import minimize

    n, k = matrix.shape
    sign = np.where(chosen, 1.0, -1.0)
    share = np.where(chosen, 0.5 / chosen.sum(), 0.5 / (~chosen).sum())  # sums to one
    transposed = matrix.T.tocsr()

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weights, bias = parameters[:k], parameters[k]
        margin = sign * (matrix @ weights + bias)
        value = share @ np.logaddexp(0.0, -margin) + weights @ weights / (2 * strength * n)
        pull = -share * sign / (1.0 + np.exp(np.clip(margin, -500, 500)))
        gradient = np.append(transposed @ pull + weights / (strength * n), pull.sum())
        return float(value), gradient

    found = minimize(loss, np.zeros(k + 1), jac=True, method="L-BFGS-B", options={"maxiter": 200})
    return found.x[:k], float(found.x[k])


def _speaking(features: _Features, weights: NDArray[np.float64], row: int, most: int) -> tuple[tuple[str, float], ...]:
    """The words that contribute most to a paper's score, with what they contribute; none that speaks against."""
    entries = features.matrix[row]
    parts = entries.data * weights[entries.indices]
    best = np.argsort(-parts)[:most]
    return tuple((features.vocabulary[entries.indices[i]], round(float(parts[i]), 3)) for i in best if parts[i] > 0)


def _probability(score: float) -> float:
    return round(1.0 / (1.0 + math.exp(-max(-500.0, min(500.0, float(score))))), 4)
