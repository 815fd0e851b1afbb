"""What a search shows of a text: the part that it found, escaped, with the words marked."""

import html
import re

from hypothesis import given
from hypothesis import strategies as st

from papertrial.site.pages.excerpts import LONGEST, excerpt, searched_words

TEXT = (
    "Sheep are counted at night. Nobody has asked why that helps, and the literature is thin on the matter of lambs, "
    "rams and shepherds who stay awake for reasons of their own. We train a small model on fences. "
    "The attention of a fence is drawn to the gate, and attention heads at the gate see every animal that leaps. "
    "Ablating them lets the flock through uncounted, which shows that the count is kept nowhere else in the field. "
    "A second experiment repeats this with goats and finds the same to within one animal of a hundred."
)


def plain(markup: str) -> str:
    return html.unescape(re.sub(r"</?mark>", "", markup))


def test_the_excerpt_begins_with_the_sentence_that_has_most_of_the_words() -> None:
    shown = str(excerpt(TEXT, searched_words("attention heads at a gate")))
    assert plain(shown).startswith("…\N{NO-BREAK SPACE}The attention of a fence")
    assert re.findall("<mark>(.*?)</mark>", shown) == ["attention", "gate", "attention", "heads", "gate"]


def test_words_are_marked_by_their_beginning_and_common_ones_never() -> None:
    assert searched_words("What are the Effects of pruning in LLMs?") == ("effect", "pruning", "llm")
    shown = str(excerpt("The effective LLM is affected by it.", searched_words("the effects of LLMs")))
    assert shown == "The <mark>effective</mark> <mark>LLM</mark> is affected by it."


def test_without_words_the_text_begins_at_its_beginning() -> None:
    assert plain(str(excerpt(TEXT, ()))).startswith("Sheep are counted")
    assert str(excerpt("Short.", ())) == "Short."
    assert str(excerpt("", searched_words("sheep"))) == ""


@given(st.text(max_size=900), st.text(max_size=60))
def test_whatever_the_text_and_the_query_hold_only_marks_are_markup(text: str, query: str) -> None:
    shown = str(excerpt(text, searched_words(query)))
    assert re.findall(r"<(?!/?mark>)", shown) == []
    inner = plain(shown).removeprefix("…\N{NO-BREAK SPACE}").removesuffix("\N{NO-BREAK SPACE}…")
    assert inner in text
    assert len(inner) <= LONGEST
