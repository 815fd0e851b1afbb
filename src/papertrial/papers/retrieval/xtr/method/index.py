"""All token vectors of a corpus, and the search for the nearest of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from papertrial.lm.datastore import ApproximateSearch, ExactSearch, Neighbours

EXACT_TOKENS = 2_000_000
"""Up to this many tokens brute force answers in a fraction of a second."""
WIDTH_PER_BYTE = 4
"""Numbers of a token vector that product quantisation keeps in one byte: its scores rank documents, none is corrected
by the vectors themselves."""
Kind = Literal["ivfpq", "ivf", "hnsw"]


class TokenIndex:
    """The token vectors of C documents, one after the other; made by :meth:`build`.

    Attributes
    ----------
    vectors
        (N, d) float16 or float32.
    offsets
        (C + 1,) int64: document c owns tokens ``offsets[c]`` to ``offsets[c + 1] - 1``.
    document_of
        (N,) int64.

    Parameters
    ----------
    kind
        ``exact`` or an approximate search of ``papertrial.lm.datastore``; ``auto`` goes by size.
    kept
        Where an approximate search over these very vectors is kept: read from there if it is there, else built and
        written there. The caller names the file after the vectors.
    """

    def __init__(
        self,
        vectors: NDArray[np.floating],
        offsets: NDArray[np.int64],
        *,
        kind: Literal["auto", "exact", "ivfpq", "ivf", "hnsw"] = "auto",
        device: torch.device | str = "cpu",
        kept: Path | None = None,
    ) -> None:
        offsets = np.asarray(offsets, dtype=np.int64)
        if vectors.ndim != 2 or len(vectors) == 0:
            raise ValueError(f"vectors must be (N, d) with at least one token, got {tuple(vectors.shape)}")
        if offsets.ndim != 1 or offsets[0] != 0 or offsets[-1] != len(vectors) or bool((np.diff(offsets) < 1).any()):
            raise ValueError("offsets must rise from 0 to the number of tokens, with at least one token per document")
        self.vectors, self.offsets = vectors, offsets
        self.document_of = torch.from_numpy(np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)))
        if kind == "auto":
            kind = "exact" if len(vectors) <= EXACT_TOKENS else "ivfpq"
        self._search: ExactSearch | ApproximateSearch
        if kind == "exact":
            self._search = ExactSearch(vectors, metric="ip", device=device)
        else:
            self._search = _approximate(vectors, kind, kept)

    @classmethod
    def build(
        cls,
        documents: Sequence[Tensor],
        *,
        dtype: Literal["float16", "float32"] = "float32",
        kind: Literal["auto", "exact", "ivfpq", "ivf", "hnsw"] = "auto",
        device: torch.device | str = "cpu",
    ) -> "TokenIndex":
        """Index documents.

        Parameters
        ----------
        documents
            (S_c, d) unit vectors of each.
        dtype
            They are kept in.
        kind
            ``exact`` or an approximate search of ``papertrial.lm.datastore``; ``auto`` goes by size.

        Raises
        ------
        ValueError
            An empty corpus, a document without tokens, vectors of unequal width or not of length 1.
        """
        if not documents:
            raise ValueError("the corpus is empty: give at least one document")
        widths = {d.shape[1] if d.dim() == 2 else -1 for d in documents}
        if len(widths) != 1 or -1 in widths:
            raise ValueError("every document must be (tokens, d) with the same d")
        flat = torch.cat([d.detach().float().cpu() for d in documents])
        lengths = flat.norm(dim=1)
        if len(flat) and not torch.allclose(lengths, torch.ones(()), atol=1e-2):
            worst = float(lengths[(lengths - 1).abs().argmax()])
            raise ValueError(f"token vectors must have length 1, one has {worst:.3f}: normalise them")
        offsets = np.concatenate([[0], np.cumsum([len(d) for d in documents])])
        return cls(flat.numpy().astype(dtype), offsets, kind=kind, device=device)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    @property
    def tokens(self) -> int:
        """Number of token vectors."""
        return len(self.vectors)

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors, or of the compressed index in their place."""
        return self._search.nbytes if isinstance(self._search, ApproximateSearch) else int(self.vectors.nbytes)

    def search(self, query: Tensor, k: int) -> Neighbours:
        """The k nearest tokens of the corpus for each query token (n, d), all tokens if there are fewer."""
        return self._search.search(query, min(k, self.tokens))

    def document(self, place: int) -> Tensor:
        """Token vectors (S, d) float32 of a document."""
        rows = self.vectors[self.offsets[place] : self.offsets[place + 1]]
        return torch.from_numpy(np.asarray(rows, dtype=np.float32))


def _approximate(vectors: NDArray[np.floating], kind: Kind, kept: Path | None) -> ApproximateSearch:
    if kept is not None and kept.is_file():
        try:
            found = ApproximateSearch.load(kept, vectors)
            if found.kind == kind:
                return found
        except ValueError:  # not written to the end, or damaged: built again
            pass
    width = vectors.shape[1]
    built = ApproximateSearch.build(
        vectors, kind=kind, metric="ip", bytes_per_key=width // WIDTH_PER_BYTE if width % WIDTH_PER_BYTE == 0 else None
    )
    if kept is not None:
        built.save(kept)
    return built
