"""UTF-8 cut anywhere: whole characters, the unfinished one at the end, and the characters that it may become."""

import codecs
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

Text = str | bytes

FOLLOWERS = ("", "a", "A", "1", "!", " ", "\n", " a", "e", "l", "t", "\u3042")
"""Continuations that pre-tokenizers tell apart: letters, digits, marks, blanks, line ends, and contractions ('re)."""

FIRST_MARK = "\u0300"
"""No character before this one changes under NFC because of what stands before it."""

UNASSIGNED = 64
"""Characters without a meaning yet that are tried for a class; newer Unicode tables than Python's know some."""

_Class = tuple[bool, bool, bool, bool]
_REPRESENTATIVES: dict[_Class, str] = {}
"""One character of each class, the same for all unfinished ones, so that cuts are remembered."""


def listed(name: str, texts: Any, kinds: tuple[type, ...]) -> tuple[list[Any], bool]:
    """A list of texts, and whether it was one text by itself."""
    wanted = " or ".join(kind.__name__ for kind in kinds)
    if isinstance(texts, kinds):
        return [texts], True
    if isinstance(texts, str | bytes) or not isinstance(texts, Sequence):
        raise TypeError(f"{name} must be {wanted}, or a list of them; got {type(texts).__name__}: {texts!r:.60}")
    for one in texts:
        if not isinstance(one, kinds):
            raise TypeError(f"{name} must hold {wanted} only, got {type(one).__name__}: {one!r:.60}")
    if not texts:
        raise ValueError(f"{name} is an empty list: give at least one text")
    return list(texts), False


def pair_up(text: Any, context: Any) -> tuple[list[bytes], list[bytes], bool]:
    """Texts, a context for each, and whether it was one text by itself; both bytes.

    Raises
    ------
    TypeError
        For anything but bytes.
    ValueError
        If there are not as many contexts as texts.
    """
    texts, single = listed("text", text, (bytes,))
    contexts, one = listed("context", context, (bytes,))
    contexts = contexts * len(texts) if one else contexts
    if len(texts) != len(contexts) or (single and not one):
        raise ValueError(f"there are {len(texts)} texts and {len(contexts)} contexts: give as many, at least one")
    return texts, contexts, single


def whole_characters(text: Text) -> tuple[bytes, bytes]:
    """A text's whole characters and its unfinished last one, as UTF-8.

    Raises
    ------
    TypeError
        If it is no text.
    ValueError
        If no continuation makes it UTF-8.
    """
    if isinstance(text, str):
        return text.encode("utf-8"), b""
    if not isinstance(text, bytes):
        raise TypeError(f"text must be str or bytes, got {type(text).__name__}")
    found = utf8(text)
    if found is None:
        raise ValueError(f"text is not UTF-8: {text[:40]!r}; the model was trained on encoded characters")
    return found[0].encode("utf-8"), found[1]


def utf8(data: bytes) -> tuple[str, bytes] | None:
    """Whole characters and the unfinished one at the end; None if no continuation makes it UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(data)
    except UnicodeDecodeError:
        return None
    return text, decoder.getstate()[0]


def continuation_bytes(data: bytes) -> int:
    """How many bytes at the beginning continue a character that began before."""
    count = 0
    while count < len(data) and data[count] & 0xC0 == 0x80:
        count += 1
    return count


def last_starter(text: str) -> int:
    """Where the last character begins that a mark to come could combine with; 0 if there is none."""
    return next((i for i in range(len(text) - 1, -1, -1) if not unicodedata.combining(text[i])), 0)


def characters(partial: bytes) -> Iterator[str]:
    """The characters whose UTF-8 begins with ``partial``, in the order of their numbers."""
    lead = partial[0]
    length = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    missing = length - len(partial)
    number = lead & (0x7F >> length)
    for byte in partial[1:]:
        number = number << 6 | byte & 0x3F
    for code in range(number << 6 * missing, (number + 1) << 6 * missing):
        lowest = (0x80, 0x800, 0x10000)[length - 2]
        if lowest <= code <= 0x10FFFF and not 0xD800 <= code <= 0xDFFF:
            yield chr(code)


@lru_cache(maxsize=1024)
def followers(partial: bytes) -> tuple[str, ...]:
    """Continuations to try: after an unfinished character, one completion of each class first."""
    if not partial:
        return FOLLOWERS
    classes: dict[_Class, str] = {}
    for character in characters(partial):
        key = _class_of(character)
        classes.setdefault(key, _REPRESENTATIVES.setdefault(key, character))
    return _with_more(classes)


def composed_followers(before: str, partial: bytes, is_normal: Callable[[str], bool]) -> tuple[str, ...]:
    """The same under a normalizer: only completions that it leaves alone after ``before``."""
    steady, doubtful = _by_steadiness(partial)
    classes = dict(steady)
    context = before[last_starter(before) :]
    for key, some in doubtful.items():
        if any(is_normal(context + character) for character in some):
            classes[key] = _REPRESENTATIVES.setdefault(key, some[0])
    return _with_more(classes)


@lru_cache(maxsize=1024)
def _by_steadiness(partial: bytes) -> tuple[dict[_Class, str], dict[_Class, list[str]]]:
    """Classes with a character that NFC leaves alone after any other, and the characters of the other classes."""
    steady: dict[_Class, str] = {}
    doubtful: dict[_Class, list[str]] = {}
    for character in characters(partial):
        key = _class_of(character)
        if key in steady:
            continue
        assigned = unicodedata.category(character) != "Cn"
        alone = not unicodedata.combining(character) and character not in _seconds()
        if assigned and alone and unicodedata.is_normalized("NFC", character):
            steady[key] = _REPRESENTATIVES.setdefault(key, character)
        elif assigned or len(doubtful.get(key, ())) < UNASSIGNED:
            doubtful.setdefault(key, []).append(character)
    return steady, {key: some for key, some in doubtful.items() if key not in steady}


@lru_cache(maxsize=1)
def _seconds() -> frozenset[str]:
    """Characters that some other one composes with when they come after it."""
    found = {chr(code) for code in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))}
    for code in range(0x110000):
        parts = unicodedata.decomposition(chr(code)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            found.add(chr(int(parts[1], 16)))
    return frozenset(found)


def _class_of(character: str) -> _Class:
    return (character.isalpha(), character.isnumeric(), character.isspace(), character.isupper())


def _with_more(classes: dict[_Class, str]) -> tuple[str, ...]:
    return tuple(character + more for character in classes.values() for more in ("", "a", " "))
