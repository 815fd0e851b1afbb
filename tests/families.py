"""Tiny random checkpoints of every supported model family, and a tokenizer to go with them.

Built from configs, never downloaded: two layers, width 32, vocabulary 67, float32, evaluation mode. The sizes are
chosen so that mistakes show: heads, key/value heads, head size, width and feed-forward width all differ from each
other.
"""

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 67
CONTEXT = 64

DECODERS = ("gpt2", "gpt_neox", "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "opt", "phi")
ENCODERS = ("bert", "roberta")
CORE = ("gpt2", "llama", "qwen2", "qwen3", "mistral")
"""The families that every method must run on."""

_GROUPED = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 44,
    "max_position_embeddings": CONTEXT,
}
_PLAIN = {key: value for key, value in _GROUPED.items() if key != "num_key_value_heads"}

# family: (config class, model class with a language-model head, sizes)
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 44, "n_positions": CONTEXT},
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _PLAIN),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _GROUPED),
    # a head size that is not width / heads, as in the released Qwen3 and Gemma checkpoints
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_GROUPED, "head_dim": 12}),
    "mistral": ("MistralConfig", "MistralForCausalLM", _GROUPED),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**_GROUPED, "num_key_value_heads": 1, "head_dim": 12}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        # eager: sdpa has no soft cap, and older versions of transformers choose it all the same
        {
            **_GROUPED,
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": CONTEXT,
            "attn_implementation": "eager",
        },
    ),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 44,
            "word_embed_proj_dim": 32,
            "max_position_embeddings": CONTEXT,
        },
    ),
    "phi": ("PhiConfig", "PhiForCausalLM", _GROUPED),
    "bert": ("BertConfig", "BertForMaskedLM", _PLAIN),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", {**_PLAIN, "max_position_embeddings": CONTEXT + 2}),
}


def tiny_model(family: str, *, seed: int = 0, spread: float = 0.15, **overrides: Any) -> PreTrainedModel:
    """A random checkpoint of ``family`` with its language-model head.

    All parameters, biases and norm weights included, are drawn with standard deviation ``spread`` around their usual
    start, so that a forgotten bias, an ignored norm weight or a swapped layer changes the output.

    Parameters
    ----------
    family
        One of ``DECODERS`` or ``ENCODERS``.
    seed
        Same seed, same weights. The global generator is left as it was.
    spread
        Standard deviation of the noise.
    **overrides
        Fields of the family's config.
    """
    if family not in _FAMILIES:
        raise ValueError(f"unknown family {family!r}; known: {', '.join(_FAMILIES)}")
    config_class, model_class, sizes = _FAMILIES[family]
    # id 0 pads, 1 begins, 2 ends: also what tiny_tokenizer says
    settings = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **sizes, **overrides}
    config = getattr(transformers, config_class)(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=spread)
            padding = model.get_input_embeddings().padding_idx
            if padding is not None:
                model.get_input_embeddings().weight[padding] = 0.0
    return model.float().eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``VOCABULARY`` pieces over small letters; pads left; ids 0, 1, 2 as in ``tiny_model``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = "the cat sat on the mat, then the dog came back. a quick brown fox jumps over the lazy dog! "
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<bos>", "<eos>"], show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator([text] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def random_ids(batch: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Token ids (batch, length) without the three special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def left_padded(batch: int, length: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask (batch, length), row r with r padding tokens on the left (at least one real token)."""
    ids = random_ids(batch, length, seed=seed)
    mask = torch.ones_like(ids)
    for row in range(batch):
        pads = min(row, length - 1)
        ids[row, :pads] = 0
        mask[row, :pads] = 0
    return ids, mask
