"""Loading by name: every kind round-trips, and whatever is wrong with a checkpoint ends in one line for the user."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from papertrial.errors import UsageError
from papertrial.lm.models import load, quiet_transformers
from papertrial.lm.pruning import Plan, prune
from papertrial.lm.tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()
SIZES = {"vocab_size": len(TOKENIZER), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = LlamaConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True, **SIZES
)
GPT2 = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=32, **SIZES)
BERT = BertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, **SIZES)


def save(model, folder, tokenizer=TOKENIZER):
    with quiet_transformers():
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tmp_path):
    return save(LlamaForCausalLM(LLAMA), tmp_path / "llama")


def refusal(*arguments, **options):
    """The message of the refusal, which must be one line."""
    with pytest.raises(UsageError) as caught:
        load(*map(str, arguments), **options)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("model", "kind"), [
    (LlamaForCausalLM(LLAMA), "causal"), (GPT2LMHeadModel(GPT2), "causal"), (BertForMaskedLM(BERT), "masked"),
])  # fmt: skip
def test_a_saved_model_comes_back_with_the_same_outputs_and_in_evaluation_mode(model, kind, tmp_path):
    folder = save(model.eval(), tmp_path / "m")
    checkpoint = load(str(folder), kind=kind)
    ids = torch.arange(12).view(1, 12) + 5
    with torch.no_grad():
        torch.testing.assert_close(checkpoint.model(ids).logits, model(ids).logits, rtol=0, atol=0)
    assert not checkpoint.model.training
    assert checkpoint.name == str(folder)
    assert checkpoint.tokenizer.decode(checkpoint.tokenizer("h\u00e9")["input_ids"]) == "h\u00e9"


def test_an_encoder_is_loaded_without_its_head_and_a_missing_pooler_is_no_harm(tmp_path):
    folder = save(BertForMaskedLM(BERT), tmp_path / "m")
    assert type(load(str(folder), kind="encoder").model) is BertModel


def test_a_model_pruned_unevenly_is_loaded_with_its_own_sizes(tmp_path):
    model = LlamaForCausalLM(LLAMA).eval()
    pruned = prune(model, Plan([[0]], [range(7)]))
    pruned.config.pruned_sizes = [[1, 1, 7]]
    again = load(str(save(pruned, tmp_path / "m"))).model
    ids = torch.arange(5)[None]
    assert torch.equal(again(ids).logits, pruned(ids).logits)
    body = load(str(tmp_path / "m"), kind="encoder").model
    assert torch.equal(body(ids).last_hidden_state, pruned.base_model(ids).last_hidden_state)
    again.config.pruned_sizes = [[1, 1, 8]]
    assert "cannot load" in refusal(save(again, tmp_path / "m"))


def test_causal_tokenizers_pad_on_the_left_and_have_a_pad_token(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token, tokenizer.padding_side = None, "right"
    folder = save(LlamaForCausalLM(LLAMA), tmp_path / "m", tokenizer)
    loaded = load(str(folder)).tokenizer
    assert (loaded.padding_side, loaded.pad_token_id) == ("left", loaded.eos_token_id)


def test_dtype_is_float32_on_the_cpu_unless_another_is_asked_for(tmp_path):
    folder = save(LlamaForCausalLM(LLAMA).bfloat16(), tmp_path / "m")
    assert load(str(folder)).model.dtype == torch.float32
    assert load(str(folder), dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_the_digest_knows_the_weights_and_the_configuration(tmp_path, llama):
    first = load(str(llama)).digest
    assert first == load(str(llama)).digest
    weights = load_file(llama / "model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1e-3}, llama / "model.safetensors", metadata={"format": "pt"})
    second = load(str(llama)).digest
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    assert len({first, second, load(str(llama)).digest}) == 3


def test_loading_is_silent_and_leaves_the_logging_as_it_was(llama, capfd):
    import transformers.utils.logging as transformers_logging

    level = transformers_logging.get_verbosity()
    load(str(llama))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert transformers_logging.get_verbosity() == level
    assert transformers_logging.is_progress_bar_enabled()
    logging.getLogger("transformers").setLevel(level)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "kind"), [
    (BertForMaskedLM(BERT), "causal"), (LlamaForCausalLM(LLAMA), "masked"), (BertModel(BERT), "masked"),
    (LlamaForCausalLM(LLAMA).model, "causal"), (BertForSequenceClassification(BERT), "masked"),
])  # fmt: skip
def test_the_wrong_kind_of_checkpoint_is_named(model, kind, tmp_path):
    folder = save(model, tmp_path / "m")
    message = refusal(folder, kind=kind)
    assert f"is a {type(model).__name__} checkpoint; a {kind} language model is needed here" in message


def test_an_encoder_decoder_is_no_causal_model(tmp_path):
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    message = refusal(save(T5ForConditionalGeneration(T5Config(**sizes, **SIZES)), tmp_path / "m"))
    assert "is a t5 checkpoint, of which transformers makes no causal model" in message


def test_missing_weights_are_not_made_up(llama):
    weights = load_file(llama / "model.safetensors")
    gone = [name for name in weights if "down_proj" in name or "q_proj" in name]
    save_file(
        {n: w for n, w in weights.items() if n not in gone}, llama / "model.safetensors", metadata={"format": "pt"}
    )
    assert "lacks the weights model.layers.0" in refusal(llama)
    assert "and 1 more" in refusal(llama)


def test_weights_of_other_sizes_are_refused(llama):
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    assert "cannot load" in refusal(llama)


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"\xff" * 64, b"version https://git-lfs.github.com/spec/v1\n"])
def test_damaged_weights_are_one_line(llama, content):
    (llama / "model.safetensors").write_bytes(content)
    assert f"cannot load {llama} as a causal model" in refusal(llama)


def test_cut_off_weights_are_one_line(llama):
    data = (llama / "model.safetensors").read_bytes()
    (llama / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "cannot load" in refusal(llama)


def test_folders_that_hold_no_model_say_what_is_missing(tmp_path, llama):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no config.json" in refusal(empty)
    assert "is a file" in refusal(llama / "config.json")
    assert "no such model folder" in refusal(tmp_path / "absent")
    assert "no such model folder" in refusal("./absent")
    assert "no such model folder" in refusal("not a name!")
    (llama / "config.json").write_text("{}")
    assert "configuration" in refusal(llama)
    (llama / "config.json").write_text("{not json")
    assert "configuration" in refusal(llama)


def test_pickled_weights_are_not_read(llama):
    weights = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    torch.save(weights, llama / "pytorch_model.bin")
    assert "has no safetensors weights" in refusal(llama)


def test_code_in_a_checkpoint_is_never_run(llama, tmp_path):
    config = json.loads((llama / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (llama / "config.json").write_text(json.dumps(config))
    (llama / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "configuration" in refusal(llama)
    assert not (tmp_path / "ran").exists()


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    message = refusal(save(LlamaForCausalLM(LLAMA), tmp_path / "m", tokenizer=None))
    assert "has no tokenizer" in message
    assert "tokenizer.json" in message


def test_unknown_kinds_devices_and_hub_models_without_a_network_are_one_line(llama):
    assert "kind must be one of causal, masked, encoder" in refusal(llama, kind="decoder")
    assert "device" in refusal(llama, device="cuda:99") or torch.cuda.is_available()
    message = refusal("nobody/has-this-model")
    assert "cannot get nobody/has-this-model from the hub" in message


def test_unknown_house_models_come_with_the_nearest_and_the_list():
    message = refusal("house:pose")
    assert "did you mean house:prose?" in message
    assert "house:code" in message
