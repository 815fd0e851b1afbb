"""Recall with nothing to do most of the time: facts, then questions about them, in text that needs no memory at all.

A sequence is ``<bos>``, then words of a Markov chain in which facts and, later, questions are scattered. A fact is one
token (``k3=v5``), a question two (``k3?`` and its answer ``v5``). A head that looks facts up has work at the questions
only; everywhere else its attention has to go somewhere.

    world = RecallWorld.draw(generator)
    batch = world.sample(32, generator)               # ids (32, 64), answers (32, 64) bool
    loss = causal_loss(model, batch.ids)              # on every token, not on the answers only
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BOS = 0


class RecallBatch(NamedTuple):
    """Sequences.

    Attributes
    ----------
    ids : (B, T) long.
    answers : (B, T) bool, where the answers stand; each is preceded by its question.
    """

    ids: Tensor
    answers: Tensor


@dataclass(frozen=True)
class RecallWorld:
    """The chain and the vocabulary: bos, filler words, facts, questions, answers, in this order.

    Parameters
    ----------
    transitions
        (F, F) rows of probabilities: from one filler word to the next. Facts and questions do not interrupt the chain.
    keys, values
        K and V; there are K * V facts.
    """

    transitions: Tensor
    keys: int = 16
    values: int = 8

    def __post_init__(self) -> None:
        if self.keys < 1 or self.values < 1:
            raise ValueError(f"keys and values must be at least 1, got {self.keys} and {self.values}")
        rows = self.transitions
        if rows.ndim != 2 or rows.shape[0] != rows.shape[1] or not rows.numel():
            raise ValueError(f"transitions must be (F, F), got {tuple(rows.shape)}")
        if bool((rows < 0).any()) or not torch.allclose(rows.sum(1), torch.ones_like(rows[0])):
            raise ValueError("transitions must have rows of probabilities")

    @classmethod
    def draw(
        cls,
        generator: torch.Generator,
        *,
        filler: int = 32,
        keys: int = 16,
        values: int = 8,
        concentration: float = 1.0,
    ) -> "RecallWorld":
        """A world whose chain goes from each word on with softmax(N(0, 1) * ``concentration``) probabilities.

        0 makes the filler independent and uniform; larger values make the chain easier to predict.

        Raises
        ------
        ValueError
            For no filler, or a negative concentration.
        """
        if filler < 1 or concentration < 0:
            raise ValueError(f"filler must be at least 1, concentration at least 0; got {filler} and {concentration}")
        noise = torch.randn(filler, filler, generator=generator, dtype=torch.float64)
        return cls((noise * concentration).softmax(1), keys, values)

    # -- the vocabulary ------------------------------------------------------------------------------------------

    @property
    def filler(self) -> int:
        return self.transitions.shape[0]

    def word(self, state: Tensor) -> Tensor:
        """Ids of filler words."""
        return 1 + state

    def fact(self, key: Tensor, value: Tensor) -> Tensor:
        """Ids of the tokens that say that ``key`` has ``value``."""
        return 1 + self.filler + key * self.values + value

    def question(self, key: Tensor) -> Tensor:
        """Ids of the tokens that ask for the value of ``key``."""
        return 1 + self.filler + self.keys * self.values + key

    def answer(self, value: Tensor) -> Tensor:
        """Ids of the tokens that name a value."""
        return 1 + self.filler + self.keys * self.values + self.keys + value

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        return 1 + self.filler + self.keys * self.values + self.keys + self.values

    # -- sequences -----------------------------------------------------------------------------------------------

    def sample(
        self,
        count: int,
        generator: torch.Generator,
        *,
        length: int = 64,
        facts: int = 8,
        questions: int = 8,
        fact_share: float | None = None,
    ) -> RecallBatch:
        """Draw sequences.

        Parameters
        ----------
        length
            T, bos included.
        facts
            How many, about different keys.
        questions
            How many, each about one of the facts; none is asked again before all were.
        fact_share
            None scatters everything over the sequence: each fact is asked about once, at a random place after it, so
            that ``questions`` has to be ``facts``. A number puts the facts at random places of that first part, and the
            questions at random places of the rest. How far a token is from bos then says what may come next, and a head
            that looks at bos may be telling early from late rather than idling.

        Raises
        ------
        ValueError
            If the facts are more than the keys, or facts or questions do not fit into their part.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if not 1 <= facts <= self.keys:
            raise ValueError(f"facts must lie in 1..{self.keys}, the number of keys; got {facts}")
        if questions < 0:
            raise ValueError(f"questions must not be negative, got {questions}")
        key = _shuffled(count, self.keys, generator)[:, :facts]  # (B, facts)
        value = torch.randint(self.values, (count, facts), generator=generator)
        if fact_share is None:
            if questions != facts:
                raise ValueError(f"scattered facts are asked about once each: {facts} facts, {questions} questions")
            places, starts = _scattered(count, length, facts, generator)
            asked = torch.arange(facts).expand(count, facts)
        else:
            places, starts = _parted(count, length, facts, questions, fact_share, generator)
            rounds = [_shuffled(count, facts, generator) for _ in range(-(-questions // facts))]
            asked = torch.cat(rounds, 1)[:, :questions] if rounds else places[:, :0]
        marked = torch.full((count, length), -1)
        marked[:, 0] = BOS
        marked.scatter_(1, places, self.fact(key, value))
        marked.scatter_(1, starts, self.question(key.gather(1, asked)))
        marked.scatter_(1, starts + 1, self.answer(value.gather(1, asked)))
        answers = torch.zeros_like(marked, dtype=torch.bool).scatter(1, starts + 1, True)
        # the chain goes on behind an interruption where it stopped before it
        step = (marked < 0).long().cumsum(1) - 1
        filler = self.word(self._chain(count, length, generator)).gather(1, step.clamp(min=0))
        return RecallBatch(torch.where(marked < 0, filler, marked), answers)

    def _chain(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """States (B, T) of independent chains, from a uniform start."""
        bounds = self.transitions.double().cumsum(1)
        bounds[:, -1] = 1.0  # rounding must not leave a gap at the end
        state = torch.randint(self.filler, (count,), generator=generator)
        states = [state]
        for _ in range(length - 1):
            draw = torch.rand(count, 1, generator=generator, dtype=torch.float64)
            state = (draw >= bounds[state]).sum(1)
            states.append(state)
        return torch.stack(states, 1)


def _shuffled(count: int, items: int, generator: torch.Generator) -> Tensor:
    """(count, items) random orders."""
    return torch.rand(count, items, generator=generator).argsort(1)


def _scattered(count: int, length: int, facts: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Places (count, facts) of facts and of the questions about them, each question somewhere after its fact."""
    filler = length - 1 - 3 * facts
    if filler < 0:
        raise ValueError(f"{facts} facts and their questions do not fit into {length} places, one of them for bos")
    # random pairs of events in their order: the earlier of a pair tells, the later asks
    pairs = _shuffled(count, 2 * facts, generator).view(count, facts, 2).sort(2).values
    asks = torch.zeros(count, 2 * facts, dtype=torch.long).scatter(1, pairs[..., 1], 1)
    events = _shuffled(count, filler + 2 * facts, generator)[:, : 2 * facts].sort(1).values
    places = 1 + events + asks.cumsum(1) - asks  # a question takes one place more
    return places.gather(1, pairs[..., 0]), places.gather(1, pairs[..., 1])


def _parted(
    count: int, length: int, facts: int, questions: int, fact_share: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Places (count, facts) in the first part, and of questions (count, questions) in the rest, ascending."""
    if not 0 < fact_share < 1:
        raise ValueError(f"fact_share is a share between 0 and 1, got {fact_share}")
    early = int(length * fact_share)
    late = length - early
    if facts > early - 1:
        raise ValueError(f"{facts} facts do not fit into the first {early} places, one of them for bos")
    if 2 * questions > late:
        raise ValueError(f"{questions} questions with their answers do not fit into the last {late} places")
    places = 1 + _shuffled(count, early - 1, generator)[:, :facts]
    # pairs without overlap: choose among the places left when every pair is one place
    starts = _shuffled(count, late - questions, generator)[:, :questions].sort(1).values
    return places, early + starts + torch.arange(questions)
