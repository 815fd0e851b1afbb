"""Corpora from text that every installation carries, free of repetition, split by document.

``prose`` is the language reference of ``help()`` and the docstrings of the standard library, ``code`` its sources; the
rest are docstrings of packages that this project depends on. None of the text is shipped: it is read from the
installation, so it depends on the versions installed, and the digest says which text a figure was measured on.

What the splits promise
-----------------------
- A document's split depends on its name alone (a hash), so it does not move when other documents come or go.
- No line of 40 characters or more (spaces and case aside) of a held-out document stands in the training documents, nor
  one of the test documents in the validation documents; in ``code``, where idioms recur, up to a tenth of a held-out
  statement's long lines may. Of text that repeats within a split, the first occurrence stays.
- A shipped model carries hashes of the lines that it was trained on. ``unseen_by`` drops from any documents, be they
  of another Python version or of another corpus, what such a model saw, and ``assert_disjoint`` makes sure of it.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from papertrial.errors import UsageError
from papertrial.lm import sources
from papertrial.lm.batches import RandomBatches, encode, random_batches, token_windows

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Corpus",
    "Document",
    "RandomBatches",
    "assert_disjoint",
    "corpus",
    "deduplicate",
    "digest",
    "encode",
    "line_hashes",
    "long_lines",
    "random_batches",
    "split_of",
    "token_windows",
    "unseen",
    "unseen_by",
]

Split = Literal["train", "valid", "test"]

RECIPE = 2
"""Raised when the extraction changes, so that cached corpora are made anew."""

SHARES = {"test": 0.10, "valid": 0.08}
"""Shares of the documents that are held out; the rest is for training."""

LONG_LINE = 40
"""Characters from which a line counts as text of its own when repetition is looked for."""

PACKAGES = {
    "prose": ("stdlib",),
    "code": ("stdlib",),
    "library-prose": ("numpy", "scipy", "sympy", "networkx", "mpmath"),
    "framework-prose": (
        "torch", "transformers", "matplotlib", "sqlalchemy", "huggingface_hub", "fontTools", "accelerate", "pydantic",
        "alembic", "rich", "joblib", "fsspec", "jinja2", "httpx", "pip",
    ),
}  # fmt: skip
"""The corpora and the packages whose files they are read from; packages that are not installed are left out."""


@dataclass(frozen=True)
class Document:
    """A module's documentation or source, or a topic of the reference. ``pieces`` are its paragraphs or statements."""

    name: str
    pieces: tuple[str, ...]
    separator: str = "\n\n"

    @property
    def text(self) -> str:
        return self.separator.join(self.pieces)


