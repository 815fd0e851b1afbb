"""The world of categories: its text obeys its rules, and its prompts ask what its text answers."""

from itertools import pairwise

import pytest
import torch

from papertrial.lm.worlds.categories import END, LIST, MARKS, NEXT, PAD, THE, CategoryWorld


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def world() -> CategoryWorld:
    return CategoryWorld.draw(generator(), categories=9, answers=6, styles=4, per_style=10)


def lines(world: CategoryWorld, tokens: torch.Tensor) -> list[list[str]]:
    """Whole lines of a batch as words, without their end."""
    found: list[list[str]] = []
    for row in tokens.tolist():
        words = [world.words[i] for i in row]
        ends = [i for i, word in enumerate(words) if word == MARKS[END]]
        found += [words[a + 1 : b] for a, b in pairwise(ends)]
    return found


def test_lists_name_members_of_their_category_each_once(world):
    ids, mask = world.fact_lines(500, generator(1))
    lengths = []
    for row, kept in zip(ids, mask, strict=True):
        words = [world.words[i] for i in row[kept].tolist()]
        assert words[0] == MARKS[LIST]
        assert words[-1] == MARKS[END]
        category, named = int(words[1][1:]), words[3:-1:2]
        assert set(words[2:-1:2]) == {MARKS[NEXT]}
        assert len(set(named)) == len(named)
        assert all(world.is_member(category, name) for name in named)
        lengths.append(len(named))
    assert set(lengths) == set(range(1, 7))


def test_the_first_members_are_named_more_often_and_stand_anywhere(world):
    ids, mask = world.fact_lines(6000, generator(2))
    category, number = ids[:, 1] - len(MARKS), (mask.sum(1) - 3) // 2
    names = torch.where(mask[:, 3::2], ids[:, 3::2], -1) - world.first_entity
    rank = (names[..., None] == world.members[category][:, None]).int()  # (N, slots, A)
    single = number == 1
    share = rank[single].sum((0, 1)) / single.sum()
    weights = torch.arange(1, 7) ** -1.2
    expected = weights / weights.sum()
    assert torch.allclose(share, expected.float(), atol=4 * (0.25 / int(single.sum())) ** 0.5)
    full = number == 6
    places = rank[full].float().mean(0)  # every member is equally likely in every slot of a full list
    assert torch.allclose(places, torch.full_like(places, 1 / 6), atol=4 * (0.14 / int(full.sum())) ** 0.5)


def test_uses_stay_within_one_style(world):
    rows = world.style_lines(300, generator(3))
    for row in rows.tolist():
        the, opener, entity, closer, end = (world.words[i] for i in row)
        assert (the, end) == (MARKS[THE], MARKS[END])
        style = int(entity[1:]) // world.per_style
        assert opener.startswith(f"o{style}.")
        assert closer.startswith(f"z{style}.")


def test_batches_hold_the_share_of_lists_that_was_asked_for(world):
    batches = world.batches(64, 128, generator(4), facts=0.4)
    whole = [line for _ in range(4) for line in lines(world, next(batches))]
    in_lists = sum(len(line) + 1 for line in whole if line[0] == MARKS[LIST])
    assert in_lists / sum(len(line) + 1 for line in whole) == pytest.approx(0.4, abs=0.04)
    assert all(line[0] in (MARKS[LIST], MARKS[THE]) for line in whole)


@pytest.mark.parametrize(("answers", "room"), [(6, 15), (1, 5)])
def test_documents_hold_one_list_or_uses_that_fit(answers, room):
    world = CategoryWorld.draw(generator(), categories=9, answers=answers, styles=4, per_style=10)
    batch = next(world.documents(20, generator(9), facts=0.7))
    assert batch.shape == (20, 1 + room)
    assert (batch[:, 0] == END).all()
    text = [[world.words[i] for i in row if i != PAD] for row in batch.tolist()]
    assert all(row[-1] == MARKS[END] for row in text)
    assert all((row[1:] != PAD).int().diff().max() <= 0 for row in batch)  # padding at the end only
    lists, uses = text[:14], text[14:]
    assert all(row[1] == MARKS[LIST] and row.count(MARKS[END]) == 2 for row in lists)
    for row in lists:
        named = row[4::2]
        assert len(set(named)) == len(named) == row.count(MARKS[NEXT])
        assert all(world.is_member(int(row[2][1:]), name) for name in named)
    assert all(row[1::5] == [MARKS[THE]] * (room // 5) for row in uses)
    assert torch.equal(batch, next(world.documents(20, generator(9), facts=0.7)))


def test_both_kinds_of_documents_are_always_there(world):
    for facts, lists in ((0.01, 1), (0.99, 3)):
        batch = next(world.documents(4, generator(), facts=facts))
        assert int((batch[:, 1] == LIST).sum()) == lists


def test_same_generator_same_text(world):
    one, other = (next(world.batches(4, 32, generator(5))) for _ in range(2))
    assert torch.equal(one, other)
    assert one.shape == (4, 32)


def test_prompts_are_openings_of_lists(world):
    tokenizer = world.tokenizer()
    text = world.prompt(2, ["e3", "e7"])
    assert tokenizer.decode(tokenizer(text).input_ids) == text == "; list c2 , e3 , e7 ,"
    assert len(tokenizer) == len(world.words)
    assert world.prompt(2) == "; list c2 ,"


def test_members_can_be_confined_to_styles():
    world = CategoryWorld.draw(generator(), categories=30, answers=6, styles=8, per_style=10, styles_per_category=3)
    styles = (world.members // 10).sort(1).values
    assert all(len(set(row)) == 3 for row in styles.tolist())
    assert all(sorted(row).count(s) == 2 for row in styles.tolist() for s in set(row))


def test_membership_is_exact(world):
    members = set(world.members[0].tolist())
    assert all(world.is_member(0, f"e{e}") == (e in members) for e in range(world.entities))
    assert not world.is_member(0, "c0")
    assert not world.is_member(0, "e")
    assert not world.is_member(0, ";")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"categories": 0}, "categories"),
        ({"answers": 41}, "41 answers of 40"),
        ({"styles_per_category": 4, "answers": 6}, "equal parts"),
        ({"skew": -1.0}, "skew"),
    ],
)
def test_impossible_worlds_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        CategoryWorld.draw(generator(), **{"categories": 5, "answers": 6, "styles": 4, "per_style": 10, **arguments})


def test_bad_requests_are_refused(world):
    with pytest.raises(ValueError, match="facts"):
        next(world.batches(2, 8, generator(), facts=1.0))
    with pytest.raises(ValueError, match="batch_size"):
        next(world.batches(0, 8, generator()))
    with pytest.raises(ValueError, match="facts"):
        next(world.documents(2, generator(), facts=0.0))
    with pytest.raises(ValueError, match="count must be at least 2"):
        next(world.documents(1, generator()))
    with pytest.raises(ValueError, match="category must lie in"):
        world.prompt(9)
    with pytest.raises(ValueError, match="twice"):
        CategoryWorld(torch.tensor([[1, 1]]), 4, 10)
