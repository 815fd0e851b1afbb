"""Short reviews from a grammar, with a sentiment that can be counted: preference learning where the truth is known.

A review is ``<bos> noun (verb degree adjective joiner)*``, as in "<bos> film seems very funny and is quite dull but".
Every review has a mood, the chance that an adjective of it is positive; the words of a class are otherwise equally
likely. The true reward of an answer is its number of positive minus its number of negative words, wherever they stand,
so that a policy can gain by breaking the grammar: ``grammatical`` tells.

    world = SentimentWorld(clauses=4)
    ids = world.documents(512, generator)                       # (512, 18)
    prompts = world.prompts(512, generator, clauses=1)          # (512, 6): the noun and a first clause
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NOUNS = ("film", "plot", "cast", "score", "script", "ending", "scene", "story")
VERBS = ("is", "seems", "feels", "looks", "sounds", "stays", "becomes", "remains")
DEGREES = ("very", "quite", "rather", "so", "truly", "mostly", "fairly", "really")
POSITIVE = ("good", "great", "warm", "bright", "funny", "moving", "clever", "lovely")
NEGATIVE = ("bad", "awful", "cold", "dull", "boring", "clumsy", "silly", "ugly")
JOINERS = ("and", "but", "then", "yet", "while", "though", "still", "also")
SPECIAL = ("<pad>", "<bos>")
CONTROL = ("<good>", "<bad>")

MOODS = (0.2, 0.5, 0.8)
"""Chances of a positive adjective; each review has one of them, equally often."""

CONTROL_MOODS = (0.85, 0.15)
"""What ``<good>`` and ``<bad>`` announce."""

_CLASSES = (NOUNS, VERBS, DEGREES, POSITIVE, NEGATIVE, JOINERS)
_SIZE = 8


@dataclass(frozen=True)
class SentimentWorld:
    """The grammar.

    Parameters
    ----------
    clauses
        Clauses of a document, at least 1.
    control_tokens
        Documents may open with ``<good>`` or ``<bad>`` after ``<bos>``, which announces the mood; the vocabulary then
        has 52 tokens in place of 50.

    Attributes
    ----------
    words
        The vocabulary in the order of its ids: ``<pad>`` 0, ``<bos>`` 1, then the classes of eight words each.
    """

    clauses: int = 4
    control_tokens: bool = False

    def __post_init__(self) -> None:
        if self.clauses < 1:
            raise ValueError(f"clauses must be at least 1, got {self.clauses}")

    # -- the vocabulary ------------------------------------------------------------------------------------------

    @property
    def words(self) -> tuple[str, ...]:
        """All words by id."""
        words = SPECIAL + tuple(word for words in _CLASSES for word in words)
        return words + CONTROL if self.control_tokens else words

    @property
    def vocabulary(self) -> int:
        return len(self.words)

    @property
    def pad_id(self) -> int:
        return 0

    @property
    def bos_id(self) -> int:
        return 1

    def id(self, word: str) -> int:
        """Id of a word; ValueError for one that the world does not have."""
        if word not in self.words:
            raise ValueError(f"unknown word {word!r}; known: {' '.join(self.words)}")
        return self.words.index(word)

    def text(self, ids: Sequence[int] | Tensor) -> str:
        """A row of ids as words with blanks between, padding left out."""
        return " ".join(self.words[int(i)] for i in ids if int(i) != self.pad_id)

    @property
    def length(self) -> int:
        """Tokens of a document without control token: ``<bos>``, the noun, four a clause."""
        return self.prompt_length(self.clauses)

    def prompt_length(self, clauses: int) -> int:
        """Tokens up to the end of the given number of clauses, without control token."""
        return 2 + 4 * clauses

    # -- drawing -------------------------------------------------------------------------------------------------

    def documents(
        self, count: int, generator: torch.Generator, *, moods: Sequence[float] = MOODS, controlled: float = 0.0
    ) -> Tensor:
        """Draw documents (count, length), of one more token with control tokens.

        Parameters
        ----------
        moods
            Chances of a positive adjective, one drawn per document.
        controlled
            Chance that a document opens with ``<good>`` or ``<bad>`` and has the mood of that word. Documents without
            one are padded on the right, so that all have one length. Needs ``control_tokens``.
        """
        if controlled and not self.control_tokens:
            raise ValueError("controlled needs a world with control_tokens=True")
        if not 0 <= controlled <= 1:
            raise ValueError(f"controlled is a probability, got {controlled}")
        mood = self._moods(count, moods, generator)
        plain = self._write(mood, self.clauses, generator)
        if not self.control_tokens:
            return plain
        announced = torch.rand(count, generator=generator) < controlled
        which = torch.randint(2, (count,), generator=generator)
        told = self._write(torch.tensor(CONTROL_MOODS)[which], self.clauses, generator)
        token = torch.tensor([self.id(word) for word in CONTROL])[which, None]
        padding = torch.full((count, 1), self.pad_id)
        return torch.where(
            announced[:, None], torch.cat([told[:, :1], token, told[:, 1:]], 1), torch.cat([plain, padding], 1)
        )

    def prompts(
        self, count: int, generator: torch.Generator, *, clauses: int = 1, moods: Sequence[float] = MOODS
    ) -> Tensor:
        """Openings (count, 2 + 4 * clauses) of documents, without control token."""
        if not 0 <= clauses < self.clauses:
            raise ValueError(f"a prompt has between 0 and {self.clauses - 1} clauses, got {clauses}")
        return self._write(self._moods(count, moods, generator), clauses, generator)

    def _moods(self, count: int, moods: Sequence[float], generator: torch.Generator) -> Tensor:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if not moods or not all(0 <= mood <= 1 for mood in moods):
            raise ValueError(f"moods must be probabilities, got {list(moods)}")
        return torch.tensor(list(moods))[torch.randint(len(moods), (count,), generator=generator)]

    def _write(self, mood: Tensor, clauses: int, generator: torch.Generator) -> Tensor:
        count = len(mood)

        def draw(kind: int | Tensor, width: int) -> Tensor:
            word = torch.randint(_SIZE, (count, width), generator=generator)
            return len(SPECIAL) + _SIZE * kind + word

        negative = (torch.rand(count, clauses, generator=generator) >= mood[:, None]).long()
        slots = [draw(1, clauses), draw(2, clauses), draw(3 + negative, clauses), draw(5, clauses)]
        body = torch.stack(slots, -1).flatten(1)
        return torch.cat([torch.full((count, 1), self.bos_id), draw(0, 1), body], 1)

    # -- judging -------------------------------------------------------------------------------------------------

    def _kind(self, ids: Tensor) -> Tensor:
        """0 nouns, 1 verbs, 2 degrees, 3 positive, 4 negative, 5 joiners, 6 control, -1 padding and the like."""
        return torch.where(ids < len(SPECIAL), -1, (ids - len(SPECIAL)).div(_SIZE, rounding_mode="floor"))

    def reward(self, answers: Tensor) -> Tensor:
        """Positive minus negative words of each answer (N, T), wherever they stand; (N,) float32."""
        kind = self._kind(answers)
        return ((kind == 3).sum(-1) - (kind == 4).sum(-1)).float()

    def fits(self, answers: Tensor, start: int) -> Tensor:
        """Which tokens are of the class that their slot wants, (N, T) bool.

        Parameters
        ----------
        answers
            (N, T) ids that follow a prompt.
        start
            Length of that prompt without a control token, ``<bos>`` and noun included; at least 2.
        """
        if start < 2:
            raise ValueError(f"start must be at least 2, after <bos> and the noun, got {start}")
        kind = self._kind(answers)
        slot = (torch.arange(answers.shape[-1], device=answers.device) + start - 2) % 4
        wanted = torch.tensor([1, 2, 3, 5], device=answers.device)[slot]
        return torch.where(wanted == 3, (kind == 3) | (kind == 4), kind == wanted)

    def grammatical(self, answers: Tensor, start: int) -> Tensor:
        """Share of each answer's tokens that fit their slots, (N,) float32; arguments as in :meth:`fits`."""
        return self.fits(answers, start).float().mean(-1)

    def adjective_slots(self, length: int, start: int) -> Tensor:
        """Which of ``length`` answer tokens after a prompt of ``start`` are adjective slots, (length,) bool."""
        return (torch.arange(length) + start - 2) % 4 == 2