@dataclass(frozen=True)
class Corpus:
    """Documents in the order of their names, repetition removed.

    Attributes
    ----------
    name : the corpus, or several joined by ``+``.
    everything : all documents of all splits.
    versions : of the packages that the text was read from.
    """

    name: str
    everything: tuple[Document, ...]
    versions: dict[str, str]

    def documents(self, split: Split) -> list[Document]:
        """The documents of ``train``, ``valid`` or ``test``.

        Raises
        ------
        ValueError
            For another split.
        """
        if split not in get_args(Split):
            raise ValueError(f"split must be train, valid or test; got {split!r}")
        return [document for document in self.everything if split_of(document.name) == split]

    def texts(self, split: Split) -> list[str]:
        """The texts of a split's documents."""
        return [document.text for document in self.documents(split)]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names and texts."""
        return digest(self.everything)


def corpus(name: str) -> Corpus:
    """A corpus by name: ``prose``, ``code``, ``library-prose``, ``framework-prose``, or several joined by ``+``.

    Joined corpora are freed of repetition together, so that the held-out documents of each are disjoint from the
    training documents of all. The first call reads the installation (seconds to a minute); later ones read a cache
    under the state folder.

    Raises
    ------
    UsageError
        For an unknown corpus, or one of which nothing is installed.
    """
    names = name.split("+")
    for part in names:
        if part not in PACKAGES:
            raise UsageError(f"no corpus {part!r}; there are {', '.join(PACKAGES)} (join several with '+')")
    if len(set(names)) != len(names):
        raise UsageError(f"corpus {name!r} names a part twice")
    if "code" in names and len(names) > 1:
        raise UsageError("the corpus 'code' holds the docstrings of 'prose'; it cannot be joined with others")
    return _corpus("+".join(names))


@lru_cache(maxsize=8)
def _corpus(name: str) -> Corpus:
    packages = [p for part in name.split("+") for p in PACKAGES[part] if sources.installed(p)]
    if not packages:
        raise UsageError(f"nothing of the corpus {name!r} is installed here")
    versions = {package: sources.package_version(package) for package in packages}
    path = _cache_path(name, versions)
    documents = _read(path)
    if documents is None:
        code = name == "code"
        raw = code_documents(packages) if code else prose_documents(packages)
        documents = deduplicate(raw, tolerance=0.1 if code else 0.0)
        _write(path, documents)
    return Corpus(name, tuple(documents), versions)


def prose_documents(packages: Sequence[str]) -> list[Document]:
    """One document per module with docstrings and, for the standard library, per topic of the reference; repetitive."""
    documents = []
    for package in packages:
        if package == "stdlib":
            for topic, text in sources.topics():
                documents.append(_prose(f"stdlib:topic:{topic}", [text]))
        texts: dict[str, list[str]] = {}
        for docstring in sources.docstrings(package):
            texts.setdefault(docstring.module, []).append(docstring.text)
        documents += [_prose(f"{package}:{module}", parts) for module, parts in texts.items()]
    return [document for document in documents if document.pieces]


def _prose(name: str, texts: Iterable[str]) -> Document:
    return Document(name, tuple(p for text in texts for p in sources.paragraphs(sources.clean_prose(text))))


def code_documents(packages: Sequence[str]) -> list[Document]:
    """One document per module, in top-level statements; repetitive."""
    return [
        Document(f"{package}:{module}", tuple(sources.statements(source)), separator="")
        for package in packages
        for module, source in sources.modules(package)
        if source.strip()
    ]


def split_of(name: str) -> Split:
    """The split of a document by its name: a hash, the same everywhere and for ever."""
    place = int.from_bytes(hashlib.sha256(f"split/{name}".encode()).digest()[:6], "big") / 2**48
    if place < SHARES["test"]:
        return "test"
    return "valid" if place < SHARES["test"] + SHARES["valid"] else "train"


# -- repetition --------------------------------------------------------------------------------------------------


_SPACE = re.compile(r"\s+")


def _key(line: str) -> str:
    return _SPACE.sub(" ", line).strip().casefold()


def long_lines(text: str) -> list[str]:
    """The lines of 40 characters or more, spaces and case evened out."""
    return [key for line in text.split("\n") if len(key := _key(line)) >= LONG_LINE]


def deduplicate(documents: Iterable[Document], *, tolerance: float = 0.0) -> list[Document]:
    """Remove repetition, training documents first, so that what is held out is new; documents come back by name.

    Of the long lines of a piece, counted by characters: a piece goes if half of them stood before in its own split, and
    a held-out piece if more than ``tolerance`` of them stand in a split before its own (train, valid, test). Pieces too
    short to hold a long line stay: they are headings and calls. Documents with nothing left are dropped.
    """
    by_split: dict[str, list[Document]] = {"train": [], "valid": [], "test": []}
    for document in sorted(documents, key=lambda d: d.name):
        by_split[split_of(document.name)].append(document)
    earlier: set[str] = set()
    result = []
    for split in ("train", "valid", "test"):
        own: set[str] = set()
        for document in by_split[split]:
            kept = []
            for piece in document.pieces:
                lines = long_lines(piece)
                if lines and (_share(lines, earlier) > tolerance or _share(lines, own) >= 0.5):
                    continue
                own.update(lines)
                kept.append(piece)
            if kept:
                result.append(Document(document.name, tuple(kept), document.separator))
        earlier |= own
    return sorted(result, key=lambda d: d.name)


def _share(lines: Sequence[str], seen: "set[str]") -> float:
    return sum(len(line) for line in lines if line in seen) / sum(map(len, lines))


# -- what a model saw --------------------------------------------------------------------------------------------


def line_hashes(documents: Iterable[Document]) -> "NDArray[np.uint64]":
    """Sorted 64-bit hashes of all long lines (L,): eight bytes a line that say whether it was seen."""
    found = {_hash(line) for document in documents for piece in document.pieces for line in long_lines(piece)}
    return np.array(sorted(found), dtype=np.uint64)


def _hash(line: str) -> int:
    return int.from_bytes(hashlib.sha256(line.encode()).digest()[:8], "big")


def unseen(documents: Iterable[Document], seen: "NDArray[np.uint64]") -> list[Document]:
    """The documents without the pieces that hold a line of ``seen`` (``line_hashes``); empty ones are dropped."""
    table = set(seen.tolist())
    result = []
    for document in documents:
        kept = tuple(p for p in document.pieces if not any(_hash(line) in table for line in long_lines(p)))
        if kept:
            result.append(Document(document.name, kept, document.separator))
    return result


def unseen_by(model: str, documents: Iterable[Document]) -> list[Document]:
    """The documents without what a house model (``house:prose``) was trained on, whatever version they come from."""
    import papertrial.lm.house as house

    return unseen(documents, house.seen_lines(model))


def assert_disjoint(one: "str | Iterable[Document]", other: "str | Iterable[Document]") -> None:
    """Raise unless two bodies of text share no long line; each is a house model's name or documents.

    Raises
    ------
    ValueError
        With the number of lines in common.
    """
    import papertrial.lm.house as house

    first, second = (house.seen_lines(x) if isinstance(x, str) else line_hashes(x) for x in (one, other))
    common = len(np.intersect1d(first, second))
    if common:
        raise ValueError(f"{common} lines of {LONG_LINE} characters or more stand in both")


def digest(documents: Iterable[Document]) -> str:
    """SHA-256 over names and texts."""
    total = hashlib.sha256()
    for document in documents:
        for part in (document.name, document.text):
            data = part.encode("utf-8", "surrogatepass")
            total.update(len(data).to_bytes(8, "big") + data)
    return total.hexdigest()


# -- cache -------------------------------------------------------------------------------------------------------


def _cache_path(name: str, versions: dict[str, str]) -> Path:
    from papertrial.home import cache_folder

    key = hashlib.sha256(json.dumps([RECIPE, name, versions, SHARES, LONG_LINE]).encode()).hexdigest()[:16]
    return cache_folder("corpora") / f"{name}-{key}.json"


def _read(path: Path) -> list[Document] | None:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        documents = [Document(name, tuple(pieces), state["separator"]) for name, pieces in state["documents"]]
        return documents if digest(documents) == state["digest"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent or damaged: read the installation again


def _write(path: Path, documents: Sequence[Document]) -> None:
    state = {
        "separator": documents[0].separator if documents else "\n\n",
        "digest": digest(documents),
        "documents": [[document.name, document.pieces] for document in documents],
    }
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(state), encoding="utf-8")
    temporary.replace(path)
