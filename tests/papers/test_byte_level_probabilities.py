import itertools
import math
import unicodedata

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LogitsProcessorList, PreTrainedTokenizerFast

from families import CORE, tiny_model
from papertrial.lm.generation import greedy
from papertrial.lm.token_bytes import TokenBytes
from papertrial.lm.tokenizers import BOS, EOS, PAD, byte_alphabet, byte_tokenizer, train_bpe, train_unigram
from papertrial.papers.tokenization.byte_level_probabilities.chain import ByteChain, induced_model
from papertrial.papers.tokenization.byte_level_probabilities.fill_model import (
    MARKS,
    FillRecipe,
    fill_model,
    fill_stream,
)
from papertrial.papers.tokenization.byte_level_probabilities.gaps import Gap, compiles, fill_gap
from papertrial.papers.tokenization.byte_level_probabilities.method import (
    END,
    ByteEnsemble,
    ByteLevelLM,
    FillTokens,
    Validity,
    encode_prompt,
    healed_next_byte,
    infilling_prompt,
    plain_next_byte,
    token_healing,
)
from papertrial.papers.tokenization.byte_level_probabilities.method.pairs import Pairs
from papertrial.papers.tokenization.byte_level_probabilities.method.prefixes import run_prefixes
from papertrial.papers.tokenization.byte_level_probabilities.method.shapes import Alphabet, UnknownPattern

TEXT = (
    "def retrieve(self, entry):\n    for node in self.children:\n        if node.value == entry:\n"
    "            return node\n    raise KeyError(entry)  # they're not here, they've gone\n\n"
)
PROMPTS = ["def retr", "for node in self.chil", "x  ", "they'", "    if node.va"]
ROUNDING = 1e-6  # families with rotary positions and RMS norms compute those in float32 even in a float64 model


def wrapped(tokenizer, **names):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **names)


