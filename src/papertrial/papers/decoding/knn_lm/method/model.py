"""A language model together with its datastore: scoring and generation."""

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from papertrial.lm.anatomy import anatomy, body, read_out
from papertrial.lm.datastore import Datastore, ExactSearch, KeySite, Neighbours, target_states
from papertrial.lm.datastore.building import model_digest
from papertrial.lm.generation import evaluating
from papertrial.lm.hooks import Recording, record
from papertrial.lm.scoring import scored_positions
from papertrial.lm.scoring.forward import forward_inputs
from papertrial.papers.decoding.knn_lm.method.retrieval import KEYS, interpolate, knn_log_probs, values_of


class Search(Protocol):
    """Exact or approximate search over the keys of the store."""

    def search(self, queries: Tensor, k: int) -> Neighbours: ...


class NearestNeighbourLM:
    """p = (1 - lam) p_LM + lam p_kNN.

    Queries have the contexts that the keys had: of a store with a recipe, texts beyond its window are scored in the
    windows in which the store was written, and generation ends where the window does.

    Parameters
    ----------
    model
        The decoder whose activations the store holds.
    store
        From :func:`build_datastore`.
    search
        Over ``store.keys``; default exact.
    key
        Which activation queries: a name in :data:`KEYS` or a site. Default what the store was built with, for arrays
        the input of the last feed-forward layer.
    k, lam, temperature
        Neighbours, weight of p_kNN, and tau. The authors tune ``lam`` and ``temperature`` on held-out text; tau = 1 and
        lam = 0.25 are the usual start.

    Raises
    ------
    ValueError
        Keys of another width than the model's activations, values out of range, a store of another kind of key, or one
        that was built with other weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        store: Datastore,
        search: Search | None = None,
        *,
        key: str | KeySite | None = None,
        k: int = 1024,
        lam: float = 0.25,
        temperature: float = 1.0,
    ) -> None:
        parts = anatomy(model)
        if store.width != parts.width:
            raise ValueError(f"the store's keys have width {store.width}, the model's activations {parts.width}")
        if not 1 <= k <= len(store):
            raise ValueError(f"k must lie between 1 and the {len(store)} entries of the store, got {k}")
        if not 0 <= lam <= 1:
            raise ValueError(f"lam must lie in [0, 1], got {lam}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        built_with = store.recipe.get("model")
        if built_with is not None and model_digest(model) != built_with:
            raise ValueError(
                "the store was built with other weights than this model's, or with the same in another precision: its "
                "keys are not this model's activations; build it anew"
            )
        self.model, self.store = model, store
        self.search = ExactSearch(store.keys) if search is None else search
        self.site = _site(key, store)
        self.layer = None if self.site.layer is None else self.site.layer % len(parts.blocks)
        self.k, self.lam, self.temperature = k, lam, temperature
        self.window: int | None = store.recipe.get("window")

    def knn_log_probs(self, states: Tensor) -> Tensor:
        """log p_kNN (B, V) float32 of query states (B, D), on their device."""
        near = self.search.search(states, self.k)
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        found = knn_log_probs(near.scores, values_of(self.store, near), vocabulary, self.temperature)
        return found.to(states.device)

    @torch.no_grad()
    def token_log_probs(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """log p(token t+1 | tokens up to t) of the mixture, (B, T - 1) float32 nats; 0 where there is padding.

        Rows longer than the store's window are read in windows of its stride, by the model and for the neighbours.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        windowed = self.window is not None and bool((attention_mask.sum(-1) > self.window).any())
        scored, states, hidden, targets = (self._by_windows if windowed else self._at_once)(input_ids, attention_mask)
        result = torch.zeros(scored.shape, dtype=torch.float32, device=scored.device)
        if not bool(scored.any()):
            return result
        lm = read_out(self.model, hidden).float().log_softmax(-1)
        mixed = interpolate(lm, self.knn_log_probs(states), self.lam)
        return result.masked_scatter(scored, mixed.gather(1, targets[:, None])[:, 0])

    def _at_once(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Which places are scored (B, T - 1), and of each its query (N, D), its final state (N, D) and its token."""
        with evaluating(self.model), record(self.model, [self.site.site], layers=self._layers) as seen:
            inputs, ids, mask = forward_inputs(self.model, input_ids, attention_mask)
            hidden = body(self.model)(**inputs).last_hidden_state
        scored = scored_positions(mask)
        return scored, self._states(seen)[:, :-1][scored], hidden[:, :-1][scored], ids[:, 1:][scored]

    def _by_windows(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same from the windows that the store would have cut."""
        recipe = self.store.recipe
        rows = [row[mask.bool()] for row, mask in zip(input_ids, attention_mask, strict=True)]
        parts = list(
            target_states(
                self.model, rows, {"query": self.site, "hidden": KEYS["hidden"]}, window=recipe["window"],
                stride=recipe["stride"], batch_size=recipe["batch_size"],
            )
        )  # fmt: skip
        query, hidden = (torch.cat([part.states[name] for part in parts]) for name in ("query", "hidden"))
        targets = torch.cat([part.targets for part in parts])
        scored = scored_positions(attention_mask).to(targets.device)
        return scored, query, hidden.to(self.model.dtype), targets

    @contextlib.contextmanager
    def processor(self) -> Iterator["KNNLogitsProcessor"]:
        """A logits processor for ``model.generate`` inside the block; it listens to the model's forward passes."""
        with record(self.model, [self.site.site], layers=self._layers) as seen:
            yield KNNLogitsProcessor(self, seen)

    @property
    def _layers(self) -> list[int]:
        return [] if self.layer is None else [self.layer]

    def _states(self, seen: Recording) -> Tensor:
        return seen[self.site.site] if self.layer is None else seen[self.site.site][self.layer]


class KNNLogitsProcessor(LogitsProcessor):
    """Turns a step's logits into log-probabilities of the mixture; made by :meth:`NearestNeighbourLM.processor`."""

    def __init__(self, knn: NearestNeighbourLM, seen: Recording) -> None:
        self.knn, self.seen = knn, seen

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, V) logits of the last position to log p (B, V); ValueError beyond the store's window."""
        window = self.knn.window
        if window is not None and input_ids.shape[1] >= window:
            raise ValueError(
                f"the store's keys have at most {window - 1} tokens of context and the text is {input_ids.shape[1]} "
                "long: build the store with a longer window, or generate less"
            )
        states = self.knn._states(self.seen)[:, -1]
        if len(states) != len(scores):
            raise ValueError(f"the model's last forward pass had {len(states)} rows, the logits have {len(scores)}")
        return interpolate(scores.float().log_softmax(-1), self.knn.knn_log_probs(states), self.knn.lam)


def _site(key: str | KeySite | None, store: Datastore) -> KeySite:
    if isinstance(key, str):
        if key not in KEYS:
            raise ValueError(f"key must be one of {', '.join(KEYS)} or a KeySite, got {key!r}")
        key = KEYS[key]
    if key is not None and store.site not in (None, key):
        raise ValueError(f"the store's keys were taken at {store.site}, the queries would be at {key}")
    return key or store.site or KEYS["ffn_input"]
