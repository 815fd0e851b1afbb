"""The navigator: each run writes what was found into the prompt and takes the best tokens that were not tried yet."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from papertrial.lm.generation import StepDecoder, evaluating
from papertrial.papers.decoding.in_context_navigation.method.completion import Answers

NOTHING = "nothing"
"""Stands for an answer whose end was not found, as in the authors' code."""

Template = Callable[[str, Sequence[str]], str]
"""``template(instruction, explored)`` is the prompt that asks for one more answer after the explored ones."""


def numbered_list(instruction: str, explored: Sequence[str]) -> str:
    """The paper's prompt for knowledge: a numbered list of quoted answers, open at the next one."""
    lines = "".join(f'{number}. "{text}"\n' for number, text in enumerate(explored, start=1))
    return f'{instruction}\n\nAnswer:\n{lines}{len(explored) + 1}. "'


@dataclass(frozen=True)
class Exploration:
    """One explored answer.

    Attributes
    ----------
    token_id : its first token, which navigation chose.
    text : the answer; ``NOTHING`` where its end was not found.
    run : from 0.
    rank : of the token in its run's distribution over all tokens, from 1.
    finished : whether the answer came to its end.
    """

    token_id: int
    text: str
    run: int
    rank: int
    finished: bool


class InContextNavigator:
    """Finds many answers to one instruction, each beginning with another token.

    Parameters
    ----------
    model, tokenizer
        A causal language model of transformers and its tokenizer.
    template
        Writes the prompt, see :data:`Template`.
    n_runs, per_run
        Prompts that are made, and new first tokens taken from each. The baseline of the paper, one distribution read
        downwards, is ``n_runs=1``.
    complete_from
        ``original`` completes an answer after the prompt without explored answers, as the paper does: navigation
        chooses the first token only. ``navigated`` completes it after the prompt that it was chosen from.
    stop, max_answer_tokens
        How an answer ends: one character (in the default template the closing quote), and a bound on its tokens.

    Raises
    ------
    ValueError
        For n_runs or per_run below 1; when run, for a template that ignores what was explored.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: Template = numbered_list,
        *,
        n_runs: int = 10,
        per_run: int = 10,
        complete_from: Literal["original", "navigated"] = "original",
        stop: str | None = '"',
        max_answer_tokens: int = 64,
    ) -> None:
        for name, value in (("n_runs", n_runs), ("per_run", per_run)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if complete_from not in ("original", "navigated"):
            raise ValueError(f"complete_from must be 'original' or 'navigated', got {complete_from!r}")
        self.answers = Answers(model, tokenizer, stop, max_answer_tokens)
        self.template, self.n_runs, self.per_run, self.complete_from = template, n_runs, per_run, complete_from

    def run(self, instruction: str) -> list[Exploration]:
        """Explore one instruction; ``n_runs * per_run`` answers in the order found, fewer where the vocabulary ends."""
        return self.run_batch([instruction])[0]

    def run_batch(self, instructions: Sequence[str]) -> list[list[Exploration]]:
        """Explore several instructions side by side; each gives what it gives alone."""
        if not instructions:
            raise ValueError("instructions is empty")
        if self.template(instructions[0], []) == self.template(instructions[0], ["an answer"]):
            raise ValueError("template ignores the explored answers: the prompt would never change")
        with evaluating(self.answers.model):
            return self._run(instructions)

    def _run(self, instructions: Sequence[str]) -> list[list[Exploration]]:
        found: list[list[Exploration]] = [[] for _ in instructions]
        original = self.answers.read([self.template(text, []) for text in instructions])
        probed = torch.zeros_like(self.answers.scores(original), dtype=torch.bool)
        for run in range(self.n_runs):
            take = min(self.per_run, probed.shape[1] - int(probed[0].sum()))
            if take == 0:
                break
            here = original if run == 0 else self._navigated(instructions, found)
            scores = self.answers.scores(here)
            chosen = scores.masked_fill(probed, -torch.inf).topk(take, dim=-1).indices  # (B, take)
            probed.scatter_(1, chosen, True)
            ranks = 1 + (scores[:, None] > scores.gather(1, chosen)[..., None]).sum(-1)
            texts = self.answers.complete(original if self.complete_from == "original" else here, chosen)
            for row, tokens, places, answers in zip(found, chosen.tolist(), ranks.tolist(), texts, strict=True):
                row += [
                    Exploration(token, answer.text if answer.finished else NOTHING, run, place, answer.finished)
                    for token, place, answer in zip(tokens, places, answers, strict=True)
                ]
        return found

    def _navigated(self, instructions: Sequence[str], found: Sequence[Sequence[Exploration]]) -> StepDecoder:
        explored = ([one.text for one in row] for row in found)
        return self.answers.read([self.template(text, row) for text, row in zip(instructions, explored, strict=True)])
