"""House tokenizers: texts come back byte for byte, training depends on the texts alone, specials are kept apart."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from papertrial.lm.tokenizers import (
    BOS,
    EOS,
    PAD,
    byte_alphabet,
    byte_tokenizer,
    encode_plain,
    train_bpe,
    train_unigram,
)

TEXTS = [
    "def fold(items):\n        for item in items:\n                yield item + 1\n\n" * 8,
    "The quick brown fox jumps over the lazy dog; na\u00efve caf\u00e9s serve jumping foxes. " * 30,
]
BPE = train_bpe(TEXTS, 340)
UNIGRAM = train_unigram(TEXTS, 340)
BYTES = byte_tokenizer()
AWKWARD = f"\x00\t a\r\n\n      x  \u65e5\u672c\U0001f389 {EOS}{PAD} <|mask|> e\u0301 \u200b end  "


@pytest.mark.parametrize("tokenizer", [BPE, UNIGRAM, BYTES], ids=["bpe", "unigram", "bytes"])
@given(text=st.text(max_size=60))
@settings(max_examples=60)
def test_any_text_comes_back_byte_for_byte(tokenizer, text):
    assert tokenizer.decode(encode_plain(tokenizer, text)) == text


@pytest.mark.parametrize("tokenizer", [BPE, UNIGRAM, BYTES], ids=["bpe", "unigram", "bytes"])
def test_a_saved_tokenizer_loads_as_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert encode_plain(loaded, AWKWARD) == encode_plain(tokenizer, AWKWARD)
    assert loaded.decode(encode_plain(loaded, AWKWARD)) == AWKWARD
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id, loaded.padding_side) == (0, 1, 2, "left")


def test_names_of_special_tokens_in_a_text_are_mere_text():
    for tokenizer in (BPE, UNIGRAM, BYTES):
        assert not {0, 1, 2}.intersection(encode_plain(tokenizer, f"{PAD}{BOS}{EOS}"))
    assert BPE(EOS)["input_ids"] == [2], "transformers' own way, which encode_plain is there to avoid"


@pytest.mark.parametrize("train", [train_bpe, train_unigram])
def test_training_twice_gives_the_same_tokenizer_and_other_texts_another(train):
    first, again, other = train(TEXTS, 330), train(TEXTS, 330), train(TEXTS[:1], 330)
    assert first.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()
    assert first.backend_tokenizer.to_str() != other.backend_tokenizer.to_str()


def test_merges_shorten_text_and_bytes_are_all_there():
    text = TEXTS[1]
    assert len(encode_plain(BPE, text)) < 0.5 * len(text.encode())
    assert set(byte_alphabet()) <= set(BPE.get_vocab())
    assert len(BPE) == 340


def test_words_are_kept_apart_unless_asked():
    split = train_bpe(["of the " * 200], 300)
    joined = train_bpe(["of the " * 200], 300, split_words=False)
    inner = [t for t in joined.get_vocab() if "\u0120" in t[1:]]
    assert inner, "a token across the space"
    assert not [t for t in split.get_vocab() if "\u0120" in t[1:]]


def test_the_byte_alphabet_is_that_of_byte_level_vocabularies():
    assert sorted(byte_alphabet()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    data = bytes(range(0x20, 0x7F)).decode() + "\u00e9\n"
    pieces = "".join(token for token, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(data))
    assert pieces == "".join(byte_alphabet()[byte] for byte in data.encode())


def test_the_byte_tokenizer_numbers_bytes_in_order_after_the_specials():
    assert encode_plain(BYTES, AWKWARD) == [3 + byte for byte in AWKWARD.encode()]
    masked = byte_tokenizer(specials=["<|mask|>"])
    assert masked.mask_token_id == 3
    assert encode_plain(masked, "A") == [4 + 65]


def test_further_specials_follow_and_are_named_where_transformers_has_a_name():
    tokenizer = train_bpe(TEXTS, 300, specials=["<|mask|>", "<|sep|>", "<|s0|>"], padding_side="right")
    assert [tokenizer.convert_tokens_to_ids(t) for t in ("<|mask|>", "<|sep|>", "<|s0|>")] == [3, 4, 5]
    assert (tokenizer.mask_token_id, tokenizer.sep_token_id, tokenizer.padding_side) == (3, 4, "right")
    assert tokenizer.decode([3, 5, *encode_plain(tokenizer, "fox")], skip_special_tokens=True) == "fox"


@pytest.mark.parametrize("train", [train_bpe, train_unigram])
def test_sizes_and_specials_that_cannot_be_are_refused(train):
    with pytest.raises(ValueError, match="vocab_size must exceed 259"):
        train(TEXTS, 259)
    with pytest.raises(ValueError, match="special tokens must differ"):
        train(TEXTS, 300, specials=[EOS])
