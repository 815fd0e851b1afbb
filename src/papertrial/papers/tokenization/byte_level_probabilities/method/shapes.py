"""Token texts that a pre-tokenizer cannot tell apart, so that it is asked once for all of them.

A pattern sees a character only through the classes and literals that are written in it. Two texts whose characters
agree in all of these are cut alike after the same beginning: `` retrieve`` and `` children`` are one *shape*. Letters
that a pattern names behind an apostrophe (``'re``) count only there.
"""

import re
from collections.abc import Sequence
from typing import Any

from tokenizers import Regex, pre_tokenizers

_BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The pattern that the library's byte-level pre-tokenizer has built in."""

_CONTRACTED = re.compile(r"'([A-Za-z]{1,3})(?=[|)]|$)|(?<=')\(\?i:\[([a-z]+)\]((?:\|[a-z]{1,3})*)\)")
"""'re, and '(?i:[sdmt]|ll|ve|re) as a whole."""

_CLASS = re.compile(r"\\[pP]\{\^?\w+\}|\\[pP][A-Z]|\\[sSdDwWhH]|\[:\^?[a-z]+:\]")
_LITERAL = re.compile(r"\\([rntfv])|\\([^\w\s])")
_CONTROL = {"r": "\r", "n": "\n", "t": "\t", "f": "\f", "v": "\v"}
_QUIET = re.compile(r"\(\?(?::|i:|!|=|>)|\{\d*,?\d*\}|[()|?*+^$]")
QUOTES = "'\u2019"


class UnknownPattern(ValueError):
    """A pre-tokenizer whose way to look at characters is not known here."""


class Alphabet:
    """What the patterns of a pre-tokenizer see of a character.

    Parameters
    ----------
    parts
        The pre-tokenizer's parts, as in :attr:`TokenBytes.pre_tokenizers`.
    characters
        All characters that will be asked for.

    Attributes
    ----------
    reach : how many characters behind an apostrophe a contraction may have.

    Raises
    ------
    UnknownPattern
        For parts and pattern constructs other than those of published decoders.
    """

    def __init__(self, parts: Sequence[dict[str, Any]], characters: set[str]) -> None:
        self._classes: set[str] = set()
        self._literals: set[str] = set(QUOTES)
        self._ranges: set[tuple[str, str]] = set()
        self._contracted: set[str] = set()
        self.reach = 0
        for part in parts:
            self._read_part(part)
        joined = "".join(sorted(characters))
        outside = [set(_rest(name, joined)) for name in sorted(self._classes)]
        self._signs: dict[str, object] = {}
        known: dict[object, object] = {}
        for character in characters:
            seen = tuple(character in rest for rest in outside)
            seen += tuple(low <= character <= high for low, high in sorted(self._ranges))
            sign = (seen, character if character in self._literals else "")
            self._signs[character] = known.setdefault(sign, len(known))

    def shape(self, text: str, *, after_quote: bool) -> tuple[object, ...]:
        """What is seen of a text; ``after_quote``: an apostrophe may stand just before it."""
        left = self.reach if after_quote else 0
        found: list[object] = []
        for character in text:
            sign = self._signs.get(character, character)
            named = left > 0 and character.casefold() in self._contracted
            found.append((sign, character.casefold()) if named else sign)
            left = self.reach if character in QUOTES else left - 1
        return tuple(found)

    def _read_part(self, part: dict[str, Any]) -> None:
        if part["type"] == "ByteLevel":
            if part.get("use_regex", True):
                self._read(_BYTE_LEVEL)
        elif part["type"] == "Digits":
            self._classes.add(r"\p{N}")
        elif part["type"] == "Metaspace":
            self._literals |= {" ", "\u2581"}
        elif part["type"] == "Split" and "String" in part["pattern"]:
            self._literals |= set(part["pattern"]["String"])
        elif part["type"] == "Split":
            self._read(part["pattern"]["Regex"])
        else:
            raise UnknownPattern(part["type"])

    def _read(self, pattern: str) -> None:
        """Collect the classes, literals and ranges of a pattern."""
        folded = "(?i" in _CONTRACTED.sub("'", pattern.replace("(?i:'", "(?:'"))
        at, inside, begins = 0, False, 0
        while at < len(pattern):
            quoted = None if inside else _CONTRACTED.match(pattern, at)
            found = _CLASS.match(pattern, at)
            escaped = _LITERAL.match(pattern, at)
            quiet = None if inside else _QUIET.match(pattern, at)
            if pattern.startswith("(?<", at):
                raise UnknownPattern(pattern)  # what lies before a piece would matter
            if quoted:
                self._read_contraction(quoted)
                at = quoted.end()
            elif found:
                self._classes.add(found[0])
                at = found.end()
            elif not inside and pattern[at] == "[":
                inside, at = True, at + 1 + pattern.startswith("^", at + 1)
                begins = at
            elif inside and pattern[at] == "]" and at > begins:
                inside, at = False, at + 1
            elif quiet:
                at = quiet.end()
            elif not inside and pattern[at] == ".":
                self._literals.add("\n")
                at += 1
            else:
                at = self._read_literal(pattern, at, escaped, inside, folded)

    def _read_contraction(self, quoted: "re.Match[str]") -> None:
        self._literals.add("'")
        endings = [quoted[1]] if quoted[1] else [*quoted[2], *quoted[3].split("|")]
        self._contracted |= set("".join(endings).casefold())
        self.reach = max(self.reach, *map(len, endings))

    def _read_literal(self, pattern: str, at: int, escaped: "re.Match[str] | None", inside: bool, folded: bool) -> int:
        """One literal, or a range that begins with it; where it ends."""
        character = pattern[at] if escaped is None else escaped[2] or _CONTROL[escaped[1]]
        end = at + 1 if escaped is None else escaped.end()
        nested = inside and (pattern[at] == "[" or pattern.startswith("&&", at))
        if nested or (escaped is None and pattern[at] == "\\") or (folded and character.isalpha()):
            raise UnknownPattern(pattern)
        if inside and pattern[end : end + 1] == "-" and pattern[end + 1 : end + 2] not in ("]", "\\", "["):
            self._ranges.add((character, pattern[end + 1]))
            return end + 2
        if inside and pattern[end : end + 1] == "-" and pattern[end + 1 : end + 2] != "]":
            raise UnknownPattern(pattern)
        self._literals.add(character)
        return end


def _rest(name: str, characters: str) -> str:
    """The characters outside a class, as the engine that cuts the texts sees it."""
    pattern = Regex(f"[{name}]" if name.startswith("[:") else name)
    return "".join(piece for piece, _ in pre_tokenizers.Split(pattern, "removed").pre_tokenize_str(characters))