def bpe(pieces, merges, *, pre=None, split=False):
    """Byte-level BPE with exactly these pieces (spelled as text) and merges; ids 0, 1, 2 pad, begin and end."""
    alphabet = byte_alphabet()
    spell = lambda text: "".join(alphabet[byte] for byte in text.encode())  # noqa: E731
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *map(spell, pieces)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(spell(a), spell(b)) for a, b in merges]))
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    tokenizer.pre_tokenizer = own if pre is None else pre_tokenizers.Sequence([pre, own])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    return wrapped(tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def sentencepiece(pieces, merges, fallback, *, metaspace=False):
    """BPE as Llama 2 has it: U+2581 for blanks, one before the text, bytes for characters it lacks."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in fallback), *pieces]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return wrapped(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")


def model_for(tokenizer, family="gpt2", **settings):
    sizes = {"n_positions": 256} if family == "gpt2" else {"max_position_embeddings": 256}
    model = tiny_model(family, vocab_size=len(tokenizer), **sizes, **settings).double()
    if family == "gpt2":
        model.set_attn_implementation("eager")  # float64 throughout; the fused kernel rounds to about 1e-9
    return model


@pytest.fixture(scope="module")
def words():
    return train_bpe([TEXT * 3], 330)


@pytest.fixture(scope="module")
def lms(words):
    found = {}

    def make(family):
        if family not in found:
            found[family] = ByteLevelLM(model_for(words, family), words, renormalise=True)
        return found[family]

    return make


# -- against enumeration -----------------------------------------------------------------------------------------

SPACES = bpe([" ", "a", "b", " a", "  "], [(" ", "a"), (" ", " ")], split=True)
QUOTES = bpe(["'", "r", "e", "a", "re", "'r"], [("'", "r"), ("r", "e")], split=True)
CASES = {
    "plain BPE": (bpe(["a", "b", "ab", "aab", "ba"], [("a", "b"), ("a", "ab"), ("b", "a")]), "ab", 5, 16, b""),
    "blanks before words": (SPACES, " ab", 4, 10, b""),
    "contractions": (QUOTES, "'rea", 3, 7, b""),
    "SentencePiece": (
        sentencepiece(["▁", "a", "é", "▁a", "aé"], [("▁", "a"), ("a", "é")], [0xC3, 0x9F]),
        ["a", "é", "ß", " "],
        5,
        7,
        b" ",
    ),
    "Metaspace": (
        sentencepiece(["▁", "a", "é", "▁a", "aé"], [("▁", "a"), ("a", "é")], [0xC3, 0x9F], metaspace=True),
        ["a", "é", "ß", " "],
        5,
        7,
        b" ",
    ),
}


def encodings(tokenizer, alphabet, depth, longest):
    """Every sequence of at most ``depth`` tokens that begins the encoding of some text, and those that are whole ones.

    Independent of the method: the texts of up to ``longest`` characters are encoded, all of them.
    """
    begins, whole = {()}, set()
    for length in range(longest + 1):
        texts = ["".join(letters) for letters in itertools.product(alphabet, repeat=length)]
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
            begins.update(tuple(ids[:k]) for k in range(1, min(depth, len(ids)) + 1))
            if len(ids) <= depth:
                whole.add(tuple(ids))
    return begins, whole


def enumerate_texts(model, tokenizer, begins, whole, depth):
    """[(tokens, ended, mass)] of all sequences of ``depth`` tokens, or fewer and an end; masses sum to 1."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    level, finished = {(): 1.0}, []
    for _ in range(depth):
        with torch.no_grad():
            probs = model(torch.tensor([[bos, *t] for t in level])).logits[:, -1].softmax(-1)
        following = {}
        for (sequence, mass), row in zip(level.items(), probs, strict=True):
            allowed = [v for v in range(len(tokenizer)) if (*sequence, v) in begins]
            ends = sequence in whole
            total = float(row[allowed].sum()) + (float(row[eos]) if ends else 0.0)
            if ends:
                finished.append((sequence, mass * float(row[eos]) / total))
            for token in allowed:
                following[(*sequence, token)] = mass * float(row[token]) / total
        level = following
    return finished, list(level.items())


@pytest.mark.parametrize("case", CASES)
def test_equals_the_sum_over_all_token_strings(case):
    tokenizer, alphabet, depth, longest, before = CASES[case]
    model = model_for(tokenizer)
    lm, view = ByteLevelLM(model, tokenizer, renormalise=True), TokenBytes(tokenizer)
    begins, whole = encodings(tokenizer, alphabet, depth, longest)
    finished, open_ = enumerate_texts(model, tokenizer, begins, whole, depth)
    spelled = [(b"".join(view.bytes_of(v) for v in t), mass, True) for t, mass in finished]
    spelled += [(b"".join(view.bytes_of(v) for v in t), mass, False) for t, mass in open_]
    assert sum(mass for _, mass, _ in spelled) == pytest.approx(1.0)

    def marginal(data):
        return sum(mass for found, mass, _ in spelled if found.startswith(data))

    texts = ["".join(t) for n in range(depth) for t in itertools.product(alphabet, repeat=n)]
    texts = [text for text in texts if len(before + text.encode()) < depth]
    if before and "Metaspace" in case:
        texts = [text for text in texts if not text.startswith(" ")]  # the same text as without its blank
    assert len(texts) > 3
    for text in texts:
        data = before + text.encode()
        found = lm.next_byte_logprobs(lm.start(text)).exp()
        for byte in range(256):
            assert float(found[byte]) == pytest.approx(marginal(data + bytes([byte])) / marginal(data), abs=1e-10)
        ended = sum(mass for s, mass, ends in spelled if ends and s == data)
        assert float(found[END]) == pytest.approx(ended / marginal(data), abs=1e-10)
        assert lm.logprob(text.encode()) == pytest.approx(math.log(marginal(data) / marginal(before)), abs=1e-10)


def test_a_source_with_a_known_answer_comes_back_and_the_plain_encoding_misses_it():
    g = torch.Generator().manual_seed(3)
    chain = ByteChain.random(b"abcde", g)
    text = chain.sample(20_000, g)
    tokenizer = train_bpe([text.decode()], 259 + 24, split_words=False)
    lm = ByteLevelLM(induced_model(chain, tokenizer, torch.float64), tokenizer)
    state, biased = lm.start(b""), 0.0
    for at in range(60):
        found = lm.next_byte_logprobs(state).exp()
        torch.testing.assert_close(found, chain.next_row(text[:at]), atol=1e-8, rtol=0)
        if at:
            cold = lm.next_byte_logprobs(lm.start(text[:at])).exp()
            torch.testing.assert_close(cold, found, atol=1e-8, rtol=0)
            biased = max(biased, float((plain_next_byte(lm, text[:at]).exp() - found).abs().max()))
        assert lm.leaked(state) == pytest.approx(0.0, abs=1e-12)
        state = lm.advance(state, text[at])
    assert biased > 0.3


def test_the_induced_token_model_is_the_encoded_chain():
    g = torch.Generator().manual_seed(5)
    chain = ByteChain.random(b"ab", g, sharpness=0.5)
    text = chain.sample(60_000, g).decode()
    tokenizer = train_bpe([text], 259 + 5, split_words=False)
    table = induced_model(chain, tokenizer, torch.float64).table.weight.exp()
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    for token in ids.unique():
        follows = ids[1:][ids[:-1] == token]
        if len(follows) == 0:  # the very last token
            continue
        counted = torch.bincount(follows, minlength=len(tokenizer)) / len(follows)
        # four standard errors of a share of 1/2
        assert float((counted - table[token]).abs().max()) < 4 * 0.5 / len(follows) ** 0.5


# -- the process on every family ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CORE)
def test_advancing_equals_a_cold_start_and_obeys_the_chain_rule(lms, family):
    lm, text = lms(family), TEXT[:34]
    state, total = lm.start(text[:3]), 0.0
    for at in range(3, len(text)):
        warm, cold = lm.next_byte_logprobs(state), lm.next_byte_logprobs(lm.start(text[:at]))
        torch.testing.assert_close(warm, cold, atol=ROUNDING, rtol=0)
        assert float(warm.exp().sum()) == pytest.approx(1.0, abs=1e-12)
        total += float(warm[text.encode()[at]])
        state = lm.advance(state, text.encode()[at])
    assert lm.logprob(text[3:].encode(), text[:3].encode()) == pytest.approx(total, abs=20 * ROUNDING)


@pytest.mark.parametrize("family", CORE)
def test_several_texts_at_once_equal_each_alone(lms, family):
    lm = lms(family)
    together = lm.start(PROMPTS)
    alone = [lm.start(prompt) for prompt in PROMPTS]
    bytes_ = [b"iev", b"dre", b" y ", b"re ", b"lue"]
    for step in range(3):
        found = lm.next_byte_logprobs(together)
        for row, state in zip(found, alone, strict=True):
            torch.testing.assert_close(row, lm.next_byte_logprobs(state), atol=ROUNDING, rtol=0)
        together = lm.advance(together, [b[step] for b in bytes_])
        alone = [lm.advance(state, b[step]) for state, b in zip(alone, bytes_, strict=True)]
    assert lm.generate(PROMPTS, 6) == [lm.generate(prompt, 6) for prompt in PROMPTS]
    lengths = [prompt.encode() for prompt in PROMPTS]
    assert lm.logprob(bytes_, lengths) == pytest.approx(
        [lm.logprob(b, c) for b, c in zip(bytes_, lengths, strict=True)]
    )


def test_a_state_can_be_branched_from_and_selected(lms):
    lm = lms("llama")
    state = lm.start(PROMPTS)
    before = lm.next_byte_logprobs(state).clone()
    one = lm.advance(state, [ord(c) for c in "idyr "])
    other = lm.advance(state, [ord(c) for c in "xxxxx"])
    torch.testing.assert_close(lm.next_byte_logprobs(state), before, atol=0, rtol=0)
    chosen = lm.advance(lm.select(one, [2, 0, 2]), [ord("a")] * 3)
    for row, text in enumerate([PROMPTS[2] + "ya", PROMPTS[0] + "ia", PROMPTS[2] + "ya"]):
        expected = lm.next_byte_logprobs(lm.start(text))
        torch.testing.assert_close(lm.next_byte_logprobs(chosen)[row], expected, atol=ROUNDING, rtol=0)
    assert not torch.equal(lm.next_byte_logprobs(other), lm.next_byte_logprobs(one))


def test_a_sliding_window_and_a_model_without_cache_give_the_same(words):
    model = model_for(words, "mistral", sliding_window=5)
    lm = ByteLevelLM(model, words)
    uncached = ByteLevelLM(model, words, caching=False)
    text = TEXT[:30]
    state, other = lm.start([text[:9], text[:20]]), uncached.start([text[:9], text[:20]])
    for step in range(8):
        found = lm.next_byte_logprobs(state)
        torch.testing.assert_close(found, uncached.next_byte_logprobs(other), atol=ROUNDING, rtol=0)
        bytes_ = [text.encode()[9 + step], text.encode()[20 + step]]
        state, other = lm.advance(state, bytes_), uncached.advance(other, bytes_)


def test_half_precision_runs_and_stays_a_distribution(words):
    lm = ByteLevelLM(model_for(words, "qwen2").to(torch.bfloat16), words)
    found = lm.next_byte_logprobs(lm.advance(lm.start(PROMPTS), [ord("e")] * len(PROMPTS)))
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(PROMPTS)).double())


