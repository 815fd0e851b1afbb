"""How well search ranks: BM25 alone, meaning alone and several fusions of the two on the same questions.

    python benchmarks/search_quality.py

Beside them stands the ranker xtr: token retrieval with the sentence encoder's own tokens, and with those of the encoder
trained here if there is one.

Questions are in ``benchmarks/queries/*.tsv`` (slug, kind, query), each with one paper that is its answer; the corpus is
the cards' titles and summaries. With ``--store`` the catalogue's papers join: abstracts take the place of summaries and
papers out of scope are distractors. Weights are tuned on every second paper's questions and reported on the others'.
"""

import argparse
import csv
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine import machine

from papertrial import rankers
from papertrial.feed.encoder import SentenceEncoder
from papertrial.feed.lexical import LexicalIndex
from papertrial.feed.search import LEXICAL_WEIGHT, Document, Filters, SearchIndex, encoded_text, fuse
from papertrial.lab.claim import read_cards
from papertrial.lm.encoders import load_minilm
from papertrial.papers.retrieval.xtr.method import TokenEncoder, TokenIndex, XTRRetriever

Scores = dict[int, float]
GRID = [round(0.05 * step, 2) for step in range(21)]
QUERIES = Path(__file__).parent / "queries"


def corpus(use_store: bool) -> tuple[list[Document], dict[str, int]]:
    """The documents, and the key of each slug."""
    documents = {
        card.slug: Document(key, card.title, card.summary, slug=card.slug, family=card.family)
        for key, card in enumerate(sorted(read_cards(), key=lambda card: card.slug))
    }
    keys = {slug: document.key for slug, document in documents.items()}
    found = list(documents.values())
    if use_store:
        from papertrial.feed.store import Store

        with Store.open() as store:
            revision = 0
            while True:
                changes, revision = store.changes_since(revision)
                if not changes:
                    break
                for paper in (change.paper for change in changes if change.paper is not None):
                    if paper.slug in keys and paper.abstract:
                        key = keys[paper.slug]
                        found[key] = Document(key, paper.title, paper.abstract, slug=paper.slug, family=paper.family)
                    elif paper.slug is None and paper.abstract:
                        found.append(Document(1_000_000 + paper.id, paper.title, paper.abstract))
    return found, keys


def questions(keys: dict[str, int]) -> tuple[list[tuple[int, str, str]], int]:
    """(key of the answer, kind, query), and how many were left out because their paper is not here."""
    found, missing = [], 0
    for path in sorted(QUERIES.glob("*.tsv")):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                if row["slug"] in keys:
                    found.append((keys[row["slug"]], row["kind"], row["query"]))
                else:
                    missing += 1
    return found, missing


def rank_of(scores: Scores, answer: int) -> int:
    """The answer's place from 1, 0 where it was not found; ties by key, as search breaks them."""
    if answer not in scores:
        return 0
    return 1 + sum((-score, key) < (-scores[answer], answer) for key, score in scores.items())


def reciprocal(ranks: np.ndarray) -> np.ndarray:
    """Each question's share of MRR@10."""
    return np.where((ranks > 0) & (ranks <= 10), 1 / np.maximum(ranks, 1), 0.0)


def gain(ranks: np.ndarray) -> np.ndarray:
    """Each question's nDCG@10; with one right answer the ideal is 1."""
    return np.where((ranks > 0) & (ranks <= 10), 1 / np.log2(np.maximum(ranks, 1) + 1), 0.0)


def reciprocal_rank_fusion(lexical: Scores, dense: Scores, k: float) -> Scores:
    fused: Scores = {}
    for scores in (lexical, dense):
        for rank, key in enumerate(sorted(scores, key=lambda key: (-scores[key], key)), start=1):
            fused[key] = fused.get(key, 0.0) + 1 / (k + rank)
    return fused


def stretched(scores: Scores) -> Scores:
    """Scores mapped onto [0, 1]."""
    low, high = min(scores.values(), default=0.0), max(scores.values(), default=1.0)
    return {key: (score - low) / ((high - low) or 1.0) for key, score in scores.items()}


