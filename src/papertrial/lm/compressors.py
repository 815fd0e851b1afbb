"""Bits per byte without a neural network: what a language model of text has to beat."""

import lzma

import numpy as np
from numpy.typing import NDArray


def xz_bits_per_byte(text: bytes, primed_with: bytes = b"") -> float:
    """Bits per byte of ``text`` under xz (LZMA2, preset 9e), given ``primed_with`` before it.

    The growth of the compressed size when ``text`` is appended; the dictionary spans both.

    Raises
    ------
    ValueError
        For an empty ``text``.
    """
    if not text:
        raise ValueError("text is empty")
    size = max(1 << 20, len(text) + len(primed_with))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": size}]

    def packed(data: bytes) -> int:
        return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=filters)) if data else 0

    return 8.0 * (packed(primed_with + text) - packed(primed_with)) / len(text)


class ByteNgram:
    """Interpolated byte n-gram with Witten-Bell smoothing (Witten and Bell 1991; Chen and Goodman 1998, section 2.6).

    p_k(b | c_k) = (n(c_k b) + t(c_k) p_{k-1}(b | c_{k-1})) / (n(c_k) + t(c_k)), where n counts in the training bytes,
    t(c) is the number of distinct bytes after c, c_k are the last k bytes, and p_{-1} = 1/256.

    Parameters
    ----------
    data : training bytes.
    order : number of context bytes, 0 to 6 (context and byte are packed into 64 bits).

    Raises
    ------
    ValueError
        For another order or empty data.
    """

    def __init__(self, data: bytes, order: int = 6) -> None:
        if not 0 <= order <= 6:
            raise ValueError(f"order must lie in [0, 6], got {order}")
        if not data:
            raise ValueError("data is empty")
        self.order = order
        stream = _padded(data, order)
        self._tables = []
        for k in range(order + 1):
            grams, counts = np.unique(_grams(stream, order, k + 1), return_counts=True)
            contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
            totals = np.add.reduceat(counts, first)
            types = np.diff(np.append(first, len(grams)))
            self._tables.append((grams, counts, contexts, totals, types))

    def probabilities(self, data: bytes) -> NDArray[np.float64]:
        """Probability of every byte of ``data`` (N,) given those before it."""
        stream = _padded(data, self.order)
        p = np.full(len(data), 1.0 / 256.0)
        for k, (grams, counts, contexts, totals, types) in enumerate(self._tables):
            gram = _grams(stream, self.order, k + 1)
            n_gram = _lookup(grams, counts, gram)
            n_context = _lookup(contexts, totals, gram >> np.uint64(8))
            t_context = _lookup(contexts, types, gram >> np.uint64(8))
            seen = n_context > 0
            p = np.where(seen, (n_gram + t_context * p) / np.maximum(1, n_context + t_context), p)
        return p

    def bits_per_byte(self, data: bytes) -> float:
        """Mean of -log2 p over the bytes of ``data``."""
        return float(-np.log2(self.probabilities(data)).mean())


def _padded(data: bytes, order: int) -> NDArray[np.uint64]:
    return np.frombuffer(b"\n" * order + data, dtype=np.uint8).astype(np.uint64)


def _grams(stream: NDArray[np.uint64], order: int, length: int) -> NDArray[np.uint64]:
    """For each byte after the padding: it and the ``length`` - 1 bytes before it, packed big-endian (N,)."""
    n = len(stream) - order
    packed = np.zeros(n, dtype=np.uint64)
    for back in range(length - 1, -1, -1):
        packed = (packed << np.uint64(8)) | stream[order - back : order - back + n]
    return packed


def _lookup(keys: NDArray[np.uint64], values: NDArray[np.int64], wanted: NDArray[np.uint64]) -> NDArray[np.int64]:
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