# -- where the correction vanishes, and where it must not --------------------------------------------------------


@pytest.mark.parametrize("family", CORE)
def test_with_one_token_a_byte_it_is_the_model_itself(family):
    tokenizer = byte_tokenizer()
    model = model_for(tokenizer, family)
    with torch.no_grad():
        ids = torch.tensor([[1, *tokenizer.encode("some text", add_special_tokens=False)]])
        logits = model(ids).logits[0, -1]
    expected = torch.cat([logits[3:259], logits[2:3]]).log_softmax(-1)
    lm = ByteLevelLM(model, tokenizer, "off")
    torch.testing.assert_close(lm.next_byte_logprobs(lm.start("some text")), expected, atol=ROUNDING, rtol=0)
    torch.testing.assert_close(plain_next_byte(lm, "some text"), expected, atol=ROUNDING, rtol=0)
    exact = ByteLevelLM(model, tokenizer)  # the same, but for the bytes with which no character begins
    begins = torch.ones(257, dtype=torch.bool)
    begins[[*range(0x80, 0xC2), *range(0xF5, 0x100)]] = False
    masked = expected.masked_fill(~begins, -torch.inf).log_softmax(-1)
    torch.testing.assert_close(exact.next_byte_logprobs(exact.start("some text")), masked, atol=ROUNDING, rtol=0)


def test_where_no_token_can_cross_the_cut_the_plain_encoding_is_right():
    tokenizer = bpe(
        ["a", "b", "1", "2", "ab", "12", "1a"], [("a", "b"), ("1", "2"), ("1", "a")], pre=pre_tokenizers.Digits(True)
    )
    lm = ByteLevelLM(model_for(tokenizer), tokenizer)
    covers = lm.cover("ab1")
    assert [c.data for c in covers] == [b""]
    assert covers[0].ids == encode_prompt(lm, "ab1")
    plain = plain_next_byte(lm, "ab1")
    exact = lm.next_byte_logprobs(lm.start("ab1"))
    # of what may follow, the plain estimate also counts the tokens 12 and 1a, which the digits rule out
    logits = run_prefixes(lm.model, [encode_prompt(lm, "ab1")]).logits[0, -1]
    names = ["a", "b", "1", "2", "ab"]
    ids = {n: tokenizer.convert_tokens_to_ids(n) for n in names} | {"end": 2}
    probs = logits[list(ids.values())].softmax(-1)
    expected = {"a": probs[0] + probs[4], "b": probs[1], "1": probs[2], "2": probs[3]}
    for symbol, value in expected.items():
        assert float(exact[ord(symbol)].exp()) == pytest.approx(float(value))
    assert float(exact[END].exp()) == pytest.approx(float(probs[5]))
    assert float((plain - exact).abs().nan_to_num(0).max()) > 0.01


def test_tokens_that_begin_several_tokens_back_are_counted():
    tokenizer = bpe(["a", "b", "c", "ab", "abc", "abcab"], [("a", "b"), ("ab", "c"), ("abc", "ab")])
    lm = ByteLevelLM(model_for(tokenizer), tokenizer)
    lasts = {(lm.tokens.bytes_of(c.ids[-1]), len(c.ids)) for c in lm.cover("abca")}
    assert (b"abcab", 2) in lasts  # begins before both tokens of enc("abca") = [abc][a]
    assert encode_prompt(lm, "abca")[1:] == [7, 3]
    assert sum(math.exp(c.log_prob) for c in lm.cover("abca")) == pytest.approx(1.0)


def test_blanks_before_a_word_without_merge_keep_their_probability():
    # enc("a  ") is [a][  ], but the text "a  b" is [a][ ][ ][b]: two sequences end with the same text
    lm = ByteLevelLM(model_for(SPACES), SPACES)
    state = lm.start("a  ")
    assert {tuple(lm.tokens.bytes_of(v) for v in s.tokens) for s in state.rows[0].sources} == {
        (b"  ",),
        (b" ", b" "),
    }
    assert float(lm.next_byte_logprobs(state)[ord("b")]) > -8
    off = ByteLevelLM(model_for(SPACES), SPACES, "off")
    assert float(off.next_byte_logprobs(off.start("a  "))[ord("b")]) > -8


def test_the_default_is_the_paper_s_sum_over_covers_normalised_once():
    tokenizer = CASES["plain BPE"][0]
    model = model_for(tokenizer)
    lm = ByteLevelLM(model, tokenizer)
    state = lm.start("aa")

    def token_probability(ids):
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        return float(log_probs.gather(1, torch.tensor(ids)[1:, None]).sum().exp())

    covers = [c.ids for c in lm.cover("aa")]
    masses = {n: sum(token_probability(c.ids) for c in lm.cover("aa" + n)) for n in "ab"}
    ended = token_probability([*encode_prompt(lm, "aa"), tokenizer.eos_token_id])
    total = sum(masses.values()) + ended
    found = lm.next_byte_logprobs(state).exp()
    assert float(found[ord("a")]) == pytest.approx(masses["a"] / total, abs=1e-12)
    assert float(found[END]) == pytest.approx(ended / total, abs=1e-12)
    assert lm.logprob(b"b", b"aa") == pytest.approx(math.log(masses["b"] / sum(map(token_probability, covers))))
    state = lm.advance(lm.advance(state, ord("b")), ord("a"))
    torch.testing.assert_close(
        lm.next_byte_logprobs(state), lm.next_byte_logprobs(lm.start("aaba")), atol=1e-12, rtol=0
    )
    proper = ByteLevelLM(model, tokenizer, renormalise=True)
    assert not torch.allclose(found, proper.next_byte_logprobs(proper.start("aa")).exp(), atol=1e-3)


