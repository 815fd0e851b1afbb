"""A code model that fills gaps: documents rearranged as suffix, prefix and middle, cut at characters, and trained on.

Released models of the paper's kind were trained so; the shipped ones were not. What matters for a prompt cut inside a
token is that prefix and middle are encoded as one text, as an encoder would have found them in a file.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from papertrial.lm.batches import random_batches
from papertrial.lm.schedules import warmup_cosine
from papertrial.lm.tokenizers import train_bpe
from papertrial.lm.training import adamw, train
from papertrial.papers.tokenization.byte_level_probabilities.method import FillTokens

MARKS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
SEGMENT = (200, 600)
"""Characters of the segments that are rearranged: what fits a training window."""


@dataclass(frozen=True)
class FillRecipe:
    """How to get a model that fills gaps.

    Attributes
    ----------
    steps, batch_size, length, lr
        Of the training; AdamW, warm-up over a tenth, half a cosine.
    share
        Of the segments that are rearranged; the rest stays as it is.
    width, layers, vocabulary
        Of a new model; a width of 0 continues training the given one.
    segments
        Number of segments drawn for the stream.
    """

    steps: int
    batch_size: int = 8
    length: int = 256
    lr: float = 1e-3
    share: float = 0.5
    width: int = 0
    layers: int = 0
    vocabulary: int = 0
    segments: int = 2000
    precision: str = "fp32"


def fill_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    recipe: FillRecipe,
    generator: torch.Generator,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and tokenizer with infilling marks, trained on ``documents``; the given ones are not changed.

    A tokenizer that has marks already is taken with its model as they are.
    """
    try:
        FillTokens.of(tokenizer)
    except ValueError:
        pass
    else:
        return model, tokenizer
    device = model.device
    if recipe.width:
        tokenizer = train_bpe(documents, recipe.vocabulary, specials=MARKS)
        model = _new_model(tokenizer, recipe, generator)
        cast(nn.Module, model).to(device)
    else:
        tokenizer, model = copy.deepcopy(tokenizer), copy.deepcopy(model)
        tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)})
        _widen(model, len(tokenizer), generator)
    stream = fill_stream(tokenizer, documents, recipe, generator).to(device)
    train(
        model,
        random_batches(stream, recipe.batch_size, recipe.length, generator=generator),
        steps=recipe.steps,
        optimizer=adamw(recipe.lr),
        schedule=warmup_cosine(recipe.steps, recipe.steps // 10),
        precision="bf16" if recipe.precision == "bf16" else "fp32",
        on_progress=on_progress,
    )
    return model.eval(), tokenizer


def fill_stream(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], recipe: FillRecipe, generator: torch.Generator
) -> Tensor:
    """Segments of documents as one stream of ids (N,), rearranged, cut at a character, or as they are."""
    marks = FillTokens.of(tokenizer)
    long = [document for document in documents if len(document) > SEGMENT[1]]
    if not long:
        raise ValueError(f"documents must hold one of more than {SEGMENT[1]} characters")
    sizes = torch.tensor([len(document) for document in long], dtype=torch.float64)
    chosen = torch.multinomial(sizes, recipe.segments, replacement=True, generator=generator).tolist()
    ids: list[int] = []
    for number in chosen:
        draws = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        length = SEGMENT[0] + int(draws[0] * (SEGMENT[1] - SEGMENT[0]))
        begin = int(draws[1] * (len(long[number]) - length))
        text = long[number][begin : begin + length]
        if draws[2] < recipe.share:
            cut = int(draws[3] * (length + 1))
            body = [marks.prefix, marks.suffix, *_ids(tokenizer, text[cut:]), marks.middle]
            body += _ids(tokenizer, text[:cut])  # prefix and middle are one text: where one ends is never seen
        else:
            body = _ids(tokenizer, text)
        ids += [*_known(tokenizer.bos_token_id), *body, *_known(tokenizer.eos_token_id)]
    return torch.tensor(ids, dtype=torch.long)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _known(token: int | None) -> list[int]:
    return [] if token is None else [token]


def _widen(model: PreTrainedModel, size: int, generator: torch.Generator) -> None:
    """Room for more tokens; their vectors are the mean of the others and noise of a tenth of their spread."""
    old = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    if size <= old:
        return
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for module in {model.get_input_embeddings(), model.get_output_embeddings()}:
            weight = cast(Tensor, module.weight)
            noise = torch.randn(size - old, weight.shape[1], generator=generator).to(weight)
            weight[old:] = weight[:old].mean(0) + 0.1 * weight[:old].std(0) * noise


def _new_model(tokenizer: PreTrainedTokenizerBase, recipe: FillRecipe, generator: torch.Generator) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=8 * recipe.width // 3 // 16 * 16,
        num_hidden_layers=recipe.layers,
        num_attention_heads=max(1, recipe.width // 64),
        num_key_value_heads=max(1, recipe.width // 64),
        max_position_embeddings=2 * recipe.length,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global generator
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        return LlamaForCausalLM(config)
