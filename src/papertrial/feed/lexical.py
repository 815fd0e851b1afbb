"""The lexical half of search: BM25 over titles, abstracts and authors on tantivy, and exact look-up of names.

Queries are built from analysed words, never parsed: no character of a query has a meaning of its own.
"""

import datetime
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import tantivy

STATE = "state"  # the one document that says which revision a commit holds
_ANALYSER = "papertrial_english"
_MAX_WORDS = 32  # the rarest words of a longer query decide its ranking; the rest only cost time
_HEAP_BYTES = 192_000_000
# Function words: they say nothing of a paper, and their posting lists are the longest.
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a about all also am an and any are as at be been being between both but by can could did do does done
        during each for from had has have having he her here him his how i if in into is it its itself just let
        may me might more most must my no nor not of on once only or other our out over own s same shall she
        should so some such t than that the their them then there these they this those through to too under
        until up us very via was we were what when where whether which while who whom whose why will with within
        without would you your
        """,
    )
)
_ARXIV = re.compile(
    r"(?:arxiv\s*:\s*|(?:https?://)?(?:www\.|export\.)?[a-z0-9.-]+/(?:abs|pdf|html|papers|paper|list)/)?"
    r"(?P<id>\d{4}\.\d{4,5}|[a-z][a-z-]*(?:\.[a-z]{2})?/\d{7})(?:v\d{1,3})?(?:\.pdf|\.md)?/?(?:[?#]\S*)?",
    re.IGNORECASE,
)


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Document:
    """What search needs of a paper. ``slug`` is set for the papers in scope only."""

    key: int
    title: str
    abstract: str = ""
    authors: tuple[str, ...] = ()
    arxiv_id: str | None = None
    slug: str | None = None
    family: str | None = None
    published: datetime.date | None = None

    def __post_init__(self) -> None:
        if isinstance(self.key, bool) or not isinstance(self.key, int) or not 0 <= self.key < 2**63:
            raise ValueError(f"key is {self.key!r}; an integer from 0 to 2**63 - 1 is needed")


@dataclass(frozen=True, slots=True)
class Filters:
    """Which papers a search may return; None leaves a side open. Undated papers pass no date filter."""

    families: Collection[str] | None = None
    since: datetime.date | None = None
    until: datetime.date | None = None
    in_scope: bool | None = None
    keys: Collection[int] | None = None

    @property
    def empty(self) -> bool:
        return self == Filters()


def normal_arxiv_id(query: str) -> str | None:
    """The arXiv id, without its version, that the whole query is (bare, ``arXiv:``, or an address), else None."""
    match = _ARXIV.fullmatch(query.strip())
    return match["id"].lower() if match else None


@lru_cache(maxsize=1)
def _analyser() -> tantivy.TextAnalyzer:
    filters = (
        tantivy.Filter.remove_long(60),
        tantivy.Filter.lowercase(),
        tantivy.Filter.ascii_fold(),
        tantivy.Filter.stemmer("english"),
    )
    builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
    for step in filters:
        builder = builder.filter(step)
    return builder.build()


def readable(text: str) -> str:
    """Text that every engine takes: composed, lone surrogates replaced and control characters made blanks."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text.encode("utf-8", "replace").decode("utf-8"))
    return _CONTROL.sub(" ", text)


def words(text: str) -> list[str]:
    """The stemmed words of a text, in order, as the index holds them."""
    return list(_analyser().analyze(readable(text)))


def query_words(query: str) -> list[str]:
    """The distinct words of a query that select papers: function words only where there is nothing else."""
    plain = re.findall(r"\w+", readable(query))
    telling = [word for word in plain if word.lower() not in _FUNCTION_WORDS]
    return list(dict.fromkeys(words(" ".join(telling or plain))))


def _exact_names(document: Document) -> list[str]:
    names = [f"title {' '.join(words(document.title))}"]
    if document.arxiv_id:
        names.append(f"arxiv {normal_arxiv_id(document.arxiv_id) or document.arxiv_id.lower()}")
    if document.slug:
        names.append(f"slug {document.slug.lower()}")
    return names


def _query_names(query: str) -> list[str]:
    query = readable(query).strip()
    slug = query.lower()
    names = [f"slug {slug}", "slug " + re.sub(r"[\s-]+", "_", slug), "slug " + re.sub(r"[\s_]+", "-", slug)]
    arxiv_id = normal_arxiv_id(query)
    if arxiv_id:
        names.append(f"arxiv {arxiv_id}")
    title = " ".join(words(query))
    if title:
        names.append(f"title {title}")
    return names


def _schema() -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    builder.add_integer_field("key", indexed=True, fast=True)
    builder.add_text_field("text", tokenizer_name=_ANALYSER, index_option="freq")
    builder.add_text_field("authors", tokenizer_name=_ANALYSER, index_option="freq")
    builder.add_text_field("exact", tokenizer_name="raw", index_option="basic")
    builder.add_text_field("family", tokenizer_name="raw", index_option="basic")
    builder.add_integer_field("published", indexed=True, fast=True)
    builder.add_integer_field("scope", indexed=True, fast=True)
    builder.add_text_field(STATE, stored=True, tokenizer_name="raw", index_option="basic")
    builder.add_text_field("content", stored=True, tokenizer_name="raw", index_option="basic")
    return builder.build()


