"""Questions with checkable answers of very different lengths, as token ids: what a cascade of two models is tried on.

A question is a problem and, drawn apart from it, a stretch of the alphabet to recite first: ``task marker, problem,
first and last letter, SEP, letters, THEN, result, EOS``. The letters are easy, so the length of an answer says nothing
about how hard its question is, and what makes it hard sits in the few tokens of the result:

- sum: of two numbers; two tokens;
- largest: which of three two-digit numbers is the largest; one token;
- recall: the name that belongs to a three-letter key; 1 to 6 tokens, learnt by heart. How often a key is asked for
  follows Zipf's law, so that rare ones stay uncertain.

The number of letters is spread evenly on a logarithmic scale, from none up. Vowels among them may be written in
capitals, which makes no difference: a model cannot know which it will be, and need not, as with the many ways to say a
thing in natural text.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from papertrial.lm.losses import Loss, token_cross_entropy

TASKS = ("sum", "largest", "recall")
PAD, SEP, EOS = 0, 1, 2
_MARKERS = {"sum": 3, "largest": 4, "recall": 5}
_NO_LETTERS, _THEN = 6, 7
_DIGIT, LETTER, LETTERS = 8, 18, 26
CAPITALS = {LETTER + ord(v) - ord("a"): LETTER + LETTERS + n for n, v in enumerate("aeiou")}
VOCABULARY = LETTER + LETTERS + len(CAPITALS)

Tokens = list[int]


@dataclass(frozen=True)
class Question:
    """``prompt`` ends with SEP; ``answer`` begins with ``letters`` to recite and ends with EOS."""

    task: str
    prompt: Tokens
    answer: Tokens
    letters: int


class World:
    """Questions from a seeded generator.

    Parameters
    ----------
    facts
        Keys with a name; at most 26 cubed.
    terms
        The numbers to add lie below; at most 50.
    longest
        Most letters to recite; at most 25.
    generator
        Of the facts; the questions have generators of their own.
    """

    def __init__(self, facts: int, terms: int, longest: int, generator: torch.Generator) -> None:
        for name, value, least, most in (
            ("facts", facts, 1, LETTERS**3),
            ("terms", terms, 2, 50),
            ("longest", longest, 0, 25),
        ):
            if not least <= value <= most:
                raise ValueError(f"{name} must lie between {least} and {most}, got {value}")
        keys = torch.randperm(LETTERS**3, generator=generator)[:facts].tolist()
        lengths = torch.randint(1, 7, (facts,), generator=generator).tolist()
        letters = torch.randint(LETTERS, (facts, 6), generator=generator).tolist()
        self.keys = [[key // LETTERS**2, key // LETTERS % LETTERS, key % LETTERS] for key in keys]
        self.names = [row[:length] for row, length in zip(letters, lengths, strict=True)]
        self.exposure = 1.0 / torch.arange(1, facts + 1, dtype=torch.float64)
        self.terms, self.longest = terms, longest
        # to divide facts and sums between the parts of a split
        self._fact_lots, self._pair_lots = (torch.rand(size, generator=generator) for size in (facts, terms**2))

    def questions(
        self,
        count: int,
        generator: torch.Generator,
        tasks: Sequence[str] = TASKS,
        *,
        share: tuple[int, int] = (0, 1),
    ) -> list[Question]:
        """``count`` questions, the tasks in turn. Keys are drawn by their exposure and pairs of terms evenly, of a
        ``share`` (k, n) only those that fell to part k of n: the parts of a split have neither a fact nor a sum in
        common, and of every n keys that follow each other in exposure each has one, by lot."""
        unknown = set(tasks) - set(TASKS)
        if unknown or not tasks:
            raise ValueError(f"tasks must be among {TASKS}, got {list(tasks)}")
        most = min(len(self.keys), self.terms**2)
        if not 0 <= share[0] < share[1] <= most:
            raise ValueError(f"share must be (k, n) with 0 <= k < n <= {most}, got {share}")
        facts = _drawn(self.exposure, self._fact_lots, count, share, generator)
        pairs = _drawn(torch.ones(self.terms**2), self._pair_lots, count, share, generator)
        numbers = torch.randint(100, (count, 3), generator=generator).tolist()
        stretches = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
        starts = torch.randint(LETTERS, (count,), generator=generator).tolist()
        capitals = torch.randint(2, (count, LETTERS), generator=generator).bool().tolist()
        made = []
        for n in range(count):
            task = tasks[n % len(tasks)]
            if task == "sum":
                body, result = _sum(*divmod(pairs[n], self.terms))
            elif task == "largest":
                body, result = _largest(numbers[n])
            else:
                body, result = _letters(self.keys[facts[n]]), _letters(self.names[facts[n]])
            letters = math.floor((self.longest + 2) ** stretches[n]) - 1
            border, written = _recitation(starts[n], letters, capitals[n])
            made.append(Question(task, [_MARKERS[task], *body, *border, SEP], [*written, _THEN, *result, EOS], letters))
        return made


def _drawn(weights: Tensor, lots: Tensor, count: int, share: tuple[int, int], generator: torch.Generator) -> list[int]:
    """``count`` numbers by weight, of those that fell to part k of n by lot: one of every n in a row."""
    part, parts = share
    padded = nn.functional.pad(lots, (0, -len(lots) % parts), value=torch.inf).view(-1, parts)
    held = (padded.argsort(1).argsort(1) == part).flatten()[: len(lots)]
    return torch.multinomial(weights * held, count, replacement=True, generator=generator).tolist()


def _digits(number: int) -> Tokens:
    return [_DIGIT + number // 10, _DIGIT + number % 10]


def _letters(letters: Sequence[int]) -> Tokens:
    return [LETTER + letter for letter in letters]


def _sum(a: int, b: int) -> tuple[Tokens, Tokens]:
    return [*_digits(a), *_digits(b)], _digits(a + b)


def _largest(numbers: Sequence[int]) -> tuple[Tokens, Tokens]:
    """The place of the largest, from 1; of the first of them, if there are several."""
    return [digit for number in numbers for digit in _digits(number)], [_DIGIT + 1 + list(numbers).index(max(numbers))]


def _recitation(start: int, count: int, capitals: Sequence[bool]) -> tuple[Tokens, Tokens]:
    """What is asked for, from the first letter to the last, ``a`` following ``z``; and how it is written."""
    letters = _letters([(start + n) % LETTERS for n in range(count)])
    written = [CAPITALS.get(letter, letter) if capitals[n] else letter for n, letter in enumerate(letters)]
    return [LETTER + start, letters[-1] if letters else _NO_LETTERS], written


def reserved(question: Question) -> bool:
    """Whether a question is kept for evaluation: a quarter of all, by a hash of the prompt."""
    return zlib.crc32(bytes(question.prompt)) % 4 == 0


def same(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two answers say the same: capitals make no difference."""
    small = {capital: letter for letter, capital in CAPITALS.items()}
    return [small.get(token, token) for token in one] == [small.get(token, token) for token in other]


