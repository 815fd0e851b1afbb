"""Excerpts of a text around what was searched for, with the words marked."""

import re

from markupsafe import Markup, escape

LONGEST = 300
#: Words that are in every text; marking them would hide the others.
_COMMON = frozenset((
    "a", "an", "and", "are", "as", "at", "be", "by", "can", "do", "for", "from", "how", "in",
    "is", "it", "of", "on", "or", "that", "the", "this", "to", "what", "why", "with",
))  # fmt: skip
_WORD = re.compile(r"\w+(?:[-'’]\w+)*")
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\"“(])")


def searched_words(query: str) -> tuple[str, ...]:
    """The words of a query that are worth marking, in lower case, each once; a plural stands for its singular too."""
    found = (word.lower() for word in _WORD.findall(query))
    return tuple(
        dict.fromkeys(word.removesuffix("s") if len(word) > 3 else word for word in found if word not in _COMMON)
    )


def excerpt(text: str, words: tuple[str, ...]) -> Markup:
    """The part of a text that begins with the sentence that has most of the words, and the words in it marked.

    Parameters
    ----------
    text
        Plain text; whatever it holds is escaped.
    words
        From `searched_words`; a word of the text is marked where it begins with one of them.

    Returns
    -------
    Markup
        At most `LONGEST` characters of the text, cut between words, with an ellipsis on either side that was cut.
    """
    start = _best_start(text, words)
    shown = text[start:]
    cut = len(shown) > LONGEST
    if cut:
        shown = shown[:LONGEST].rsplit(" ", 1)[0].rstrip(" ,;:.")
    ellipsis = Markup("\N{NO-BREAK SPACE}…")
    return (
        (Markup("…\N{NO-BREAK SPACE}") if start else Markup()) + _marked(shown, words) + (ellipsis if cut else Markup())
    )


def _best_start(text: str, words: tuple[str, ...]) -> int:
    """Where the sentence begins that has most of the words; the first of them where several have."""
    if len(text) <= LONGEST or not words:
        return 0
    starts = [0, *(match.end() for match in _SENTENCE.finditer(text))]
    ends = [*starts[1:], len(text)]

    def number(place: int) -> int:
        sentence = [word.lower() for word in _WORD.findall(text[starts[place] : ends[place]])]
        return sum(any(word.startswith(wanted) for word in sentence) for wanted in words)

    best = max(range(len(starts)), key=lambda place: (number(place), -place))
    while best and len(text) - starts[best] < LONGEST * 2 // 3:  # an excerpt of a few words says little
        best -= 1
    return starts[best]


def _marked(text: str, words: tuple[str, ...]) -> Markup:
    made, at = Markup(), 0
    for match in _WORD.finditer(text):
        if match[0].lower().startswith(words) and words:
            made += escape(text[at : match.start()]) + Markup("<mark>{}</mark>").format(match[0])
            at = match.end()
    return made + escape(text[at:])