class LexicalSnapshot:
    """One committed state of the index: it does not change under a reader."""

    def __init__(self, searcher: tantivy.Searcher, schema: tantivy.Schema) -> None:
        self._searcher, self._schema = searcher, schema

    def state(self) -> str | None:
        """The text stored with the commit, None in an index that was never committed."""
        query = tantivy.Query.term_query(self._schema, STATE, "current", "basic")
        hits = self._searcher.search(query, limit=1, count=False).hits
        return None if not hits else str(self._searcher.doc(hits[0][1])["content"][0])

    def __len__(self) -> int:
        return max(0, int(self._searcher.num_docs) - 1)  # without the state document

    def _term(self, field: str, value: Any, option: str = "basic") -> tantivy.Query:
        return tantivy.Query.term_query(self._schema, field, value, option)

    def _restricted(self, query: tantivy.Query, filters: Filters) -> tantivy.Query:
        must, query_class = tantivy.Occur.Must, tantivy.Query
        clauses: list[tantivy.Query] = []
        if filters.families is not None:
            clauses.append(query_class.term_set_query(self._schema, "family", sorted(set(filters.families))))
        if filters.since is not None or filters.until is not None:
            lowest = filters.since.toordinal() if filters.since else 1
            highest = filters.until.toordinal() if filters.until else None
            clauses.append(
                query_class.range_query(self._schema, "published", tantivy.FieldType.Integer, lowest, highest)
            )
        if filters.in_scope is not None:
            clauses.append(self._term("scope", int(filters.in_scope)))
        if filters.keys is not None:
            clauses.append(query_class.term_set_query(self._schema, "key", sorted(set(filters.keys))))
        silent = [(must, query_class.const_score_query(clause, 0.0)) for clause in clauses]
        return query_class.boolean_query([(must, query), *silent]) if silent else query

    def _found(self, query: tantivy.Query, limit: int, filters: Filters) -> list[tuple[int, float]]:
        hits = self._searcher.search(self._restricted(query, filters), limit=limit, count=False).hits
        keys = self._searcher.fast_field_values("key", [address for _, address in hits])
        found = [(int(key or 0), float(score)) for key, (score, _) in zip(keys, hits, strict=True)]
        return sorted(found, key=lambda hit: (-hit[1], hit[0]))

    def exact(self, query: str, limit: int, filters: Filters) -> list[int]:
        """Keys of the papers whose arXiv id, slug or whole title the query is, by key."""
        names = [(tantivy.Occur.Should, self._term("exact", name)) for name in dict.fromkeys(_query_names(query))]
        return sorted(key for key, _ in self._found(tantivy.Query.boolean_query(names), limit, filters))

    def search(self, query: str, limit: int, filters: Filters) -> list[tuple[int, float]]:
        """The best (key, BM25 score), best first, ties by key; empty where no word of the query occurs.

        Parameters
        ----------
        query : str
            Any text.
        limit : int
            At least 1.
        filters : Filters
        """
        frequent, names = [], []
        for word in query_words(query):
            in_texts, in_names = self._searcher.doc_freq("text", word), self._searcher.doc_freq("authors", word)
            if in_texts:
                frequent.append((in_texts, word))
            # a word that is more of a name than a word: "long context" asks for no author called Long
            if in_names > in_texts:
                names.append(word)
        rarest = [word for _, word in sorted(frequent)[:_MAX_WORDS]]
        terms = [self._term("text", word, "freq") for word in rarest]
        terms += [self._term("authors", word, "freq") for word in names[:_MAX_WORDS]]
        if not terms:
            return []
        return self._found(
            tantivy.Query.boolean_query([(tantivy.Occur.Should, term) for term in terms]), limit, filters
        )


class LexicalIndex:
    """A tantivy index in a folder: many readers, one writer at a time across processes.

    Raises
    ------
    ValueError
        The folder holds something that is not such an index (from tantivy).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._schema = _schema()
        self._index = tantivy.Index(self._schema, path=str(folder), reuse=True)
        self._index.register_tokenizer(_ANALYSER, _analyser())
        self._index.config_reader("Manual")
        self._writer: Any = None

    def snapshot(self) -> LexicalSnapshot:
        """The newest committed state."""
        self._index.reload()
        return LexicalSnapshot(self._index.searcher(), self._schema)

    def begin(self) -> None:
        """Take the write lock; ValueError (from tantivy) if another process holds it."""
        if self._writer is None:
            self._writer = self._index.writer(heap_size=_HEAP_BYTES, num_threads=1)
            # a killed writer leaves files whose names the next commit would take again, and fail on
            self._writer.garbage_collect_files()

    def remove(self, keys: Iterable[int]) -> None:
        self.begin()
        for key in keys:
            self._writer.delete_documents_by_term("key", key)

    def add(self, documents: Sequence[Document]) -> None:
        """Add documents in place of those with the same keys; visible after :meth:`commit`."""
        self.remove(document.key for document in documents)
        for document in documents:
            made = tantivy.Document()
            made.add_integer("key", document.key)
            # one field: counting title words more lowers MRR@10, see benchmarks/search_quality.py
            made.add_text("text", readable(f"{document.title} {document.abstract}"))
            made.add_text("authors", readable(" ".join(document.authors)))
            for name in _exact_names(document):
                made.add_text("exact", name)
            if document.family:
                made.add_text("family", document.family)
            made.add_integer("published", document.published.toordinal() if document.published else 0)
            made.add_integer("scope", int(document.slug is not None))
            self._writer.add_document(made)

    def clear(self) -> None:
        """Remove every document; visible after :meth:`commit`."""
        self.begin()
        self._writer.delete_all_documents()

    def commit(self, state: str) -> None:
        """Make all changes and ``state`` visible at once: the state is a document of the same commit."""
        self.begin()
        self._writer.delete_documents_by_term(STATE, "current")
        made = tantivy.Document()
        made.add_text(STATE, "current")
        made.add_text("content", state)
        self._writer.add_document(made)
        self._writer.commit()
        writer, self._writer = self._writer, None
        writer.wait_merging_threads()  # ends the writer and gives the lock back

    def rollback(self) -> None:
        """Forget what was not committed and give the lock back."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.rollback()
            writer.wait_merging_threads()
