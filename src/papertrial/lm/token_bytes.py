"""Tokens as bytes: which bytes each token stands for, and the encoder seen from its bytes.

Two alphabets cover nearly all decoders. Byte-level vocabularies (GPT-2, Llama 3, Qwen) write each byte as one printable
character. SentencePiece vocabularies (Llama 2, Mistral, Gemma) write a space as U+2581, put one before the text, and
fall back to tokens ``<0xNN>`` for characters that they do not hold.

>>> view = TokenBytes(tokenizer)                                 # doctest: +SKIP
>>> [view.bytes_of(token) for token in view.encode_bytes(b"def foo():")]  # doctest: +SKIP
[b'def', b' foo', b'():']
"""

import json
import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import convert_slow_tokenizer

from papertrial.lm.tokenizers import byte_alphabet

Kind = Literal["byte_bpe", "byte_unigram", "sentencepiece", "wordpiece"]

SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = re.compile(f"{SPACE}[^{SPACE}]*|[^{SPACE}]+")
_HARMLESS = {"NFC", "Prepend", "Replace"}
"""Normalizers that keep text as it is: NFC on composed text (other text is refused), what makes spaces into U+2581."""


class TokenBytes:
    """A tokenizer seen from its bytes.

    Parameters
    ----------
    tokenizer
        Any tokenizer of transformers. One without a ``tokenizers`` backend is converted first.

    Attributes
    ----------
    kind
        ``byte_bpe``, ``byte_unigram``, ``sentencepiece`` or ``wordpiece``.
    algorithm
        ``BPE``, ``Unigram`` or ``WordPiece``: how a piece is cut into tokens.
    lossy
        Why text does not survive the encoder, or None. Checked from the configuration; a text with characters that the
        vocabulary lacks is found by :meth:`encode_bytes`.
    size
        Number of ids, added tokens included.
    splits
        Whether texts are cut into pieces (words) that no token crosses.
    composed
        Whether the encoder brings texts to Unicode's form NFC first (Qwen, GPT-NeoX): no others come back.
    words_first
        Whether a piece that is a token by itself stays whole, whatever the merges say (Llama 3).
    pre_tokenizers
        The parts of what cuts texts into pieces, as the ``tokenizers`` library writes them, sequences opened.

    Raises
    ------
    ValueError
        If the tokenizer is of another kind.

    Notes
    -----
    Texts are texts: the name of a special or added token inside a text is spelled out, never read as that token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        state = json.loads(_backend(tokenizer).to_str())
        self.algorithm: str = state["model"]["type"]
        parts = {part["type"]: part for part in _parts(state["pre_tokenizer"])}
        self.pre_tokenizers = _parts(state["pre_tokenizer"])
        normal = _parts(state["normalizer"])
        self.kind = _kind(self.algorithm, parts, normal, state["model"])
        self.composed = any(part["type"] == "NFC" for part in normal)
        self.words_first = bool(state["model"].get("ignore_merges"))
        self._merges: list[Any] = state["model"].get("merges") or []
        self.size = len(tokenizer)
        self.added = {token["id"]: token for token in state["added_tokens"]}
        self.unknown: int | None = state["model"].get("unk_id")
        if self.unknown is None and state["model"].get("unk_token") is not None:
            self.unknown = cast(int, tokenizer.convert_tokens_to_ids(state["model"]["unk_token"]))
        for part in parts.values():  # the blank before a text is ours to add, see `dummy_prefix`
            if "add_prefix_space" in part:
                part["add_prefix_space"] = False
        self._tokenizer = tokenizer
        state["added_tokens"], state["normalizer"], state["post_processor"] = [], None, None
        own = Tokenizer.from_str(json.dumps(state))
        self._model, self._pre = own.model, own.pre_tokenizer
        self._metaspace = parts.get("Metaspace")
        self.splits = self._pre is not None
        if self._metaspace is not None:
            self.splits = bool(self._metaspace.get("split", True))
        elif self.kind in ("byte_bpe", "byte_unigram") and len(parts) == 1:
            self.splits = bool(parts["ByteLevel"].get("use_regex", True))
        self.lossy = self._why_lossy(normal)
        self._of_byte = {character: byte for byte, character in enumerate(byte_alphabet())}
        self._to_byte = byte_alphabet()
        self._bytes = self._all_bytes()
        self._pieces: dict[str, tuple[int, ...]] = {}

    # -- tokens --------------------------------------------------------------------------------------------------

    def bytes_of(self, token: int) -> bytes | None:
        """The bytes of a token; None for special, added, unknown and unused ones, which stand for no text."""
        if not 0 <= token < self.size:
            raise ValueError(f"token must lie in 0 .. {self.size - 1}, got {token}")
        return self._bytes[token]

    @cached_property
    def ids_of(self) -> dict[bytes, tuple[int, ...]]:
        """The tokens of each byte string; more than one where ``<0xNN>`` stands beside the character itself."""
        found: dict[bytes, tuple[int, ...]] = {}
        for token, data in enumerate(self._bytes):
            if data:
                found[data] = (*found.get(data, ()), token)
        return found

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return max((len(data) for data in self._bytes if data), default=0)

    @cached_property
    def byte_table(self) -> NDArray[np.int16]:
        """(size, longest): the bytes of each token from the left, -1 after its end and for tokens without text."""
        table = np.full((self.size, max(1, self.longest)), -1, dtype=np.int16)
        for token, data in enumerate(self._bytes):
            if data:
                table[token, : len(data)] = np.frombuffer(data, dtype=np.uint8)
        return table

    @cached_property
    def byte_tokens(self) -> dict[int, int]:
        """SentencePiece fallback: byte value to the id of ``<0xNN>``."""
        if self.kind != "sentencepiece":
            return {}
        names = ((token, self._tokenizer.convert_ids_to_tokens(token)) for token in range(self.size))
        return {int(m[1], 16): token for token, name in names if (m := _BYTE_TOKEN.fullmatch(str(name)))}

    @cached_property
    def merges(self) -> NDArray[np.int64]:
        """(M, 3) ids of left part, right part and what they make, in the order of the encoder's ranks; BPE only."""
        pairs = [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in self._merges]
        last = {pair: rank for rank, pair in enumerate(pairs)}  # a pair named twice has its later rank
        ids = self._model.token_to_id
        kept = [(ids(a), ids(b), ids(a + b)) for a, b in sorted(last, key=lambda pair: last[pair])]
        return np.array(kept, dtype=np.int64).reshape(-1, 3)

    def is_invertible(self) -> bool:
        """Whether every text comes back byte for byte: nothing is normalised away and no byte lacks a token."""
        if self.lossy is not None:
            return False
        alone = set(self.byte_tokens) if self.kind == "sentencepiece" else {d[0] for d in self.ids_of if len(d) == 1}
        return len(alone) == 256

    # -- texts ---------------------------------------------------------------------------------------------------

    @cached_property
    def _probe(self) -> bytes:
        ids = self._tokenizer.encode("a", add_special_tokens=False)
        return b"".join(self._bytes[token] or b"" for token in ids)

    def dummy_prefix(self, data: bytes) -> bytes:
        """What the encoder puts before a text: a blank or nothing. (Before an empty one nothing; for ``b""`` this says
        what it would be with any text to come.)"""
        if self._probe != b" a":
            return b""
        # Metaspace and the byte-level option leave a text alone that begins with a blank; SentencePiece's own rule adds
        conditional = self._metaspace is not None or self.kind != "sentencepiece"
        return b"" if conditional and data.startswith(b" ") else b" "

    def encode_bytes(self, data: bytes, *, start: bool = True) -> list[int]:
        """The encoder's tokens of a text given as UTF-8, without special tokens.

        Parameters
        ----------
        start
            False for text that continues another: then no blank is put before it.

        Raises
        ------
        ValueError
            If ``data`` is not UTF-8, or does not survive (a character without a token, a normalised one).
        """
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"data is not UTF-8 at byte {error.start}; only whole characters can be encoded") from None
        if not self.is_normal(text):
            raise ValueError(
                f"the text is not in the composed form (NFC) that this tokenizer brings texts to, {_decomposed(text)}: "
                "give unicodedata.normalize('NFC', text)"
            )
        if self.kind == "wordpiece":
            return list(self._tokenizer.encode(text, add_special_tokens=False))
        if start and text:
            text = self.dummy_prefix(data).decode() + text
        ids = [token for piece in self.pieces(text) for token in self.cut(piece)]
        back = b"".join(self._bytes[token] or b"" for token in ids)
        if back != text.encode():
            at = next((i for i, (a, b) in enumerate(zip(back, text.encode(), strict=False)) if a != b), len(back))
            raise ValueError(
                f"the text does not survive this tokenizer near byte {at}, {text.encode()[max(0, at - 8) : at + 8]!r}: "
                "use a tokenizer that covers it, or other text"
            )
        return ids

    def is_normal(self, text: str) -> bool:
        """Whether the encoder's normalizer leaves a text alone: always, but for tokenizers with NFC."""
        return not self.composed or text.isascii() or _NFC.normalize_str(text) == text

    def decode_bytes(self, ids: Iterable[int], *, start: bool = True) -> bytes:
        """The bytes of tokens, special ones left out; with ``start`` without the blank that the encoder put before."""
        data = b"".join(self.bytes_of(token) or b"" for token in ids)
        return data[1:] if start and self._probe == b" a" and data.startswith(b" ") else data

    def boundaries(self, data: bytes) -> list[int]:
        """Byte offsets at which pieces of a text begin (no token crosses them); [0] where texts are not split."""
        offsets, at = [], 0
        for piece in self.pieces(data.decode("utf-8")):
            offsets.append(at)
            at += self.width(piece)
        return offsets

    def pieces(self, text: str) -> list[str]:
        """The pieces of a text in the vocabulary's own alphabet: what the encoder cuts into tokens one by one."""
        if not text:
            return []
        if self.kind == "sentencepiece":
            text = text.replace(" ", SPACE)
            if self._pre is None or (self._metaspace is not None and not self.splits):
                return [text]
            if self._metaspace is not None:
                return _METASPACE.findall(text)
        return [piece for piece, _ in self._pre.pre_tokenize_str(text)]

    def cut(self, piece: str) -> tuple[int, ...]:
        """The tokens of one piece."""
        found = self._pieces.get(piece)
        if found is None:
            found = tuple(token.id for token in self._model.tokenize(piece)) if piece else ()
            if len(piece) <= 64:  # whole texts, where nothing splits them, are not worth remembering
                if len(self._pieces) > 200_000:
                    self._pieces.clear()
                self._pieces[piece] = found
        return found

    def width(self, piece: str) -> int:
        """Bytes that a piece stands for."""
        return len(piece.encode()) - 2 * piece.count(SPACE) if self.kind == "sentencepiece" else len(piece)

    def spell(self, data: bytes) -> str:
        """Bytes in a byte-level vocabulary's own alphabet; they need not be whole characters."""
        return "".join(self._to_byte[byte] for byte in data)

    # -- construction --------------------------------------------------------------------------------------------

    def _why_lossy(self, normalizers: list[dict[str, Any]]) -> str | None:
        if self.kind == "wordpiece":
            return "WordPiece drops the spaces between words"
        for part in normalizers:
            known = part["type"] in _HARMLESS
            if part["type"] == "Replace":
                known = part["pattern"] == {"String": " "} and part["content"] == SPACE
            if not known:
                return f"its normalizer {part['type']} changes texts"
        for token in self.added.values():
            if not token["special"] and not token["content"].strip():
                return f"it has the added token {token['content']!r}, which is cut out of texts before they are encoded"
        return None

    def _all_bytes(self) -> list[bytes | None]:
        names = self._tokenizer.convert_ids_to_tokens(list(range(self.size)))
        found: list[bytes | None] = []
        for token, name in enumerate(names):
            none = name is None or token in self.added or token == self.unknown
            found.append(None if none else self._spelled(str(name)))
        return found

    def _spelled(self, name: str) -> bytes | None:
        if self.kind == "sentencepiece":
            byte = _BYTE_TOKEN.fullmatch(name)
            return bytes([int(byte[1], 16)]) if byte else name.replace(SPACE, " ").encode()
        if self.kind == "wordpiece":
            return name.removeprefix("##").encode()
        if any(character not in self._of_byte for character in name):
            return None
        return bytes(self._of_byte[character] for character in name)


