"""Questions with checkable answers of very different lengths, as token ids: what a cascade of two models is tried on.

Three tasks share one format, ``task marker, question, SEP, answer, EOS``:

- compare: which of two two-digit numbers is larger; one answer token;
- recite: the alphabet from one letter to another, then the value of a sum; 5 to 30 answer tokens, all but the digits of
  the sum easy;
- recall: the name that belongs to a three-letter key; 1 to 6 answer tokens, learnt by heart. How often a key is asked
  for follows Zipf's law, so that rare ones stay uncertain.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TASKS = ("compare", "recite", "recall")
PAD, SEP, EOS = 0, 1, 2
_MARKERS = {"compare": 3, "recite": 4, "recall": 5}
_SIGNS = {"+": 6, "<": 7, ">": 8, "=": 9}
_DIGIT, _LETTER, LETTERS = 10, 20, 26
VOCABULARY = _LETTER + LETTERS

Tokens = list[int]


@dataclass(frozen=True)
class Question:
    """``prompt`` ends with SEP; ``answer`` ends with EOS."""

    task: str
    prompt: Tokens
    answer: Tokens


class World:
    """Questions from a seeded generator.

    Parameters
    ----------
    facts
        Keys with a name; at most 26 cubed.
    generator
        Of the facts; the questions have generators of their own.
    longest
        Letters that are recited, at most.
    """

    def __init__(self, facts: int, generator: torch.Generator, *, longest: int = 24) -> None:
        if not 1 <= facts <= LETTERS**3:
            raise ValueError(f"facts must lie between 1 and {LETTERS**3}, got {facts}")
        if not 2 <= longest <= LETTERS:
            raise ValueError(f"longest must lie between 2 and {LETTERS}, got {longest}")
        self.longest = longest
        keys = torch.randperm(LETTERS**3, generator=generator)[:facts].tolist()
        lengths = torch.randint(1, 7, (facts,), generator=generator).tolist()
        letters = torch.randint(LETTERS, (facts, 6), generator=generator).tolist()
        self.keys = [[key // LETTERS**2, key // LETTERS % LETTERS, key % LETTERS] for key in keys]
        self.names = [row[:length] for row, length in zip(letters, lengths, strict=True)]
        self.exposure = 1.0 / torch.arange(1, facts + 1, dtype=torch.float64)

    def questions(self, count: int, generator: torch.Generator, tasks: Sequence[str] = TASKS) -> list[Question]:
        """``count`` questions, the tasks in turn. Keys are drawn by their exposure."""
        unknown = set(tasks) - set(TASKS)
        if unknown or not tasks:
            raise ValueError(f"tasks must be among {TASKS}, got {list(tasks)}")
        facts = torch.multinomial(self.exposure, count, replacement=True, generator=generator).tolist()
        numbers = torch.randint(100, (count, 2), generator=generator).tolist()
        starts = torch.randint(LETTERS, (count,), generator=generator).tolist()
        lengths = torch.randint(2, self.longest + 1, (count,), generator=generator).tolist()
        made = []
        for n in range(count):
            task = tasks[n % len(tasks)]
            if task == "compare":
                body, answer = _compare(*numbers[n])
            elif task == "recite":
                body, answer = _recite(starts[n], lengths[n], *numbers[n])
            else:
                body, answer = _letters(self.keys[facts[n]]), _letters(self.names[facts[n]])
            made.append(Question(task, [_MARKERS[task], *body, SEP], [*answer, EOS]))
        return made


def _digits(number: int, places: int) -> Tokens:
    return [_DIGIT + int(digit) for digit in str(number).zfill(places)]


def _letters(letters: Sequence[int]) -> Tokens:
    return [_LETTER + letter for letter in letters]


def _compare(a: int, b: int) -> tuple[Tokens, Tokens]:
    sign = "<" if a < b else ">" if a > b else "="
    return [*_digits(a, 2), *_digits(b, 2)], [_SIGNS[sign]]


def _recite(start: int, length: int, a: int, b: int) -> tuple[Tokens, Tokens]:
    letters = _letters([(start + n) % LETTERS for n in range(length)])
    return [letters[0], letters[-1], *_digits(a, 2), _SIGNS["+"], *_digits(b, 2)], [*letters, *_digits(a + b, 3)]


def text(tokens: Sequence[int]) -> str:
    """Token ids as characters, for readers."""
    signs = {number: sign for sign, number in _SIGNS.items()}
    special = {PAD: "", SEP: " => ", EOS: ""} | {number: task[:3] + " " for task, number in _MARKERS.items()}

    def character(token: int) -> str:
        if token in special or token in signs:
            return special.get(token, signs.get(token, ""))
        return str(token - _DIGIT) if token < _LETTER else chr(ord("a") + token - _LETTER)

    return "".join(character(token) for token in tokens)


def training_batches(
    questions: Sequence[Question], batch_size: int, generator: torch.Generator
) -> list[dict[str, Tensor]]:
    """Batches of questions of similar length, in random order, for ``lm.training.causal_loss``; only answers count."""
    order = torch.randperm(len(questions), generator=generator).tolist()
    # stable: equal lengths stay shuffled
    order.sort(key=lambda n: len(questions[n].prompt) + len(questions[n].answer))
    groups = [order[i : i + batch_size] for i in range(0, len(order) - batch_size + 1, batch_size)]
    batches = []
    for number in torch.randperm(len(groups), generator=generator).tolist():
        rows = [questions[n] for n in groups[number]]
        width = max(len(row.prompt) + len(row.answer) for row in rows)
        ids = torch.full((batch_size, width), PAD)
        labels = torch.full((batch_size, width), -100)
        for place, row in enumerate(rows):
            whole = torch.tensor([*row.prompt, *row.answer])
            ids[place, : len(whole)] = whole
            labels[place, len(row.prompt) : len(whole)] = whole[len(row.prompt) :]
        batches.append({"input_ids": ids, "labels": labels})
    return batches