def test_masked_mass_is_reported_and_without_masks_it_stays():
    tokenizer = CASES["plain BPE"][0]
    model = model_for(tokenizer)
    lm = ByteLevelLM(model, tokenizer)
    state = lm.start("aa")
    source = state.rows[0].sources[0]
    probs = run_prefixes(model, [[*state.rows[0].base, *source.tokens]]).logits[0, -1].softmax(-1)
    view = lm.tokens
    text = b"".join(view.bytes_of(t) for t in source.tokens)
    good = [
        v
        for v in range(3, len(tokenizer))
        if tokenizer.encode((text + view.bytes_of(v)).decode(), add_special_tokens=False) == [*source.tokens, v]
    ]
    assert lm.leaked(state) == pytest.approx(1 - float(probs[[*good, 2]].sum()))
    assert lm.leaked(state) > 0.05
    off = ByteLevelLM(model, tokenizer, "off")
    assert off.leaked(off.start("aa")) == 0.0
    assert not torch.allclose(off.next_byte_logprobs(off.start("aa")), lm.next_byte_logprobs(state), atol=1e-3)


# -- validity ----------------------------------------------------------------------------------------------------


def test_pairs_decide_for_bpe_without_pre_tokenizer():
    tokenizer = train_bpe([TEXT * 3], 420, split_words=False)
    view = TokenBytes(tokenizer)
    exact = Validity(view)
    g = torch.Generator().manual_seed(0)
    ascii_ = [t for t in range(view.size) if (d := view.bytes_of(t)) and max(d) < 128]
    drawn = torch.randint(len(ascii_), (2000, 2), generator=g).tolist()
    agreed = set()
    for a, b in drawn:
        u, v = ascii_[a], ascii_[b]
        expected = tokenizer.encode((view.bytes_of(u) + view.bytes_of(v)).decode(), add_special_tokens=False) == [u, v]
        assert exact.accepts((u,), v) == expected
        agreed.add(expected)
    assert agreed == {True, False}
    # and a sequence is valid exactly if its pairs are
    for row in torch.randint(len(ascii_), (3000, 4), generator=g).tolist():
        ids = [ascii_[i] for i in row]
        text = b"".join(view.bytes_of(t) for t in ids).decode()
        pairs = all(exact.accepts((u,), v) for u, v in itertools.pairwise(ids)) and exact.accepts((), ids[0])
        assert pairs == (tokenizer.encode(text, add_special_tokens=False) == ids)


@pytest.mark.parametrize("mode", ["exact", "pairwise"])
def test_every_encoding_is_accepted_token_by_token(words, mode):
    view = TokenBytes(words)
    validity = Validity(view, mode)
    texts = [
        TEXT,
        "they're they've I'll x'r 'l 'v  'e",
        "a \n  \n\n b\t\tc  ",
        "naïve 日本語 \u2003x \u00a0y 🙂",
        "1234 5,6",
    ]
    for text in texts:
        tail, data = (), b""
        for token in view.encode_bytes(text.encode()):
            assert validity.accepts(tail, token), (text, data, view.bytes_of(token))
            assert validity.mask(tail)[token]
            data += view.bytes_of(token)
            tail = validity.tail((*tail, token))
        assert validity.may_end(tail)


def test_masks_agree_with_single_answers_and_are_remembered(words):
    validity = Validity(TokenBytes(words))
    for text in ("retr", "node  ", "they'r", "é"):
        tail = validity.tail(tuple(validity.tokens.encode_bytes(text.encode())))
        mask = validity.mask(tail)
        fresh = Validity(validity.tokens)
        assert mask.tolist() == [fresh.accepts(tail, token) for token in range(validity.tokens.size)]
        assert validity.mask(tail) is mask
        assert not mask[:3].any()


PATTERNS = {
    "built in": None,
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "with case": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+|\p{L}+",
    "ranges": r"[!\"#'()*+,\-./:;<=>?\[\\\]^_]?[A-Za-z]+|'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+|\p{N}",
    "looks back": r"(?<=a)b|\p{L}+|[^\p{L}]",
    "none": "",
}
"""How published decoders cut texts, one that no decoder has, and nothing."""
ATOMS = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "'",
    "\u2019",
    "s",
    "re",
    "LL",
    "'S",
    "a",
    "B",
    "foo",
    "Foo",
    "12",
    "!",
    "?.",
    "/",
    "\u00a0",
]
ATOMS += ["é", "e\u0301", "x\u0301", "日", "ひ", "ß", "🙂", "_", " A", " !", "aa", "aaa"]


def drawn_text(g, longest):
    count = int(torch.randint(longest + 1, (1,), generator=g))
    return "".join(ATOMS[i] for i in torch.randint(len(ATOMS), (count,), generator=g).tolist())