_NFC = normalizers.NFC()


def _decomposed(text: str) -> str:
    """Where a text and its composed form part."""
    composed = _NFC.normalize_str(text)
    both = enumerate(zip(text, composed, strict=False))
    at = next((i for i, (a, b) in both if a != b), min(len(text), len(composed)))
    return f"see {text[max(0, at - 4) : at + 4]!a} at character {at}"


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return backend
    try:
        return convert_slow_tokenizer(tokenizer)
    except Exception as error:
        raise ValueError(
            f"{type(tokenizer).__name__} has no `tokenizers` backend and cannot get one ({error}): load a fast one"
        ) from error


def _parts(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A pre-tokenizer's or normalizer's parts, sequences opened."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    inner = component.get("pretokenizers") or component.get("normalizers") or []
    return [part for one in inner for part in _parts(one)]


def _kind(algorithm: str, pre: dict[str, Any], normalizers: list[dict[str, Any]], model: dict[str, Any]) -> Kind:
    if algorithm == "WordPiece":
        return "wordpiece"
    plain = not model.get("continuing_subword_prefix") and not model.get("end_of_word_suffix")
    if algorithm in ("BPE", "Unigram") and plain:
        if "ByteLevel" in pre:
            return "byte_bpe" if algorithm == "BPE" else "byte_unigram"
        spaces = any(part["type"] == "Replace" and part.get("content") == SPACE for part in normalizers)
        if "Metaspace" in pre or spaces or model.get("byte_fallback"):
            return "sentencepiece"
    raise ValueError(
        f"a {algorithm} tokenizer with pre-tokenizers {sorted(pre) or 'none'} is neither byte-level nor SentencePiece "
        "nor WordPiece: its tokens have no known bytes"
    )
