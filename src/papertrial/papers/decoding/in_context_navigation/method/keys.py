"""The vocabulary's keys: their clusters, and whether tokens that share one with the top tokens are right as often."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from papertrial.lm.anatomy import anatomy
from papertrial.lm.generation import evaluating
from papertrial.papers.decoding.in_context_navigation.method.completion import Answers
from papertrial.papers.decoding.in_context_navigation.method.navigation import NOTHING, Template, numbered_list


@dataclass(frozen=True)
class KeyClusters:
    """Clusters of keys: ``ids`` (V,) long, the cluster of each token, and ``centers`` (C, D) float32."""

    ids: Tensor
    centers: Tensor


def key_weight(model: PreTrainedModel) -> Tensor:
    """The keys (V, D): rows of the output layer, not normalised; a view of the model's own weights.

    Raises
    ------
    ValueError
        If the model has no output layer.
    """
    return anatomy(model).W_U.T


def cluster_keys(model_or_weight: PreTrainedModel | Tensor, n_clusters: int = 1024, *, seed: int = 0) -> KeyClusters:
    """k-means of the keys by Euclidean distance.

    Parameters
    ----------
    model_or_weight
        A model with an output layer, or keys (V, D).
    n_clusters
        The authors' files for models of 128k and 50k tokens hold about a thousand.
    seed
        Of the starting centres.

    Raises
    ------
    ValueError
        For fewer than one cluster or more clusters than keys, or keys that are not finite.
    """
    from sklearn.cluster import MiniBatchKMeans

    weight = model_or_weight if isinstance(model_or_weight, Tensor) else key_weight(model_or_weight)
    if weight.dim() != 2:
        raise ValueError(f"keys must be (V, D), got the shape {tuple(weight.shape)}")
    if not 1 <= n_clusters <= len(weight):
        raise ValueError(f"n_clusters must lie in 1..{len(weight)}, the number of keys; got {n_clusters}")
    keys = weight.detach().float().cpu().numpy()
    if not np.isfinite(keys).all():
        raise ValueError("the keys hold values that are not finite")
    means = MiniBatchKMeans(n_clusters, batch_size=max(4096, 4 * n_clusters), n_init=5, random_state=seed).fit(keys)
    return KeyClusters(torch.from_numpy(means.labels_).long(), torch.from_numpy(means.cluster_centers_).float())


@dataclass(frozen=True)
class KeyReport:
    """The answers that follow the first N tokens of one prompt, split at rank k.

    Attributes
    ----------
    token_ids, texts, correct : of ranks 1..N.
    in_main : of ranks k+1..N, whether the token shares a cluster with one of the first k.
    k : tokens that make the main clusters.
    """

    token_ids: tuple[int, ...]
    texts: tuple[str, ...]
    correct: NDArray[np.bool_]
    in_main: NDArray[np.bool_]
    k: int

    @property
    def ranks(self) -> NDArray[np.int64]:
        """Ranks of the split tokens, k+1..N."""
        return np.arange(self.k + 1, len(self.correct) + 1)

    @property
    def accuracy_top(self) -> float:
        return float(self.correct[: self.k].mean())

    @property
    def accuracy_main(self) -> float:
        """NaN where no token shares a main cluster."""
        return _mean(self.correct[self.k :][self.in_main])

    @property
    def accuracy_other(self) -> float:
        """NaN where all tokens share a main cluster."""
        return _mean(self.correct[self.k :][~self.in_main])

    @property
    def rank_main(self) -> float:
        return _mean(self.ranks[self.in_main])

    @property
    def rank_other(self) -> float:
        return _mean(self.ranks[~self.in_main])

    @property
    def share_main(self) -> float:
        """Share of the split tokens that lie in main clusters."""
        return float(self.in_main.mean())


def _mean(values: "NDArray[np.bool_] | NDArray[np.int64]") -> float:
    return float(values.mean()) if len(values) else math.nan


def spurious_key_report(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    instructions: Sequence[str],
    is_correct: Callable[[str, str], bool],
    clusters: KeyClusters,
    *,
    n: int = 100,
    k: int = 10,
    template: Template = numbered_list,
    stop: str | None = '"',
    max_answer_tokens: int = 64,
) -> list[KeyReport]:
    """Complete each of the first ``n`` tokens of every prompt, judge the answers, and split them by key cluster.

    Parameters
    ----------
    instructions
        Prompts are ``template(instruction, [])``.
    is_correct
        ``is_correct(instruction, answer)``.
    clusters
        Of the model's keys, see :func:`cluster_keys`.
    n, k
        Tokens judged, and how many of them make the main clusters.
    template, stop, max_answer_tokens
        As for the navigator.

    Raises
    ------
    ValueError
        For k outside 1..n-1, n beyond the vocabulary, or clusters of another vocabulary.
    """
    answers = Answers(model, tokenizer, stop, max_answer_tokens)
    if not 1 <= k < n <= answers.vocabulary:
        raise ValueError(f"need 1 <= k < n <= {answers.vocabulary} tokens, got k={k} and n={n}")
    if len(clusters.ids) < answers.vocabulary:
        raise ValueError(f"clusters are of {len(clusters.ids)} keys, the tokenizer has {answers.vocabulary} tokens")
    with evaluating(model):
        decoder = answers.read([template(text, []) for text in instructions])
        ids = answers.scores(decoder).topk(n, dim=-1).indices
        texts = answers.complete(decoder, ids)
    in_main = _shared(clusters, ids.cpu(), k)
    reports = []
    for instruction, tokens, row, main in zip(instructions, ids.tolist(), texts, in_main, strict=True):
        said = tuple(answer.text if answer.finished else NOTHING for answer in row)
        correct = np.array([is_correct(instruction, text) for text in said], dtype=np.bool_)
        reports.append(KeyReport(tuple(tokens), said, correct, main, k))
    return reports


def _shared(clusters: KeyClusters, ids: Tensor, k: int) -> NDArray[np.bool_]:
    """Which tokens after the first k share a cluster with one of those, (B, n - k), of ``ids`` (B, n) by rank."""
    groups = clusters.ids[ids]
    return (groups[:, k:, None] == groups[:, None, :k]).any(-1).numpy()


def regrouped(report: KeyReport, clusters: KeyClusters) -> KeyReport:
    """The same answers split by other clusters, such as shuffled ones, without asking the model again.

    Raises
    ------
    ValueError
        For clusters that lack one of the report's tokens.
    """
    ids = torch.tensor([report.token_ids])
    if int(ids.max()) >= len(clusters.ids):
        raise ValueError(f"clusters are of {len(clusters.ids)} keys, the report has the token {int(ids.max())}")
    return replace(report, in_main=_shared(clusters, ids, report.k)[0])


def rank_adjusted_accuracy(reports: Sequence[KeyReport]) -> tuple[float, float]:
    """Accuracy of main-cluster and of other tokens as if both stood at the same ranks.

    A logistic regression of correctness on the rank, its logarithm and the cluster's kind, over all reports; then its
    mean prediction over all tokens, once as if all were in main clusters and once as if none were.

    Returns
    -------
    (main, other), shares between 0 and 1.

    Raises
    ------
    ValueError
        Where there is nothing to compare: all tokens of one kind, or all right, or all wrong.
    """
    from sklearn.linear_model import LogisticRegression

    ranks = np.concatenate([report.ranks for report in reports]).astype(float)
    main = np.concatenate([report.in_main for report in reports])
    correct = np.concatenate([report.correct[report.k :] for report in reports])
    for name, values in (("in main clusters", main), ("correct", correct)):
        if values.all() or not values.any():
            raise ValueError(f"{'all' if values.all() else 'none'} of the {len(values)} tokens are {name}")

    def table(kind: "NDArray[np.bool_]") -> "NDArray[np.float64]":
        scaled = (ranks - ranks.mean()) / ranks.std(), np.log(ranks) - np.log(ranks).mean()
        return np.column_stack([*scaled, kind.astype(float)])

    fit = LogisticRegression(C=np.inf, max_iter=1000).fit(table(main), correct)
    everywhere = np.ones_like(main)
    return (
        float(fit.predict_proba(table(everywhere))[:, 1].mean()),
        float(fit.predict_proba(table(~everywhere))[:, 1].mean()),
    )