def trained(pattern, g, *, normal=False, words_first=False, size=620):
    backend = Tokenizer(models.BPE(ignore_merges=words_first))
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    backend.pre_tokenizer = own
    if pattern:
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), own])
    names = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=names, initial_alphabet=own.alphabet(), show_progress=False
    )
    backend.train_from_iterator([drawn_text(g, 40) for _ in range(1200)], trainer)
    if normal:
        backend.normalizer = normalizers.NFC()
    return wrapped(backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


@pytest.mark.parametrize("normal", [False, True])
@pytest.mark.parametrize("words_first", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_whole_masks_are_what_asking_token_by_token_gives(pattern, words_first, normal):
    g = torch.Generator().manual_seed(11)
    view = TokenBytes(trained(PATTERNS[pattern], g, normal=normal, words_first=words_first))
    assert view.composed == normal
    assert view.words_first == words_first
    bulk, slow = Validity(view), Validity(view)
    answers = set()
    for _ in range(12):
        ids, tail = view.encode_bytes(unicodedata.normalize("NFC", drawn_text(g, 6)).encode()), ()
        for token in ids[: int(torch.randint(len(ids) + 1, (1,), generator=g))]:
            tail = slow.tail((*tail, token))
        mask = bulk.mask(tail).tolist()
        asked = [slow.accepts(tail, token) for token in range(view.size)]
        assert mask == asked, [view.bytes_of(t) for t in tail]
        answers |= set(asked)
    assert answers == {True, False}


@pytest.mark.parametrize("case", CASES)
def test_whole_masks_of_small_and_sentencepiece_vocabularies(case):
    view = TokenBytes(CASES[case][0])
    bulk, slow = Validity(view), Validity(view)
    for length in range(3):
        for sequence in itertools.product([t for t in range(view.size) if view.bytes_of(t)], repeat=length):
            tail = slow.tail(sequence)
            if all(slow.accepts(slow.tail(sequence[:k]), sequence[k]) for k in range(length)):
                assert bulk.mask(tail).tolist() == [slow.accepts(tail, token) for token in range(view.size)]


def test_neighbours_are_those_that_the_merges_leave_apart():
    g = torch.Generator().manual_seed(2)
    view = TokenBytes(trained("", g, size=500))
    pairs = Pairs(view)
    textual = [t for t in range(view.size) if view.bytes_of(t)]
    for u in [textual[i] for i in torch.randperm(len(textual), generator=g)[:60].tolist()]:
        expected = [
            bool(view.bytes_of(v)) and view.cut(view.spell(view.bytes_of(u) + view.bytes_of(v))) == (u, v)
            for v in range(view.size)
        ]
        assert pairs.follows(u).tolist() == expected
    assert not pairs.unsure.any()


def test_merges_in_an_order_that_no_training_gives_are_asked_for_one_by_one():
    # "ab" is made after the merge that uses it has had its turn
    odd = bpe(["a", "b", "c", "ab", "abc", "bc"], [("ab", "c"), ("b", "c"), ("a", "b"), ("a", "bc")])
    view = TokenBytes(odd)
    assert view.merges.shape == (4, 3)
    bulk, slow = Validity(view), Validity(view)
    for tail in [(), *((t,) for t in range(3, view.size))]:
        assert bulk.mask(tail).tolist() == [slow.accepts(tail, token) for token in range(view.size)]
    reverse = bpe(["a", "b", "c", "ab", "abc"], [("ab", "c"), ("a", "b")])
    assert Pairs(TokenBytes(reverse)).unsure.tolist() == [False] * 7 + [True]


def test_shapes_tell_apart_what_a_pattern_names():
    parts = [{"type": "Split", "pattern": {"Regex": PATTERNS["llama3"]}}]
    letters = set("abreéX1! \r'日")
    alphabet = Alphabet(parts, letters)
    same = lambda a, b, quote=False: alphabet.shape(a, after_quote=quote) == alphabet.shape(b, after_quote=quote)  # noqa: E731
    assert same("re", "ab")
    assert same("ré", "X日")
    assert not same("ab", "a1")
    assert not same("a\r", "a ")
    assert not same("re", "ab", quote=True)
    assert same("abre", "abab", quote=True)
    assert not same("'re", "'ab")
    assert same("1", "1")
    for pattern in (r"(?<=a)b", r"(?i)ab", r"[a-z&&[^b]]", r"\bfoo", r"[[a]b]"):
        with pytest.raises(UnknownPattern):
            Alphabet([{"type": "Split", "pattern": {"Regex": pattern}}], letters)
    with pytest.raises(UnknownPattern):
        Alphabet([{"type": "UnicodeScripts"}], letters)


# -- composed text ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def composing():
    tokenizer = train_bpe(["cafe e\u0301 é naïve x\u0301 \uac00 \u1100\u1161\u11a8 " * 30], 360)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def test_under_nfc_no_sequence_counts_that_the_encoder_would_compose(composing):
    validity = Validity(TokenBytes(composing))
    encode = validity.tokens.encode_bytes
    bytes_ = lambda text: tuple(validity.tokens.ids_of[bytes([byte])][0] for byte in text.encode())  # noqa: E731
    cases = (("e", "\u0301"), ("\uac00", "\u11a8"), ("a\u0323", "\u0301"), ("a\u0301", "\u0323"))
    for base, mark in cases:  # marks that compose, jamo, a mark after another, a mark that belongs before another
        start = tuple(encode(unicodedata.normalize("NFC", base).encode()))
        tail, fits = validity.tail(start), []
        for token in bytes_(mark):
            fits.append(validity.accepts(tail, token))
            assert bool(validity.mask(tail)[token]) == fits[-1]
            tail = validity.tail((*tail, token))
        assert not all(fits)
    tail = ()
    for token in encode("x\u0301 e\u0305".encode()):  # these have no composed form
        assert validity.accepts(tail, token)
        assert validity.mask(tail)[token]
        tail = validity.tail((*tail, token))
    whole = {t for t in range(validity.tokens.size) if validity.tokens.bytes_of(t) == "\u0301".encode()}
    for token in whole:
        assert not validity.mask(validity.tail(tuple(encode(b"cafe"))))[token]
        assert not validity.accepts(validity.tail(tuple(encode(b"cafe"))), token)


def test_under_nfc_probabilities_keep_to_composed_text(composing):
    lm = ByteLevelLM(model_for(composing, "qwen2"), composing)
    with pytest.raises(ValueError, match="NFC"):
        lm.start("cafe\u0301")
    state = lm.start("caf")
    for byte in b"e" + "\u0301".encode()[:1]:
        state = lm.advance(state, byte)
    found = lm.next_byte_logprobs(state).exp()
    assert float(found.sum()) == pytest.approx(1.0)
    assert float(found[0x81]) == 0.0  # e with an acute is written as one character
    assert float(found[0x85]) > 0.0  # e with an overline has no such character
    composed = lm.start("caf\u00e9")
    assert composed.texts == ["caf\u00e9".encode()]
    with pytest.raises(ValueError, match="probability zero"):
        lm.advance(state, 0x81)


# -- unfinished characters ---------------------------------------------------------------------------------------


def test_a_character_cut_between_its_bytes(words):
    lm = ByteLevelLM(model_for(words, "llama"), words)
    data = "é日🙂".encode()
    state = lm.start(b"x " + data[:1])
    for at in range(1, len(data)):
        found = lm.next_byte_logprobs(state).exp()
        assert float(found.sum()) == pytest.approx(1.0)
        if data[at] & 0xC0 == 0x80:  # inside a character only a continuation may follow, and no end
            assert float(found[0x80:0xC0].sum()) == pytest.approx(1.0)
        torch.testing.assert_close(
            found, lm.next_byte_logprobs(lm.start(b"x " + data[:at])).exp(), atol=ROUNDING, rtol=0
        )
        state = lm.advance(state, data[at])
    with pytest.raises(ValueError, match="probability zero"):
        lm.advance(state, 0x80)


def test_sentencepiece_falls_back_to_bytes_only_for_characters_it_lacks():
    tokenizer = CASES["SentencePiece"][0]
    lm = ByteLevelLM(model_for(tokenizer), tokenizer)
    spelled = {tuple(lm.tokens.bytes_of(v) for v in c.ids[1:]) for c in lm.cover("é".encode())}
    assert (b" ", "é".encode()) in spelled
    assert (b" ", b"\xc3", b"\xa9") not in spelled
    found = lm.next_byte_logprobs(lm.start(b"a" + b"\xc3")).exp()
    assert set(found.nonzero()[:, 0].tolist()) == {0xA9, 0x9F}
    assert lm.start("a").texts == [b" a"]


# -- back to tokens, sampling, ends ------------------------------------------------------------------------------


def test_a_drawn_cover_has_its_share_and_goes_on_as_the_model(lms):
    lm = lms("gpt2")
    state = lm.start("def retr")
    shares = {tuple(c.ids): math.exp(c.log_prob) for c in lm.covers_of(state)}
    assert sum(shares.values()) == pytest.approx(1.0)
    g = torch.Generator().manual_seed(1)
    drawn = [tuple(lm.to_tokens(state, generator=g).ids) for _ in range(400)]
    for ids, share in shares.items():
        assert drawn.count(ids) / 400 == pytest.approx(share, abs=4 * (share * (1 - share) / 400) ** 0.5 + 1e-9)
    # the next byte after a drawn cover is distributed as the exact one
    mixed = torch.zeros(257, dtype=torch.float64)
    for cover in lm.covers_of(state):
        if cover.data:
            mixed[cover.data[0]] += math.exp(cover.log_prob)
        else:
            logits = run_prefixes(lm.model, [cover.ids]).logits[0, -1]
            allowed = lm.validity.mask(state.rows[0].sources[0].tail).nonzero()[:, 0]
            probs = torch.cat([logits[allowed], logits[2:3]]).softmax(-1) * math.exp(cover.log_prob)
            for token, p in zip(allowed.tolist(), probs[:-1], strict=True):
                mixed[lm.tokens.bytes_of(token)[0]] += p
            mixed[END] += probs[-1]
    torch.testing.assert_close(mixed, lm.next_byte_logprobs(state).exp(), atol=ROUNDING, rtol=0)


def test_sampling_is_reproducible_and_obeys_its_dials(lms):
    lm = lms("llama")
    one = lm.generate(PROMPTS, 8, temperature=1.0, generator=torch.Generator().manual_seed(7))
    again = lm.generate(PROMPTS, 8, temperature=1.0, generator=torch.Generator().manual_seed(7))
    other = lm.generate(PROMPTS, 8, temperature=1.0, generator=torch.Generator().manual_seed(8))
    assert one == again != other
    cold = lm.generate(PROMPTS, 8, temperature=1e-4, generator=torch.Generator().manual_seed(7))
    assert cold == lm.generate(PROMPTS, 8)
    assert cold == lm.generate(PROMPTS, 8, temperature=1.0, top_p=1e-6, generator=torch.Generator().manual_seed(7))
    state = lm.start(PROMPTS[0])
    g = torch.Generator().manual_seed(0)
    first = [lm.generate(PROMPTS[0], 1, temperature=0.5, generator=g) for _ in range(300)]
    sharpened = (2 * lm.next_byte_logprobs(state)).softmax(-1)
    best = int(sharpened.argmax())
    p = float(sharpened[best])
    expected = bytes([best]) if best < 256 else b""
    assert first.count(expected) / 300 == pytest.approx(p, abs=4 * (p * (1 - p) / 300) ** 0.5)


def test_a_text_that_ends_stops_growing_and_the_others_go_on(words):
    model = model_for(words, "llama")
    lm = ByteLevelLM(model, words)
    free = lm.generate(PROMPTS, 10)
    stopped = lm.generate(PROMPTS, 10, stop=lambda made: len(made) == 3)
    assert stopped == [t[:3] for t in free]
    with torch.no_grad():
        model.lm_head.weight[words.eos_token_id] += (
            40
            * model.lm_head.weight.std()
            * torch.randn(32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        )
    ending = ByteLevelLM(model, words)
    together = ending.generate(PROMPTS, 10)
    assert together == [ending.generate(prompt, 10) for prompt in PROMPTS]
    assert len({len(t) for t in together}) > 1
    assert max(map(len, free)) == 10


# -- ensembles ---------------------------------------------------------------------------------------------------


def test_a_model_averaged_with_itself_is_the_model(lms):
    lm = lms("qwen3")
    pair = ByteEnsemble([lm, lm])
    torch.testing.assert_close(
        pair.next_byte_logprobs(pair.start(PROMPTS)), lm.next_byte_logprobs(lm.start(PROMPTS)), atol=1e-12, rtol=0
    )
    assert pair.generate(PROMPTS, 5) == lm.generate(PROMPTS, 5)
    assert pair.logprob(b"ieve", b"def retr") == pytest.approx(lm.logprob(b"ieve", b"def retr"), abs=10 * ROUNDING)


def test_models_with_different_vocabularies_meet_at_bytes(lms, words):
    other = train_bpe([TEXT], 300, split_words=False)
    members = [lms("gpt2"), ByteLevelLM(model_for(other, "llama", seed=4), other)]
    pair = ByteEnsemble(members, [3, 1])
    state = pair.start(PROMPTS)
    for step in range(4):
        each = [m.next_byte_logprobs(s).exp() for m, s in zip(members, state, strict=True)]
        expected = 0.75 * each[0] + 0.25 * each[1]
        torch.testing.assert_close(pair.next_byte_logprobs(state).exp(), expected, atol=1e-12, rtol=0)
        state = pair.advance(state, [b"ieve"[step]] * len(PROMPTS))
    texts, contexts = [b"ieve(", b"", b"d"], [b"def retr", b"x", b"for node in"]
    alone = [pair.logprob(t, c) for t, c in zip(texts, contexts, strict=True)]
    assert pair.logprob(texts, contexts) == pytest.approx(alone)
    by_hand, data = 0.0, b"def retr"
    for byte in b"ieve(":
        by_hand += float(pair.next_byte_logprobs(pair.start(data))[byte])
        data += bytes([byte])
    assert alone[0] == pytest.approx(by_hand, abs=10 * ROUNDING)


# -- baselines ---------------------------------------------------------------------------------------------------


def test_baselines_are_what_the_token_model_says(lms):
    lm = lms("llama")
    for prompt in PROMPTS:
        ids = encode_prompt(lm, prompt)
        last = lm.tokens.bytes_of(ids[-1])
        with torch.no_grad():
            healed, plain = lm.model(torch.tensor([ids])).logits[0, -2:].softmax(-1)
        expected = torch.zeros(257, dtype=torch.float64)
        first = torch.zeros(257, dtype=torch.float64)
        for token in range(lm.tokens.size):
            data = lm.tokens.bytes_of(token)
            if data:
                first[data[0]] += plain[token]
            if data and data.startswith(last) and data != last:
                expected[data[len(last)]] += healed[token]
        first[END] += plain[2]
        first /= first.sum()
        expected += healed[ids[-1]] * first
        torch.testing.assert_close(plain_next_byte(lm, prompt).exp(), first, atol=ROUNDING, rtol=0)
        torch.testing.assert_close(healed_next_byte(lm, prompt).exp(), expected / expected.sum(), atol=ROUNDING, rtol=0)
    together = healed_next_byte(lm, PROMPTS)
    torch.testing.assert_close(together[1], healed_next_byte(lm, PROMPTS[1]), atol=ROUNDING, rtol=0)


def test_healed_generation_spells_what_was_taken_back(lms):
    lm = lms("qwen2")
    healed = token_healing(lm, PROMPTS)
    settings = {"attention_mask": healed.attention_mask, "do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    settings |= {"logits_processor": LogitsProcessorList([healed.processor]), "eos_token_id": -1}
    out = lm.model.generate(healed.input_ids, **settings)[:, healed.input_ids.shape[1] :]
    ours = greedy(lm.model, healed.input_ids, healed.attention_mask, max_new_tokens=4, processors=[healed.processor])
    assert torch.equal(out, ours.tokens)
    for row, prompt in zip(out.tolist(), PROMPTS, strict=True):
        text = b"".join(lm.tokens.bytes_of(t) or b"" for t in row[:1])
        assert text.startswith(lm.tokens.bytes_of(encode_prompt(lm, prompt)[-1]))


# -- infilling ---------------------------------------------------------------------------------------------------


def test_infilling_prompts_put_the_cut_word_last():
    marks = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]
    tokenizer = train_bpe([TEXT * 3], 340, specials=marks)
    lm = ByteLevelLM(model_for(tokenizer, "llama"), tokenizer)
    ids = FillTokens.of(tokenizer)
    pre, suf, mid = (tokenizer.convert_tokens_to_ids(m) for m in marks)
    assert (ids.prefix, ids.suffix, ids.middle) == (pre, suf, mid)
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    before, text = infilling_prompt(lm, "def retr", "(self)", ids)
    assert (before, text) == ([1, pre, suf, *encode("(self)"), mid], "def retr")
    state = lm.start(text, prefix_ids=before)
    assert state.rows[0].base[: len(before)] == tuple(before)
    # the exact sum over what may follow the cut: chain rule against whole words
    whole = lm.start("def retrieve", prefix_ids=before)
    total = state
    mass = 0.0
    for byte in b"ieve":
        mass += float(lm.next_byte_logprobs(total)[byte])
        total = lm.advance(total, byte)
    torch.testing.assert_close(lm.next_byte_logprobs(total), lm.next_byte_logprobs(whole), atol=ROUNDING, rtol=0)
    before, text = infilling_prompt(lm, "def retr", "(self)", ids, order="psm")
    assert (before, text) == ([1, pre, *encode("def"), suf, *encode("(self)"), mid], " retr")
    assert len(lm.generate(text, 3, prefix_ids=before)) <= 3
    with pytest.raises(ValueError, match="order must be"):
        infilling_prompt(lm, "a", "b", ids, order="mps")
    with pytest.raises(ValueError, match="no infilling tokens"):
        FillTokens.of(train_bpe([TEXT], 300))


# -- what is refused ---------------------------------------------------------------------------------------------


def test_bad_models_and_tokenizers_are_refused(words):
    model = model_for(words)
    with pytest.raises(ValueError, match="does not predict the next token"):
        ByteLevelLM(tiny_model("bert"), words)
    with pytest.raises(ValueError, match="do not match"):
        ByteLevelLM(tiny_model("gpt2"), words)
    with pytest.raises(ValueError, match="validity must be"):
        ByteLevelLM(model, words, "fast")
    with pytest.raises(ValueError, match="Unigram"):
        ByteLevelLM(model, train_unigram([TEXT], 300))
    wordpiece = Tokenizer(models.WordPiece(vocab={"a": 0, "##b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match="WordPiece"):
        ByteLevelLM(model, wrapped(wordpiece))
    lowered = train_bpe([TEXT], 300)
    lowered.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match="Lowercase"):
        ByteLevelLM(model, lowered)
    spaced = train_bpe([TEXT], 300)
    spaced.add_tokens([AddedToken("    ", normalized=False)])
    with pytest.raises(ValueError, match="added token"):
        ByteLevelLM(model, spaced)
    with pytest.raises(ValueError, match="eos_token_id"):
        ByteLevelLM(model, words, eos_token_id=5000)


def test_bad_texts_are_refused(lms, words):
    lm = lms("gpt2")
    with pytest.raises(ValueError, match="not UTF-8"):
        lm.start(b"a\xff")
    with pytest.raises(ValueError, match="empty list"):
        lm.start([])
    with pytest.raises(TypeError, match="text must hold str or bytes only, got int: 3"):
        lm.start([3])
    with pytest.raises(TypeError, match="text must be str or bytes, or a list of them; got NoneType"):
        lm.start(None)
    for process in (lm, ByteEnsemble([lm])):
        with pytest.raises(TypeError, match=r"text must be bytes.*got str: 'ieve'"):
            process.logprob("ieve", b"def retr")
        with pytest.raises(TypeError, match=r"context must be bytes.*got str: 'def retr'"):
            process.logprob(b"ieve", "def retr")
        with pytest.raises(TypeError, match="text must hold bytes only, got str"):
            process.logprob([b"ieve", "x"], b"def retr")
        with pytest.raises(ValueError, match="1 texts and 2 contexts"):
            process.logprob(b"ieve", [b"a", b"b"])
        with pytest.raises(ValueError, match="text is an empty list"):
            process.generate([], 4)
    with pytest.raises(ValueError, match=r"prefix_ids must lie in 0 \.\. 329.*\[99999\]"):
        lm.start("def", prefix_ids=[99999])
    with pytest.raises(ValueError, match="another tokenizer"):
        ByteLevelLM(model_for(byte_tokenizer()), byte_tokenizer(), lm.validity)
    with pytest.raises(ValueError, match=r"0 \.\. 255"):
        lm.advance(lm.start("a"), 256)
    with pytest.raises(ValueError, match="one for each"):
        lm.advance(lm.start("a"), [1, 2])
    with pytest.raises(ValueError, match="do not fit the model"):
        lm.start("a b " * 300)
    with pytest.raises(ValueError, match="max_new_bytes"):
        lm.generate("a", 0)
    with pytest.raises(ValueError, match="temperature"):
        lm.generate("a", 1, temperature=-1.0)
    with pytest.raises(ValueError, match="inside a character"):
        plain_next_byte(lm, "é".encode()[:1])
    with pytest.raises(ValueError, match="2 texts and 3 contexts"):
        lm.logprob([b"a", b"b"], [b"a", b"b", b"c"])
    small = bpe(["a", "b"], [])
    with pytest.raises(ValueError, match="does not survive"):
        ByteLevelLM(model_for(small), small).start("abc")


def test_without_a_first_token_a_single_word_cannot_be_predicted(words):
    bare = wrapped(words.backend_tokenizer, eos_token=EOS, pad_token=PAD)
    lm = ByteLevelLM(model_for(words), bare)
    with pytest.raises(ValueError, match="bos_token_id"):
        lm.start("retr")
    with pytest.raises(ValueError, match="bos_token_id"):
        lm.start("")
    assert float(lm.next_byte_logprobs(lm.start("def retr")).exp().sum()) == pytest.approx(1.0)
    given = ByteLevelLM(model_for(words), bare, bos_token_id=words.convert_tokens_to_ids(BOS))
    assert given.start("retr").rows[0].base == (1,)
    with pytest.raises(ValueError, match="no token to go on from"):
        token_healing(lm, "def")


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [math.inf, 1.0]])
def test_bad_weights_are_refused(lms, weights):
    lm = lms("gpt2")
    with pytest.raises(ValueError, match="weights must be 2"):
        ByteEnsemble([lm, lm], weights)
    with pytest.raises(ValueError, match="members is empty"):
        ByteEnsemble([])


def test_the_name_of_a_special_token_in_a_text_is_text(lms):
    lm = lms("gpt2")
    assert 2 not in encode_prompt(lm, "a<|eos|>b")[1:]
    assert lm.start("a<|eos|>b").texts == [b"a<|eos|>b"]


# -- the experiment's model that fills gaps ----------------------------------------------------------------------


def test_a_model_learns_to_fill_gaps_and_the_given_one_stays(words):
    documents = [TEXT * 8]
    model = tiny_model("llama", vocab_size=len(words), max_position_embeddings=256)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for recipe in (
        FillRecipe(steps=2, batch_size=2, length=32, segments=20),
        FillRecipe(steps=2, batch_size=2, length=32, segments=20, width=64, layers=1, vocabulary=300),  # as on a GPU
    ):
        filled, tokenizer = fill_model(model, words, documents, recipe, torch.Generator().manual_seed(3))
        marks = FillTokens.of(tokenizer)
        assert filled.get_output_embeddings().weight.shape[0] == len(tokenizer) > marks.middle
        gap = Gap((TEXT * 3).encode(), 0, 8, 12)
        made = fill_gap(ByteLevelLM(filled, tokenizer), marks, gap, 30)
        assert set(made) == {"plain", "token_healing", "exact"}
        assert all(b"\n" not in line for line in made.values())
        again, same = fill_model(filled, tokenizer, documents, recipe, torch.Generator())  # has marks: nothing to do
        assert again is filled
        assert same is tokenizer
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert len(words) == 330


def test_rearranged_segments_hold_prefix_and_middle_as_one_text():
    tokenizer = train_bpe([TEXT * 3], 340, specials=MARKS)
    recipe = FillRecipe(steps=1, share=1.0, segments=30)
    stream = fill_stream(tokenizer, [TEXT * 8], recipe, torch.Generator().manual_seed(0)).tolist()
    marks, count, at = FillTokens.of(tokenizer), 0, 0
    while at < len(stream):
        end = stream.index(tokenizer.eos_token_id, at)
        row = stream[at + 1 : end]
        assert row[:2] == [marks.prefix, marks.suffix]
        middle = row.index(marks.middle)
        suffix, before = (tokenizer.decode(part) for part in (row[2:middle], row[middle + 1 :]))
        assert before + suffix in TEXT * 8
        assert tokenizer.encode(before, add_special_tokens=False) == row[middle + 1 :]
        count, at = count + 1, end + 1
    assert count == 30
    with pytest.raises(ValueError, match="more than 600 characters"):
        fill_stream(tokenizer, ["short"], recipe, torch.Generator())
    assert compiles(b"x = 1\n")
    assert not compiles(b"x = (\n")
