"""Questions and the texts that answer them, from docstrings: the summary line asks, the rest of the docstring answers.

Real sentences with a known right answer in a corpus where many texts are alike (methods of one module), for trials of
retrieval. To be split by module, so that no trained retriever has seen the neighbours of what it is tested on.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from papertrial.errors import UsageError
from papertrial.lm import sources


@dataclass(frozen=True)
class DocstringPair:
    """``query`` is the first paragraph of a docstring, ``document`` the rest, both on one line; and whose it is."""

    query: str
    document: str
    package: str
    module: str
    name: str


def docstring_pairs(
    packages: Sequence[str] = ("stdlib",),
    *,
    query_words: tuple[int, int] = (4, 25),
    document_words: tuple[int, int] = (15, 200),
) -> list[DocstringPair]:
    """All pairs of some packages, in the order of the sources.

    Parameters
    ----------
    packages
        ``stdlib`` and names of installed packages, read as text and never imported.
    query_words, document_words
        Fewest and most words; docstrings outside are left out, none is cut.

    Returns
    -------
    list
        No two pairs share a query or a document (spaces and case aside); the first of equals stays.

    Raises
    ------
    UsageError
        For a package that is not installed.
    """
    return list(_pairs(tuple(packages), tuple(query_words), tuple(document_words)))


def split_by_module(
    pairs: Sequence[DocstringPair], held_out: int, generator: np.random.Generator
) -> tuple[list[DocstringPair], list[DocstringPair]]:
    """Training pairs, and at least ``held_out`` pairs of modules of which no pair is left for training.

    Modules are drawn at random; both parts keep the order of ``pairs``.

    Raises
    ------
    ValueError
        If nothing would be left to train on.
    """
    modules = sorted({(pair.package, pair.module) for pair in pairs})
    chosen: set[tuple[str, str]] = set()
    count = 0
    sizes = dict.fromkeys(modules, 0)
    for pair in pairs:
        sizes[pair.package, pair.module] += 1
    for place in generator.permutation(len(modules)):
        if count >= held_out:
            break
        chosen.add(modules[place])
        count += sizes[modules[place]]
    if held_out < 1 or count >= len(pairs):
        raise ValueError(
            f"held_out must lie between 1 and what leaves modules of the {len(pairs)} pairs, got {held_out}"
        )
    parts: tuple[list[DocstringPair], list[DocstringPair]] = ([], [])
    for pair in pairs:
        parts[(pair.package, pair.module) in chosen].append(pair)
    return parts


@lru_cache(maxsize=4)
def _pairs(
    packages: tuple[str, ...], query_words: tuple[int, ...], document_words: tuple[int, ...]
) -> list[DocstringPair]:
    found, seen = [], set()
    for package in packages:
        if not sources.installed(package):
            raise UsageError(f"the package {package!r} is not installed, so its docstrings cannot be read")
        for docstring in sources.docstrings(package):
            blocks = sources.paragraphs(sources.clean_prose(docstring.text))
            if len(blocks) < 2:
                continue
            query, document = _line(blocks[0]), _line(" ".join(blocks[1:]))
            if not _within(query, query_words) or not _within(document, document_words):
                continue
            if query.casefold() in seen or document.casefold() in seen:
                continue
            seen |= {query.casefold(), document.casefold()}
            found.append(DocstringPair(query, document, package, docstring.module, docstring.name))
    return found


def _line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _within(text: str, words: tuple[int, ...]) -> bool:
    return words[0] <= len(text.split()) <= words[1]
