"""Scoring options while layers are left out: prompt once, then the options on its cache, as a model answers.

And what is left out instead of the voids, in as many blocks of every token.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from papertrial.lm.generation import StepDecoder, evaluating, left_pad
from papertrial.papers.compression.void_layers.method import (
    LayerTrace,
    last_layers,
    layer_usage,
    least_turning_layers,
    random_layers,
    skip_layers,
)
from papertrial.papers.compression.void_layers.questions import OPTIONS, Questions

CONTROLS = ("random_skip", "random_late_skip", "early_exit", "least_turning_skip")

Context = Callable[[], contextlib.AbstractContextManager[Any]]


class Examination:
    """Questions for one model, in batches; each is two forwards: the prompts, then four options for each.

    Parameters
    ----------
    model
        A causal language model.
    questions
        What is asked.
    batch
        Questions at a time.
    """

    def __init__(self, model: PreTrainedModel, questions: Questions, batch: int) -> None:
        self.model = model
        self.batches: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for i in range(0, len(questions.prompts), batch):
            ids, mask = left_pad(questions.prompts[i : i + batch], 0)
            self.batches.append((ids, mask, questions.options[i : i + batch], questions.correct[i : i + batch]))

    def accuracy(self, contexts: "list[Context] | None" = None) -> float:
        """Percent of questions whose true option is the likeliest. ``contexts``: one for each forward, in order."""
        contexts = contexts or [contextlib.nullcontext] * (2 * len(self.batches))
        if len(contexts) != 2 * len(self.batches):
            raise ValueError(f"{2 * len(self.batches)} forwards need as many contexts, got {len(contexts)}")
        hits = asked = 0
        with evaluating(self.model):
            for n, (ids, mask, options, correct) in enumerate(self.batches):
                scores = self._scores(ids, mask, options, contexts[2 * n], contexts[2 * n + 1])
                hits += int((scores.argmax(1).cpu() == correct).sum())
                asked += len(correct)
        return 100 * hits / asked

    def _scores(self, ids: Tensor, mask: Tensor, options: Tensor, reading: Context, answering: Context) -> Tensor:
        """(B, 4) log-probabilities of the options (B, 4, n)."""
        with reading():
            decoder = StepDecoder(self.model, ids, mask)
        options = options.to(decoder.logits.device)
        scores = decoder.logits.log_softmax(-1).gather(1, options[..., 0])
        if options.shape[2] == 1:
            return scores
        decoder.repeat(OPTIONS)
        rows = options.flatten(0, 1)
        with answering():
            logits = decoder.step(rows[:, :-1])
        rest = logits.log_softmax(-1).gather(2, rows[:, 1:, None])[..., 0]
        return scores + rest.sum(1).view(-1, OPTIONS)

    def masked(self, masks: list[Tensor]) -> float:
        """Accuracy with given blocks left out: bool (L, B, S) for each forward, false where one is."""

        def leaving_out(mask: Tensor) -> Context:
            return lambda: skip_layers(self.model, mask)

        return self.accuracy([leaving_out(mask) for mask in masks])


def share_used(passes: list[LayerTrace]) -> float:
    """Mean share of active blocks over all real tokens of several forwards."""
    sizes = [int(trace.real.sum()) for trace in passes]
    means = [layer_usage(trace).mean for trace in passes]
    return float(torch.tensor(means).double() @ torch.tensor(sizes).double() / sum(sizes))


def control_masks(
    passes: list[LayerTrace], plain: list[LayerTrace], generator: torch.Generator
) -> dict[str, list[Tensor]]:
    """For each of :data:`CONTROLS` a mask (L, B, S) of every forward, which leaves out as many blocks of each token.

    ``passes`` are traces under the rule, ``plain`` of the same forwards of the model with all layers.
    """
    layers = len(passes[0].active)
    counts = [trace.dropped for trace in passes]
    return {
        "random_skip": [random_layers(c, layers, generator=generator) for c in counts],
        "random_late_skip": [random_layers(c, layers, generator=generator, spared=2) for c in counts],
        "early_exit": [last_layers(c, layers) for c in counts],
        "least_turning_skip": [least_turning_layers(c, trace.cosine) for c, trace in zip(counts, plain, strict=True)],
    }
