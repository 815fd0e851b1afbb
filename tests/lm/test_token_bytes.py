import json

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from papertrial.lm.token_bytes import TokenBytes
from papertrial.lm.tokenizers import byte_tokenizer, train_bpe, train_unigram

TEXT = "def retrieve(self):\n    return  self.x  # they're naïve, 日本語 🙂\n" * 4
TEXTS = [
    "",
    "a",
    "def retrieve",
    "  two  blanks ",
    "they're x'r\n\n\t y",
    "日本語 🙂 naïve",
    "<|eos|> is text",
    "\x00\x7f",
    TEXT,
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def changed(tokenizer, **parts):
    """The same tokenizer with other parts of its backend."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= parts
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|eos|>")


def llama3_style():
    tokenizer = train_bpe([TEXT], 340)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>")


def prefix_space():
    parts = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return changed(train_bpe([TEXT], 340), pre_tokenizer=parts)


def sentencepiece(kind="llama"):
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = sorted(set(TEXT.replace(" ", "▁")) - set("\n🙂"))
    merges = [("▁", "d"), ("e", "f"), ("▁d", "ef"), ("t", "h"), ("▁", "▁"), ("日", "本")]
    tokens = ["<unk>", "<s>", "</s>", *pieces, *letters, *(a + b for a, b in merges)]
    model = models.BPE(
        vocab={t: i for i, t in enumerate(tokens)}, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    if kind == "llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=kind == "split")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


TOKENIZERS = {
    "gpt2": lambda: train_bpe([TEXT], 340),
    "no words": lambda: train_bpe([TEXT], 340, split_words=False),
    "llama3": llama3_style,
    "prefix space": prefix_space,
    "bytes": byte_tokenizer,
    "unigram": lambda: train_unigram([TEXT], 300),
    "llama2": sentencepiece,
    "mistral": lambda: sentencepiece("whole"),
    "metaspace": lambda: sentencepiece("split"),
    "gemma": lambda: sentencepiece("gemma"),
}


@pytest.fixture(params=TOKENIZERS, scope="module")
def tokenizer(request):
    return TOKENIZERS[request.param]()


def test_encoding_bytes_is_the_tokenizer_s_own_encoding(tokenizer):
    view = TokenBytes(tokenizer)
    for text in TEXTS:
        if view.kind == "byte_unigram" and "<|eos|>" in text:
            continue
        expected = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert view.encode_bytes(text.encode()) == expected


def test_tokens_spell_the_text_byte_for_byte(tokenizer):
    view = TokenBytes(tokenizer)
    for text in TEXTS:
        data = text.encode()
        ids = view.encode_bytes(data)
        spelled = b"".join(view.bytes_of(token) for token in ids)
        assert spelled == (view.dummy_prefix(data) + data if text else b"")
        if not (view.dummy_prefix(b"x") and text.startswith(" ") and not view.dummy_prefix(data)):
            assert view.decode_bytes(ids) == data
        assert view.decode_bytes(view.encode_bytes(data, start=False), start=False) == data


def test_special_tokens_stand_for_no_text_and_every_byte_has_a_token(tokenizer):
    view = TokenBytes(tokenizer)
    for token in {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}:
        assert token is None or view.bytes_of(token) is None
    assert view.is_invertible()
    assert view.size == len(tokenizer)
    for data, ids in view.ids_of.items():
        assert all(view.bytes_of(token) == data for token in ids)
        assert len(data) <= view.longest
    table = view.byte_table
    for token in range(view.size):
        row = table[token]
        assert bytes(row[row >= 0].astype("uint8")) == (view.bytes_of(token) or b"")


def test_kinds_and_whether_words_are_split():
    kinds = {name: TokenBytes(make()) for name, make in TOKENIZERS.items()}
    assert {name: view.kind for name, view in kinds.items()} == {
        "gpt2": "byte_bpe",
        "no words": "byte_bpe",
        "llama3": "byte_bpe",
        "prefix space": "byte_bpe",
        "bytes": "byte_bpe",
        "unigram": "byte_unigram",
        "llama2": "sentencepiece",
        "mistral": "sentencepiece",
        "metaspace": "sentencepiece",
        "gemma": "sentencepiece",
    }
    whole = {name for name, view in kinds.items() if not view.splits}
    assert whole == {"no words", "bytes", "llama2", "mistral"}
    assert {name for name, view in kinds.items() if view.dummy_prefix(b"x")} == {
        "prefix space",
        "llama2",
        "mistral",
        "metaspace",
    }


def test_boundaries_are_where_no_token_crosses():
    assert TokenBytes(TOKENIZERS["gpt2"]()).boundaries(b"they're  x") == [0, 4, 7, 8]
    assert TokenBytes(TOKENIZERS["metaspace"]()).boundaries(b" a  b") == [0, 2, 3]
    assert TokenBytes(TOKENIZERS["no words"]()).boundaries(b"a b") == [0]
    view = TokenBytes(TOKENIZERS["llama3"]())
    text = "naïve 日本 12345\n\n x".encode()
    starts, at = set(), 0
    for token in view.encode_bytes(text):
        starts.add(at)
        at += len(view.bytes_of(token))
    assert set(view.boundaries(text)) <= starts


def test_wordpiece_is_marked_as_lossy():
    vocabulary = {"[UNK]": 0, "ab": 1, "##c": 2, "c": 3}
    backend = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    view = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"))
    assert view.kind == "wordpiece"
    assert not view.is_invertible()
    assert [view.bytes_of(token) for token in view.encode_bytes(b"abc c")] == [b"ab", b"c", b"c"]
    assert view.bytes_of(0) is None


@pytest.mark.parametrize("name", ["Lowercase", "NFKC", "Strip"])
def test_normalizers_that_change_texts_are_lossy(name):
    tokenizer = train_bpe([TEXT], 300)
    tokenizer.backend_tokenizer.normalizer = getattr(normalizers, name)()
    view = TokenBytes(tokenizer)
    assert name in view.lossy
    assert not view.is_invertible()


def test_composed_text_passes_nfc():
    tokenizer = train_bpe([TEXT], 300)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    view = TokenBytes(tokenizer)
    assert view.is_invertible()
    assert view.encode_bytes("naïve".encode()) == tokenizer.encode("naïve")


def test_text_that_nfc_would_change_is_refused_and_not_read_as_other_text():
    tokenizer = train_bpe([TEXT], 300)
    assert TokenBytes(tokenizer).encode_bytes("cafe\u0301".encode()) == tokenizer.encode("cafe\u0301")
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    view = TokenBytes(tokenizer)
    assert view.composed
    for text in ("cafe\u0301", "\u1100\u1161", "a\u0301\u0323", "\uf900"):  # marks, jamo, their order, a singleton
        assert not view.is_normal(text)
        with pytest.raises(ValueError, match="NFC"):
            view.encode_bytes(text.encode())
    for text in ("caf\u00e9", "x\u0301", "\uac00"):  # x with an acute has no composed form
        assert view.is_normal(text)
        assert view.encode_bytes(text.encode()) == tokenizer.encode(text)


def test_merges_are_the_encoder_s_in_the_order_of_their_ranks():
    view = TokenBytes(TOKENIZERS["gpt2"]())
    merges = view.merges
    assert len(merges) == view.size - 256 - 3
    assert list(merges[:, 2]) == sorted(merges[:, 2])  # a trained vocabulary numbers them as it finds them
    for left, right, made in merges.tolist():
        assert view.bytes_of(left) + view.bytes_of(right) == view.bytes_of(made)
    twice = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "ba": 3}, merges=[("a", "b"), ("b", "a"), ("a", "b")]))
    twice.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    view = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=twice))
    assert view.merges.tolist() == [[1, 0, 3], [0, 1, 2]]
    assert view.encode_bytes(b"aba") == [0, 3]
    assert TokenBytes(byte_tokenizer()).merges.shape == (0, 3)
    assert not view.words_first


def test_added_blanks_are_lossy_and_other_added_tokens_are_no_text():
    tokenizer = train_bpe([TEXT], 300)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False, special=False)])
    view = TokenBytes(tokenizer)
    assert view.bytes_of(len(tokenizer) - 1) is None
    assert view.is_invertible()
    tokenizer.add_tokens([AddedToken("    ", normalized=False, special=False)])
    assert "added token" in TokenBytes(tokenizer).lossy


def test_what_has_no_known_bytes_is_refused():
    words = Tokenizer(models.WordLevel(vocab={"a": 0}, unk_token="a"))
    with pytest.raises(ValueError, match="WordLevel"):
        TokenBytes(PreTrainedTokenizerFast(tokenizer_object=words))
    suffixed = Tokenizer(models.BPE(vocab={"a</w>": 0}, merges=[], end_of_word_suffix="</w>"))
    with pytest.raises(ValueError, match="neither byte-level"):
        TokenBytes(PreTrainedTokenizerFast(tokenizer_object=suffixed))
    view = TokenBytes(train_bpe([TEXT], 300))
    with pytest.raises(ValueError, match=r"0 \.\. 299"):
        view.bytes_of(300)
    with pytest.raises(ValueError, match="not UTF-8 at byte 1"):
        view.encode_bytes(b"a\xff")


def test_text_outside_the_vocabulary_is_refused():
    alone = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    view = TokenBytes(PreTrainedTokenizerFast(tokenizer_object=alone))
    assert not view.is_invertible()
    assert view.encode_bytes(b"ab") == [0, 1]
    with pytest.raises(ValueError, match="does not survive"):
        view.encode_bytes(b"abc")
    with pytest.raises(ValueError, match="does not survive"):
        TokenBytes(sentencepiece()).encode_bytes("▁".encode())
