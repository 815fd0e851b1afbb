"""Navigation of whole solutions: several ways of solving one problem, and a vote over their answers."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from papertrial.lm.generation import evaluating
from papertrial.papers.decoding.in_context_navigation.method.completion import Answers
from papertrial.papers.decoding.in_context_navigation.method.navigation import InContextNavigator, Template

OPENING = "* **Step 1:**\n"
ANSWER_CUE = '**Final Answer (digits only):** "'
"""Asks for a number; ends with the quote that the answer stands in."""


def ways_list(question: str, explored: Sequence[str]) -> str:
    """A question with the ways of solving it so far, open at the first step of the next one.

    The structure is that of the authors' scripts: the question, a request for several ways, a line that announces
    them, and the ways under numbered headings. The request and the announcement say the same in other words.
    """
    ways = "".join(f"### Way {number}:\n{OPENING}{text.strip()}\n" for number, text in enumerate(explored, start=1))
    return f"{_asked(question)}{ways}### Way {len(explored) + 1}:\n{OPENING}"


def answer_prompt(question: str, way: str, cue: str = ANSWER_CUE) -> str:
    """One way under its question without a heading, and a cue that says what form the answer has, as in the scripts.

    A choice among letters needs another cue: ``partial(answer_prompt, cue='**Final Answer (A, B, C, D or E):** "')``.
    """
    return f"{_asked(question)}{OPENING}{way.rstrip()}\n{cue}"


def _asked(question: str) -> str:
    return f"{question}\n\nPlease solve this problem in several different ways.\n\nSeveral ways to solve it:\n"


@dataclass(frozen=True)
class VoteResult:
    """Votes of several ways of reasoning.

    Attributes
    ----------
    answer : given most often, the first of those given equally often; None if no way gave one.
    votes : the answer of each way, None where none could be read.
    ways : the texts of the ways.
    """

    answer: str | None
    votes: tuple[str | None, ...]
    ways: tuple[str, ...]


def navigate_cot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    *,
    extract_answer: Callable[[str], str | None],
    n_paths: int = 4,
    navigate: bool = True,
    template: Template = ways_list,
    answer_template: Callable[[str, str], str] = answer_prompt,
    max_path_tokens: int = 256,
    max_answer_tokens: int = 8,
) -> VoteResult:
    """Solve a question in several ways, each beginning with another token, and vote.

    Every way is written after the question alone; the ways before it only decide its first token. Its answer is what
    the model writes after ``answer_template(question, way)``, up to a quote.

    The default prompts have the structure of the authors' scripts and ask for the same in other words, so figures of
    the paper need templates with the authors' own. Two things are counted differently: a way ends at the first ``#``
    (the scripts stop there too, but keep the way only if the three of a heading were written), and a way whose answer
    cannot be read has no vote (in the scripts it votes for the empty answer).

    Parameters
    ----------
    extract_answer
        Reads an answer in the model's words, None where there is none: digits, or one letter of a choice.
    n_paths
        Ways; 4 in the paper.
    navigate
        False is the baseline: all first tokens come from the question's own distribution.
    template
        Writes the prompt from the question and the ways so far; a way ends at ``#``.
    answer_template
        Writes the prompt that asks for the answer from the question and one way; the default asks for a number.
    max_path_tokens, max_answer_tokens
        Bounds; 256 (512 for choices among letters) and 8 in the authors' scripts.
    """
    runs, per_run = (n_paths, 1) if navigate else (1, n_paths)
    navigator = InContextNavigator(
        model, tokenizer, template, n_runs=runs, per_run=per_run, stop="#", max_answer_tokens=max_path_tokens
    )
    ways = [found.text for found in navigator.run(question)]
    reader = Answers(model, tokenizer, '"', max_answer_tokens)
    with evaluating(model):
        decoder = reader.read([answer_template(question, way) for way in ways])
        first = reader.scores(decoder).argmax(-1, keepdim=True)
        spoken = [row[0].text for row in reader.complete(decoder, first)]  # also what no quote closed
    votes = tuple(extract_answer(text) for text in spoken)
    counted = Counter(vote for vote in votes if vote is not None)
    return VoteResult(counted.most_common(1)[0][0] if counted else None, votes, tuple(ways))