def interval(difference: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of a mean over questions."""
    draws = np.random.default_rng(0).choice(difference, size=(10_000, len(difference))).mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def by_tokens(documents: list[Document], queries: list[str]) -> dict[str, list[Scores]]:
    """Scores of ``--ranker xtr`` for the sentence encoder as it is, and for the one trained here if there is one."""
    encoders = {"ranker xtr, untrained": TokenEncoder(load_minilm(), None, max_length=rankers.LONGEST)}
    if (rankers.encoder_folder() / "xtr.json").is_file():
        encoders[f"ranker xtr, trained in {rankers.encoder_folder()}"] = TokenEncoder.load(rankers.encoder_folder())
    found = {}
    for name, encoder in encoders.items():
        texts = [encoded_text(document).lower() for document in documents]
        retriever = XTRRetriever(TokenIndex.build(encoder.encode(texts), dtype="float16"))
        k_prime = rankers.TOKENS_RETRIEVED
        found[name] = [
            {documents[hit.document].key: hit.score for hit in retriever.search(query, k_prime=k_prime, top=100)}
            for query in encoder.encode([query.lower() for query in queries])
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="store_true", help="add the catalogue's abstracts and other papers")
    arguments = parser.parse_args()
    documents, keys = corpus(arguments.store)
    asked, missing = questions(keys)
    print(machine("tantivy", "onnxruntime", "usearch", "tokenizers", "numpy"))
    abstracts = "abstracts where the catalogue has them, else summaries" if arguments.store else "summaries"
    print(f"{len(documents)} papers (titles and {abstracts}), {len(asked)} questions on {len({a for a, *_ in asked})}")
    if missing:
        print(f"{missing} questions left out: no card with that slug")
    if not asked:
        raise SystemExit("no questions: benchmarks/queries holds none for the papers here")

    answers = np.array([answer for answer, *_ in asked])
    kinds = np.array([kind for _, kind, _ in asked])
    order = {answer: place for place, answer in enumerate(sorted(set(answers.tolist())))}
    tuning = np.array([order[answer] % 2 == 0 for answer in answers.tolist()])

    texts, queries = [encoded_text(document) for document in documents], [query for *_, query in asked]
    numbers = [document.key for document in documents]
    meaning: dict[str, list[Scores]] = {}
    for precision in ("fp32", "int8"):
        encoder = SentenceEncoder(precision=precision)
        cosines = encoder.encode(queries) @ encoder.encode(texts).T
        meaning[precision] = [dict(zip(numbers, row, strict=True)) for row in cosines.tolist()]
    with tempfile.TemporaryDirectory() as folder:
        words_index = LexicalIndex(Path(folder))
        words_index.add(documents)
        words_index.commit("{}")
        snapshot = words_index.snapshot()
        words = [dict(snapshot.search(query, len(documents), Filters())) for query in queries]
    with tempfile.TemporaryDirectory() as folder:
        index = SearchIndex(Path(folder))
        index.add(documents)
        index.commit(1)
        shipped = [{hit.key: hit.score for hit in index.search(query, limit=100).hits} for query in queries]

    def ranks(scores: list[Scores]) -> np.ndarray:
        return np.array([rank_of(found, answer) for found, answer in zip(scores, answers.tolist(), strict=True)])

    def mixed(fusion: Callable[[Scores, Scores, float], Scores], parameter: float) -> np.ndarray:
        pairs = zip(words, meaning["int8"], strict=True)
        return ranks([fusion(lexical, dense, parameter) for lexical, dense in pairs])

    def tuned(fusion: Callable[[Scores, Scores, float], Scores], values: list[float]) -> tuple[float, np.ndarray]:
        tried = {value: mixed(fusion, value) for value in values}
        best = max(values, key=lambda value: (reciprocal(tried[value])[tuning].mean(), -value))
        return best, tried[best]

    def stretch_mix(lexical: Scores, dense: Scores, weight: float) -> Scores:
        return fuse(lexical, stretched(dense), weight)

    k, rrf = tuned(reciprocal_rank_fusion, [1, 2, 5, 10, 20, 60])
    weight, mix = tuned(fuse, GRID)
    stretch, stretch_ranks = tuned(stretch_mix, GRID)
    shipped_name = f"as shipped: search(), words {LEXICAL_WEIGHT}"
    rows = {
        "BM25 alone": ranks(words),
        "MiniLM alone, fp32": ranks(meaning["fp32"]),
        "MiniLM alone, int8": ranks(meaning["int8"]),
        "reciprocal ranks, k = 60": mixed(reciprocal_rank_fusion, 60),
        f"reciprocal ranks, k = {k} (tuned)": rrf,
        "mixed scores, words 0.5": mixed(fuse, 0.5),
        f"mixed scores, words {weight} (tuned)": mix,
        f"mixed scores, cosine stretched, words {stretch} (tuned)": stretch_ranks,
        shipped_name: ranks(shipped),
        **{name: ranks(scores) for name, scores in by_tokens(documents, queries).items()},
    }
    shown = sorted(set(kinds.tolist()))
    print("\nMRR@10 over the questions that nothing was tuned on, by kind, and nDCG@10; last column: tuning half")
    print(f"{'':58}{'MRR':>7}{''.join(f'{kind:>10}' for kind in shown)}{'nDCG':>8}{'tuning':>9}")
    for name, found in rows.items():
        share = reciprocal(found)
        parts = "".join(f"{share[~tuning & (kinds == kind)].mean():10.3f}" for kind in shown)
        ndcg = gain(found)[~tuning].mean()
        print(f"{name:58}{share[~tuning].mean():7.3f}{parts}{ndcg:8.3f}{share[tuning].mean():9.3f}")

    print("\ndifferences in MRR@10 over the same questions, 95 % bootstrap interval")
    for one, other in (
        (shipped_name, "BM25 alone"),
        (shipped_name, "MiniLM alone, int8"),
        (shipped_name, "reciprocal ranks, k = 60"),
        ("MiniLM alone, int8", "MiniLM alone, fp32"),
        *(
            (name, other)
            for name in rows
            if name.startswith("ranker")
            for other in ("MiniLM alone, fp32", shipped_name)
        ),
    ):
        difference = reciprocal(rows[one]) - reciprocal(rows[other])
        held, (low, high) = difference[~tuning], interval(difference[~tuning])
        print(f"  {one} - {other}: {held.mean():+.3f} [{low:+.3f}, {high:+.3f}]")
    curve = "  ".join(f"{value:.1f}: {reciprocal(mixed(fuse, value))[tuning].mean():.3f}" for value in GRID[::2])
    print(f"weight of the words on the tuning half: {curve}")


if __name__ == "__main__":
    main()
