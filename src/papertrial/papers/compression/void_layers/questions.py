"""Multiple-choice questions whose answers can be checked: a small world to memorise, and passages to continue.

The world has facts (entity and relation to a name of two words) and one-digit sums and products. A text of it is a row
of solved questions, so that a question can be asked after examples:

    <bos> colour of e7 ? w3 w31 . 4 + 9 ? 1 3 . home of e2 ?
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from papertrial.lm.corpora import Document

OPTIONS = 4
PAD, BEGIN, STOP, ASK, OF = 0, 1, 2, 3, 4
_SIGNS = 5  # plus and times
_DIGITS = 7
_RELATIONS = 17
RELATIONS = 2
QUESTION, ANSWER = 4, 3
"""Tokens of a question and of its answer, the full stop included."""


@dataclass(frozen=True)
class Questions:
    """N questions with four options each.

    Attributes
    ----------
    prompts : lists of token ids.
    options : (N, 4, n) ids, all of one length.
    correct : (N,) which option is true.
    examples : (S,) bool, the columns of a prompt that hold answers of its examples; empty where there are none.
    """

    prompts: list[list[int]]
    options: Tensor
    correct: Tensor
    examples: Tensor


class FactWorld:
    """Facts and sums that a model can learn by heart.

    Parameters
    ----------
    entities
        How many things there are, each with two relations to a name.
    words
        Size of the two sets that the two words of a name are drawn from.
    generator
        Draws the names, and which of all questions are for validation.
    """

    def __init__(self, entities: int, words: int, *, generator: torch.Generator) -> None:
        if entities < 2 * OPTIONS or words < OPTIONS:
            raise ValueError(f"a world needs at least {2 * OPTIONS} entities and {OPTIONS} words")
        first_entity = _RELATIONS + RELATIONS
        first_word = first_entity + entities
        self.vocabulary = first_word + 2 * words
        things = torch.arange(entities).repeat(RELATIONS)
        relations = torch.arange(RELATIONS).repeat_interleave(entities)
        fixed = torch.ones_like(things)
        asked = torch.stack([_RELATIONS + relations, OF * fixed, first_entity + things, ASK * fixed], 1)
        names = first_word + torch.randint(words, (len(things), 2), generator=generator)
        names[:, 1] += words
        digit = torch.arange(10)
        left, right = (part.flatten() for part in torch.meshgrid(digit, digit, indexing="ij"))
        sums = [(left + right, 0), (left * right, 1)]
        solved = [torch.stack([value // 10, value % 10], 1) + _DIGITS for value, _ in sums]
        put = [
            torch.stack([_DIGITS + left, torch.full_like(left, _SIGNS + sign), _DIGITS + right, ASK + 0 * left], 1)
            for _, sign in sums
        ]
        self.questions = torch.cat([asked, *put])  # (Q, 4)
        stops = torch.full((len(self.questions), 1), STOP)
        self.answers = torch.cat([torch.cat([names, *solved]), stops], 1)  # (Q, 3)
        sizes = [entities] * RELATIONS + [len(left)] * len(sums)
        self.kinds = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))  # (Q,)
        self.validation = torch.rand(len(self.questions), generator=generator) < 0.3  # (Q,)

    def _drawn(self, shape: tuple[int, ...], among: Tensor, generator: torch.Generator) -> Tensor:
        """Indices of questions, facts and sums equally often."""
        found = torch.empty(shape, dtype=torch.long)
        facts = torch.rand(shape, generator=generator) < 0.5
        for wanted in (True, False):
            pool = (among & ((self.kinds < RELATIONS) == wanted)).nonzero()[:, 0]
            here = facts == wanted
            found[here] = pool[torch.randint(len(pool), (int(here.sum()),), generator=generator)]
        return found

    def _texts(self, indices: Tensor) -> Tensor:
        """(B, K) questions to (B, 7 K) tokens, solved."""
        return torch.cat([self.questions[indices], self.answers[indices]], -1).flatten(1)

    def batches(self, size: int, questions: int, *, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        """Endless training batches: ``size`` texts of ``questions`` solved questions; the answers carry the loss."""
        every = torch.ones(len(self.questions), dtype=torch.bool)
        while True:
            texts = self._texts(self._drawn((size, questions), every, generator))
            ids = torch.cat([torch.full((size, 1), BEGIN), texts], 1)
            labels = ids.clone()
            labels[:, 0] = -100
            labels[:, 1:].unflatten(1, (questions, -1))[..., :QUESTION] = -100
            yield {"input_ids": ids, "labels": labels}

    def ask(self, count: int, examples: int, *, validation: bool, generator: torch.Generator) -> Questions:
        """Questions after ``examples`` solved ones. What is asked for validation is never asked in the test.

        Wrong options are true answers to other questions of the same kind.
        """
        rest = torch.ones_like(self.validation)
        asked = self._drawn((count,), self.validation == validation, generator)
        shown = self._drawn((count, examples), rest, generator)
        begin = torch.full((count, 1), BEGIN)
        prompts = torch.cat([begin, self._texts(shown), self.questions[asked]], 1)
        options = torch.empty(count, OPTIONS, ANSWER, dtype=torch.long)
        correct = torch.randint(OPTIONS, (count,), generator=generator)
        for row, index in enumerate(asked.tolist()):
            others = self.answers[self.kinds == self.kinds[index]].unique(dim=0)
            others = others[(others != self.answers[index]).any(1)]
            wrong = others[torch.randperm(len(others), generator=generator)[: OPTIONS - 1]]
            place = int(correct[row])
            options[row] = torch.cat([wrong[:place], self.answers[index][None], wrong[place:]])
        places = torch.zeros(prompts.shape[1], dtype=torch.bool)
        places[1 : 1 + examples * (QUESTION + ANSWER)].unflatten(0, (-1, QUESTION + ANSWER))[:, QUESTION:-1] = True
        return Questions(prompts.tolist(), options, correct, places)


def continuations(
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    count: int,
    *,
    prompt: int,
    length: int,
    generator: torch.Generator,
) -> Questions:
    """Which of four passages goes on from a prompt? The wrong ones are from elsewhere in the same document.

    Parameters
    ----------
    prompt, length
        Tokens of the prompts and of the options.

    Raises
    ------
    ValueError
        If no document is long enough.
    """
    texts = [tokenizer.encode(document.text, add_special_tokens=False) for document in documents]
    texts = [ids for ids in texts if len(ids) >= 4 * (prompt + length)]
    if not texts:
        raise ValueError(f"no document has {4 * (prompt + length)} tokens: take shorter prompts or other documents")
    prompts, options = [], torch.empty(count, OPTIONS, length, dtype=torch.long)
    correct = torch.randint(OPTIONS, (count,), generator=generator)
    for row in range(count):
        ids = texts[int(torch.randint(len(texts), (1,), generator=generator))]
        start = int(torch.randint(len(ids) - prompt - length + 1, (1,), generator=generator))
        at = start + prompt
        true = ids[at : at + length]
        elsewhere = [i for i in range(len(ids) - length + 1) if i + length <= start or i >= at + length]
        wrong = [elsewhere[i] for i in torch.randperm(len(elsewhere), generator=generator).tolist()]
        starts = [i for i in wrong[: 4 * OPTIONS] if ids[i : i + length] != true][: OPTIONS - 1]
        if len(starts) < OPTIONS - 1:
            raise ValueError("a document repeats one passage throughout: take longer options or other documents")
        starts.insert(int(correct[row]), at)
        prompts.append(ids[start:at])
        options[row] = torch.tensor([ids[i : i + length] for i in starts])
    return Questions(prompts, options, correct, torch.zeros(0, dtype=torch.bool))