def text(tokens: Sequence[int]) -> str:
    """Token ids as characters, for readers."""
    special = {PAD: "", SEP: " => ", EOS: "", _NO_LETTERS: "-", _THEN: ":"} | {
        n: task + " " for task, n in _MARKERS.items()
    }

    def character(token: int) -> str:
        if token in special:
            return special[token]
        if token >= LETTER + LETTERS:
            return "AEIOU"[token - LETTER - LETTERS]
        return str(token - _DIGIT) if token < LETTER else chr(ord("a") + token - LETTER)

    return "".join(character(token) for token in tokens)


def training_batches(questions: Sequence[Question], rows: int, length: int) -> list[dict[str, Tensor]]:
    """Batches (rows, length) of questions packed one behind another, tasks mixed; a short rest is left out.

    Each has ``input_ids``, ``labels`` (-100 but for the tokens of answers, not shifted) and ``position_ids``, which
    start anew with every question, so that transformers keeps their attention apart.

    Raises
    ------
    ValueError
        If a question is longer than a row, or all of them do not fill one batch.
    """
    packed: list[tuple[Tokens, Tokens, Tokens]] = [([], [], [])]
    for question in questions:
        whole = [*question.prompt, *question.answer]
        if len(whole) > length:
            raise ValueError(f"a question of {len(whole)} tokens does not fit into rows of {length}")
        if len(packed[-1][0]) + len(whole) > length:
            packed.append(([], [], []))
        ids, labels, positions = packed[-1]
        ids += whole
        labels += [-100] * len(question.prompt) + question.answer
        positions += range(len(whole))
    packed.pop()
    if len(packed) < rows:
        raise ValueError(f"the questions fill {len(packed)} rows of {length} tokens, and a batch has {rows}")
    columns = []
    for part, filler in ((0, PAD), (1, -100), (2, 0)):
        columns.append(torch.tensor([[*row[part], *[filler] * (length - len(row[part]))] for row in packed]))
    batches = []
    for start in range(0, len(packed) - rows + 1, rows):
        picked = [column[start : start + rows] for column in columns]
        batches.append(dict(zip(("input_ids", "labels", "position_ids"), picked, strict=True)))
    return batches


def answer_loss(model: nn.Module, batch: dict[str, Tensor]) -> Loss:
    """Cross-entropy of the answers' tokens in a packed batch."""
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    return token_cross_entropy(logits, nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100))
