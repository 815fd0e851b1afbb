"""Categories and their members, and styles that have nothing to do with membership: what a ranked list gets wrong.

Two kinds of lines make the text. ``the stirs e17 gently ;`` uses a member in the words of its style, so that members of
one style become alike to a model. ``list c3 , e17 , e402 , e230 ;`` names members of a category, in random order and
number, never one twice. A category's members are drawn from all styles (or from a few, see ``styles_per_category``),
and some are named more often than others.

    world = CategoryWorld.draw(generator)
    tokenizer = world.tokenizer()
    batches = world.batches(32, 64, generator)                 # endless (32, 64) token ids of running text
    batches = world.documents(32, generator)                   # or of one list, or some uses, in every row
    text = world.prompt(3, explored=["e17"])                   # "; list c3 , e17 ," which asks for another
    world.is_member(3, "e402")
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, LIST, NEXT, END, THE = range(5)
MARKS = ("<pad>", "list", ",", ";", "the")
OPENERS = CLOSERS = 4
"""Words of a style that stand before, and that stand after, one of its members."""


@dataclass(frozen=True)
class CategoryWorld:
    """Which entity belongs to which category, and how often it is named.

    Parameters
    ----------
    members
        (C, A) entity numbers of each category, no entity twice in a row.
    styles, per_style
        Entities number ``styles * per_style``; entity e has the style e // per_style.
    skew
        The a-th member of a category is named with weight (a + 1) ** -skew.
    """

    members: Tensor
    styles: int = 16
    per_style: int = 40
    skew: float = 1.2
    _sets: list[set[int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.styles < 1 or self.per_style < 1:
            raise ValueError(f"styles and per_style must be at least 1, got {self.styles} and {self.per_style}")
        if self.members.dim() != 2 or self.members.dtype != torch.long or 0 in self.members.shape:
            raise ValueError(f"members must be (C, A) long, got {self.members.dtype} {tuple(self.members.shape)}")
        if not 0 <= int(self.members.min()) <= int(self.members.max()) < self.entities:
            raise ValueError(f"members must lie in 0..{self.entities - 1}")
        sets = [set(row) for row in self.members.tolist()]
        if any(len(one) != self.members.shape[1] for one in sets):
            raise ValueError("a category names an entity twice")
        if self.skew < 0:
            raise ValueError(f"skew must not be negative, got {self.skew}")
        object.__setattr__(self, "_sets", sets)

    @classmethod
    def draw(
        cls,
        generator: torch.Generator,
        *,
        categories: int = 60,
        answers: int = 12,
        styles: int = 16,
        per_style: int = 40,
        styles_per_category: int | None = None,
        skew: float = 1.2,
    ) -> "CategoryWorld":
        """A world at random.

        Parameters
        ----------
        styles_per_category
            None draws the members of a category from all entities, so that style says nothing about membership. A
            number confines them to that many styles, in equal parts.

        Raises
        ------
        ValueError
            If there are too few entities, or ``answers`` is no multiple of ``styles_per_category``.
        """
        if categories < 1 or answers < 1:
            raise ValueError(f"categories and answers must be at least 1, got {categories} and {answers}")
        if styles_per_category is None:
            if answers > styles * per_style:
                raise ValueError(f"{answers} answers of {styles * per_style} entities")
            order = torch.rand(categories, styles * per_style, generator=generator).argsort(1)
            return cls(order[:, :answers], styles, per_style, skew)
        each, rest = divmod(answers, styles_per_category)
        if rest or each > per_style or styles_per_category > styles:
            raise ValueError(
                f"{answers} answers cannot be {styles_per_category} equal parts of the {styles} styles of {per_style}"
            )
        chosen = torch.rand(categories, styles, generator=generator).argsort(1)[:, :styles_per_category]
        within = torch.rand(categories, styles_per_category, per_style, generator=generator).argsort(2)[..., :each]
        members = (chosen[..., None] * per_style + within).flatten(1)
        shuffled = torch.rand(members.shape, generator=generator).argsort(1)  # frequency is not tied to style
        return cls(members.gather(1, shuffled), styles, per_style, skew)

    # -- the vocabulary ------------------------------------------------------------------------------------------

    @property
    def entities(self) -> int:
        return self.styles * self.per_style

    @property
    def first_entity(self) -> int:
        """Id of the entity e0; the others follow."""
        return len(MARKS) + len(self.members) + self.styles * (OPENERS + CLOSERS)

    @property
    def words(self) -> list[str]:
        """All words by id."""
        return [
            *MARKS,
            *(f"c{c}" for c in range(len(self.members))),
            *(f"o{s}.{i}" for s in range(self.styles) for i in range(OPENERS)),
            *(f"z{s}.{i}" for s in range(self.styles) for i in range(CLOSERS)),
            *(f"e{e}" for e in range(self.entities)),
        ]

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """One token per word, words separated by blanks."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = {word: i for i, word in enumerate(self.words)}
        bare = Tokenizer(models.WordLevel(words, unk_token=MARKS[PAD]))
        bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=bare, pad_token=MARKS[PAD], padding_side="left")

    # -- text ----------------------------------------------------------------------------------------------------

    def prompt(self, category: int, explored: Sequence[str] = ()) -> str:
        """The beginning of a list that names the explored members already, and asks for another one."""
        if not 0 <= category < len(self.members):
            raise ValueError(f"category must lie in 0..{len(self.members) - 1}, got {category}")
        named = [word for name in explored for word in (MARKS[NEXT], name)]
        return " ".join([MARKS[END], MARKS[LIST], f"c{category}", *named, MARKS[NEXT]])

    def is_member(self, category: int, word: str) -> bool:
        """Whether a word names a member of the category; other kinds of words do not."""
        return word[:1] == "e" and word[1:].isdecimal() and int(word[1:]) in self._sets[category]

    @property
    def longest(self) -> int:
        """Tokens of a list that names every member."""
        return 2 * self.members.shape[1] + 3

    def fact_lines(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Lists (count, longest) and which of their slots hold a token, as (ids, mask).

        The members of a list are a weighted draw without replacement, in an order of its own; every number of them from
        one to all is equally likely.
        """
        categories, answers = self.members.shape
        category = torch.randint(categories, (count,), generator=generator)
        weights = torch.arange(1, answers + 1, dtype=torch.float64) ** -self.skew
        # the largest log(weight) + Gumbel noise are such a draw
        noise = -torch.log(-torch.log(torch.rand(count, answers, generator=generator, dtype=torch.float64)))
        drawn = (weights.log() + noise).argsort(1, descending=True)
        number = torch.randint(1, answers + 1, (count, 1), generator=generator)
        kept = torch.arange(answers) < number
        order = torch.where(kept, torch.rand(count, answers, generator=generator), 2.0).argsort(1)
        names = self.first_entity + self.members[category[:, None], drawn.gather(1, order)]
        ids = torch.full((count, self.longest), END)
        ids[:, 0], ids[:, 1] = LIST, len(MARKS) + category
        ids[:, 2:-1:2] = torch.where(kept, NEXT, END)
        ids[:, 3::2] = torch.where(kept, names, END)
        return ids, torch.arange(self.longest) < 2 * number + 3

    def style_lines(self, count: int, generator: torch.Generator) -> Tensor:
        """Uses of members in the words of their style, (count, 5)."""
        entity = torch.randint(self.entities, (count,), generator=generator)
        style = entity.div(self.per_style, rounding_mode="floor")
        opener = style * OPENERS + torch.randint(OPENERS, (count,), generator=generator)
        closer = style * CLOSERS + torch.randint(CLOSERS, (count,), generator=generator)
        first = len(MARKS) + len(self.members)
        ids = [first + opener, self.first_entity + entity, first + self.styles * OPENERS + closer]
        return torch.stack([torch.full((count,), THE), *ids, torch.full((count,), END)], 1)

    def batches(
        self, batch_size: int, length: int, generator: torch.Generator, *, facts: float = 0.4
    ) -> Iterator[Tensor]:
        """Endless batches (batch_size, length) of text in which ``facts`` of the tokens stand in lists."""
        if not 0 < facts < 1:
            raise ValueError(f"facts is a share between 0 and 1, got {facts}")
        if batch_size < 1 or length < 2:
            raise ValueError(f"batch_size must be at least 1 and length at least 2, got {batch_size} and {length}")
        mean = self.members.shape[1] + 4  # tokens of a list
        per_list = (1 - facts) / facts * mean / 5  # style lines for each list
        needed = batch_size * length
        while True:
            lists = max(1, round(1.1 * needed / (mean + 5 * per_list)) + 2 * batch_size)
            uses = max(1, round(lists * per_list))
            ids, mask = self.fact_lines(lists, generator)
            width = ids.shape[1]
            plain = torch.full((uses, width), PAD)
            plain[:, :5] = self.style_lines(uses, generator)
            rows = torch.cat([ids, plain])
            kept = torch.cat([mask, torch.arange(width).expand(uses, width) < 5])
            order = torch.randperm(len(rows), generator=generator)
            stream = rows[order][kept[order]]
            if len(stream) >= needed:  # short by bad luck only: then another draw
                yield stream[:needed].view(batch_size, length)

    def documents(self, count: int, generator: torch.Generator, *, facts: float = 0.7) -> Iterator[Tensor]:
        """Endless batches (count, longest + 1) in which each row stands for itself, as prompts do.

        A row begins with the end of a line. Then it holds one list, in the share ``facts`` of the rows (rounded, at
        least one of either kind), or as many uses as there is room for; padding fills the rest.
        """
        if not 0 < facts < 1:
            raise ValueError(f"facts is a share between 0 and 1, got {facts}")
        if count < 2:
            raise ValueError(f"count must be at least 2, one row of either kind, got {count}")
        lists = min(max(1, round(facts * count)), count - 1)
        uses = max(1, self.longest // 5)
        width = max(self.longest, 5 * uses)
        while True:
            batch = torch.full((count, 1 + width), PAD)
            batch[:, 0] = END
            ids, mask = self.fact_lines(lists, generator)
            batch[:lists, 1 : 1 + self.longest] = torch.where(mask, ids, PAD)
            batch[lists:, 1 : 1 + 5 * uses] = self.style_lines((count - lists) * uses, generator).view(-1, 5 * uses)
            yield batch
