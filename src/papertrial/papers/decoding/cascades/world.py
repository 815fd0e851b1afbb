"""Questions with checkable answers of very different lengths, as token ids: what a cascade of two models is tried on.

Three tasks share one format, ``task marker, question, SEP, answer, EOS``:

- compare: which of two three-digit numbers is larger; one answer token;
- recite: the alphabet from one letter to its end, then the value of a sum of two numbers below 20; 4 to 28 answer
  tokens, all but the digits of the sum easy. Vowels may be written in capitals, which makes no difference: a model
  cannot know which it will be, and need not, as with the many ways to say a thing in natural text;
- recall: the name that belongs to a three-letter key; 1 to 6 answer tokens, learnt by heart. How often a key is asked
  for follows Zipf's law, so that rare ones stay uncertain.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from papertrial.lm.losses import Loss, token_cross_entropy

TASKS = ("compare", "recite", "recall")
PAD, SEP, EOS = 0, 1, 2
_MARKERS = {"compare": 3, "recite": 4, "recall": 5}
_SIGNS = {"+": 6, "<": 7, ">": 8, "=": 9}
_DIGIT, _LETTER, LETTERS = 10, 20, 26
_CAPITALS = {_LETTER + ord(v) - ord("a"): _LETTER + LETTERS + n for n, v in enumerate("aeiou")}
VOCABULARY = _LETTER + LETTERS + len(_CAPITALS)

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
    """

    def __init__(self, facts: int, generator: torch.Generator) -> None:
        if not 1 <= facts <= LETTERS**3:
            raise ValueError(f"facts must lie between 1 and {LETTERS**3}, got {facts}")
        keys = torch.randperm(LETTERS**3, generator=generator)[:facts].tolist()
        lengths = torch.randint(1, 7, (facts,), generator=generator).tolist()
        letters = torch.randint(LETTERS, (facts, 6), generator=generator).tolist()
        self.keys = [[key // LETTERS**2, key // LETTERS % LETTERS, key % LETTERS] for key in keys]
        self.names = [row[:length] for row, length in zip(letters, lengths, strict=True)]
        self.exposure = 1.0 / torch.arange(1, facts + 1, dtype=torch.float64)

    def questions(
        self,
        count: int,
        generator: torch.Generator,
        tasks: Sequence[str] = TASKS,
        *,
        share: tuple[int, int] = (0, 1),
    ) -> list[Question]:
        """``count`` questions, the tasks in turn. Keys are drawn by their exposure, of a ``share`` (k, n) only those
        whose number leaves k when divided by n: the parts of a split then have no fact in common."""
        unknown = set(tasks) - set(TASKS)
        if unknown or not tasks:
            raise ValueError(f"tasks must be among {TASKS}, got {list(tasks)}")
        if not 0 <= share[0] < share[1] <= len(self.keys):
            raise ValueError(f"share must be (k, n) with 0 <= k < n <= {len(self.keys)}, got {share}")
        held = torch.arange(len(self.keys)) % share[1] == share[0]
        facts = torch.multinomial(self.exposure * held, count, replacement=True, generator=generator).tolist()
        numbers = torch.randint(1000, (count, 2), generator=generator).tolist()
        starts = torch.randint(LETTERS - 1, (count,), generator=generator).tolist()
        capitals = torch.randint(2, (count, LETTERS), generator=generator).bool().tolist()
        made = []
        for n in range(count):
            task = tasks[n % len(tasks)]
            if task == "compare":
                body, answer = _compare(*numbers[n])
            elif task == "recite":
                body, answer = _recite(starts[n], numbers[n][0] % 20, numbers[n][1] % 20, capitals[n])
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
    return [*_digits(a, 3), *_digits(b, 3)], [_SIGNS[sign]]


def _recite(start: int, a: int, b: int, capitals: Sequence[bool]) -> tuple[Tokens, Tokens]:
    letters = _letters(range(start, LETTERS))
    written = [_CAPITALS.get(letter, letter) if capitals[n] else letter for n, letter in enumerate(letters)]
    return [letters[0], *_digits(a, 2), _SIGNS["+"], *_digits(b, 2)], [*written, *_digits(a + b, 2)]


def reserved(question: Question) -> bool:
    """Whether a question is kept for evaluation: a quarter of all, by a hash of the prompt; never one of recall."""
    return question.task != "recall" and zlib.crc32(bytes(question.prompt)) % 4 == 0


def same(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two answers say the same: capitals make no difference."""
    small = {capital: letter for letter, capital in _CAPITALS.items()}
    return [small.get(token, token) for token in one] == [small.get(token, token) for token in other]


def text(tokens: Sequence[int]) -> str:
    """Token ids as characters, for readers."""
    signs = {number: sign for sign, number in _SIGNS.items()}
    special = {PAD: "", SEP: " => ", EOS: ""} | {number: task[:3] + " " for task, number in _MARKERS.items()}

    def character(token: int) -> str:
        if token in special or token in signs:
            return special.get(token, signs.get(token, ""))
        if token >= _LETTER + LETTERS:
            return "AEIOU"[token - _LETTER - LETTERS]
        return str(token - _DIGIT) if token < _LETTER else chr(ord("a") + token - _LETTER)

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
