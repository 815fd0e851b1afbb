"""The sentence encoder against a plain forward pass of the same weights, and its behaviour when parts are missing."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

from papertrial.feed import encoder
from papertrial.feed.encoder import EncoderUnavailable, SentenceEncoder, cached_graph, model_folder
from papertrial.feed.encoder_graph import WEIGHT_CODES, build_graph, quantize_columns

if encoder.available():
    pytest.skip("the encoder's packages are not installed", allow_module_level=True)

TEXTS = [
    "attention",
    "How do language models use a long context?",
    "Sparse mixtures of experts route each token to a few feed-forward blocks, so parameters grow and work does not.",
    "GPT-4 ¿naïve? 漢字 🧪 e\u0301 LoRA!!",
    "the cache of keys and values " * 80,  # past the 256 tokens
]


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPERTRIAL_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def reference() -> np.ndarray:
    """Mean-pooled, normalised last hidden states of transformers' own BertModel."""
    import torch
    from transformers import AutoTokenizer, BertModel

    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    model = BertModel.from_pretrained(model_folder(), add_pooling_layer=False).eval()
    with torch.no_grad():
        rows = []
        for text in TEXTS:
            batch = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
            rows.append(model(**batch).last_hidden_state[0].mean(dim=0))
        vectors = torch.nn.functional.normalize(torch.stack(rows), dim=1)
    return vectors.numpy()


def test_fp32_equals_the_plain_forward_pass(reference: np.ndarray):
    cosines = (SentenceEncoder(precision="fp32").encode(TEXTS) * reference).sum(axis=1)
    assert cosines.min() > 0.99999  # the same arithmetic in another order


def test_int8_stays_close_to_the_plain_forward_pass(reference: np.ndarray):
    cosines = (SentenceEncoder().encode(TEXTS) * reference).sum(axis=1)
    assert cosines.min() > 0.98  # 0.986 to 0.994 were measured


def test_a_text_has_one_vector_whatever_is_encoded_beside_it():
    encoder_ = SentenceEncoder(threads=2)
    together = encoder_.encode(TEXTS)
    alone = np.concatenate([encoder_.encode([text]) for text in TEXTS])
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(together[::-1], encoder_.encode(TEXTS[::-1]))
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-6)


def test_hostile_and_empty_texts_are_encoded():
    vectors = SentenceEncoder().encode(["", " \n", "\x00\x01", "\ud800", "a" * 50_000, "[CLS] [SEP] [MASK]"])
    assert vectors.shape == (6, 384)
    assert np.isfinite(vectors).all()
    assert SentenceEncoder().encode([]).shape == (0, 384)


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match="texts"):
        SentenceEncoder().encode("one string")
    with pytest.raises(TypeError, match="texts"):
        SentenceEncoder().encode(["good", None])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="threads"):
        SentenceEncoder(threads=0)
    with pytest.raises(ValueError, match="precision"):
        SentenceEncoder(precision="fp8")  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["cut", "altered", "empty"])
def test_a_damaged_graph_in_the_cache_is_made_again(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PAPERTRIAL_HOME", str(tmp_path))
    good = cached_graph()
    (path,) = (tmp_path / "cache" / "encoder").iterdir()
    spoiled = {"cut": good[:-100], "altered": good[:5000] + b"\x55" + good[5001:], "empty": b""}[damage]
    assert spoiled != good
    path.write_bytes(spoiled)
    assert cached_graph() == good
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == good


def test_the_graph_is_the_same_bytes_every_time():
    source = model_folder()
    built = build_graph(source / "model.safetensors", source / "config.json", 256, "int8")
    assert built == cached_graph()


def test_quantized_columns_are_within_half_a_step_and_never_saturate():
    weight = np.random.default_rng(0).normal(size=(24, 64)).astype(np.float32)
    weight[3] = 0
    codes, scales = quantize_columns(weight)
    assert np.abs(codes).max() == WEIGHT_CODES
    # two products of an unsigned byte with a code, added in 16 bits
    assert 2 * 255 * int(np.abs(codes).max()) <= np.iinfo(np.int16).max
    error = np.abs(codes.T * scales[:, None] - weight)
    assert (error <= scales[:, None] * 0.5001).all()
    assert codes.T[3].any() == np.False_


def test_another_architecture_is_refused(tmp_path: Path):
    config = json.loads((model_folder() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "roberta"}))
    with pytest.raises(ValueError, match="BERT"):
        build_graph(model_folder() / "model.safetensors", tmp_path / "config.json", 256, "int8")


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encoder, "MODULE", "no_such_package_here")
    assert encoder.available() is not None
    with pytest.raises(EncoderUnavailable, match=r"papertrial\[encoder\]"):
        SentenceEncoder()
    with pytest.raises(EncoderUnavailable, match="missing"):
        model_folder()


def test_searching_imports_neither_torch_nor_transformers(tmp_path: Path):
    script = """
import sys
from pathlib import Path
from papertrial.feed.search import Document, SearchIndex
index = SearchIndex(Path(sys.argv[1]))
index.add([Document(1, "Attention is all you need"), Document(2, "A recipe for bread")])
index.commit(1)
result = index.search("how transformers attend")
assert result.mode == "hybrid" and result.hits[0].key == 1, result
print([name for name in ("torch", "transformers", "sentence_transformers", "scipy") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path / "search")], capture_output=True, text=True)
    assert (run.stdout.strip(), run.returncode) == ("[]", 0), run.stderr
