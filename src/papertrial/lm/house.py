"""House models: small decoders that the project trains from text every installation carries.

Shipped ones lie in ``house_models/<name>``: weights (bfloat16), tokenizer, ``card.json`` with what was measured and the
command that makes the model again, ``documents.json`` with the documents it saw, and ``seen.safetensors`` with hashes
of the lines it saw. Others are trained on first use and kept under the state folder.

    python -m papertrial.lm.house train prose --out folder
"""

import argparse
import contextlib
import difflib
import hashlib
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from papertrial.errors import UsageError
from papertrial.lm import corpora
from papertrial.lm.corpora import Document

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent / "house_models"

EVALUATED_BYTES = 200_000
"""At most this much held-out text per corpus goes into a card's figures: minutes, not hours, of evaluation."""


@dataclass(frozen=True)
class HouseModel:
    """The recipe of a house model.

    Attributes
    ----------
    summary : what it is for.
    corpus : what it is trained on (the train split), see ``corpora.corpus``.
    repeats : how often each package's documents stand in the training stream (default once).
    apart_from : a corpus of which it must not have seen a line; pieces in common are left out.
    evaluated_on : corpora on whose test splits the card reports.
    vocabulary, width, layers, heads, feed_forward : sizes; the head width is width / heads.
    length, batch_size, steps, warmup, lr, weight_decay, seed : training; ``length`` is also the longest context.
    """

    summary: str
    corpus: str
    evaluated_on: tuple[str, ...]
    repeats: dict[str, int] = field(default_factory=dict)
    apart_from: str | None = None
    vocabulary: int = 3072
    width: int = 128
    layers: int = 5
    heads: int = 4
    feed_forward: int = 352
    length: int = 256
    batch_size: int = 8
    steps: int = 4000
    warmup: int = 100
    lr: float = 3e-3
    weight_decay: float = 0.1
    seed: int = 0


MODELS: dict[str, HouseModel] = {
    "prose": HouseModel(
        summary="English technical prose: the Python reference, docstrings of Python and of scientific packages",
        corpus="prose+library-prose",
        evaluated_on=("prose", "library-prose"),
        repeats={"stdlib": 3},
    ),
    "code": HouseModel(
        summary="Python source code of the standard library",
        corpus="code",
        evaluated_on=("code",),
    ),
    "code-fine": HouseModel(
        summary="Python source code again, in shorter tokens and from another seed: a second opinion on house:code",
        corpus="code",
        evaluated_on=("code",),
        vocabulary=768,
        steps=3000,
        seed=1,
    ),
    "scorer": HouseModel(
        summary="an independent judge of house:prose: docstrings of other packages, no line in common",
        corpus="framework-prose",
        apart_from="prose+library-prose",
        evaluated_on=("framework-prose", "prose"),
        seed=1,
    ),
    "mini": HouseModel(
        summary="a quick sketch of house:prose, trained on first use in about a minute",
        corpus="prose",
        evaluated_on=("prose",),
        vocabulary=1024,
        width=64,
        layers=2,
        heads=2,
        feed_forward=176,
        length=128,
        steps=400,
        warmup=40,
        lr=5e-3,
    ),
}


# -- finding -----------------------------------------------------------------------------------------------------


def folder(name: str) -> Path:
    """The folder of a house model, which is trained and cached first if it is not shipped.

    Raises
    ------
    UsageError
        For an unknown name, with the nearest and all that there are.
    """
    recipe(name)
    if (SHIPPED / name / "card.json").is_file():
        return SHIPPED / name
    from filelock import FileLock

    from papertrial.home import cache_folder

    target = cache_folder("house") / name
    with FileLock(f"{target}.lock"):
        if not (target / "card.json").is_file() or card(target)["recipe"] != _plain(MODELS[name]):
            logger.warning("training house:%s, which is kept under %s", name, target)
            train_house(name, target)
    return target


def recipe(name: str) -> HouseModel:
    """The recipe of a house model by name.

    Raises
    ------
    UsageError
        For an unknown name, with the nearest and all that there are.
    """
    if name in MODELS:
        return MODELS[name]
    near = difflib.get_close_matches(name, MODELS, n=1)
    hint = f"; did you mean house:{near[0]}?" if near else "."
    raise UsageError(f"no house model {name!r}{hint} There are {', '.join(f'house:{known}' for known in MODELS)}")


def card(where: "str | Path") -> dict[str, Any]:
    """The card of a house model (``house:<name>`` or its folder): recipe, data, cost, figures."""
    path = where if isinstance(where, Path) else folder(where.removeprefix("house:"))
    return json.loads((path / "card.json").read_text(encoding="utf-8"))


def seen_lines(name: str) -> "NDArray[np.uint64]":
    """Sorted hashes of the long lines that a house model was trained on (see ``corpora.line_hashes``)."""
    return _seen_lines(str(folder(name.removeprefix("house:"))))


@lru_cache(maxsize=4)
def _seen_lines(path: str) -> "NDArray[np.uint64]":
    from safetensors.numpy import load_file

    return load_file(f"{path}/seen.safetensors")["lines"]


def seen_documents(name: str) -> dict[str, str]:
    """Names of the documents that a house model was trained on, with the first 12 digits of their SHA-256."""
    return json.loads((folder(name.removeprefix("house:")) / "documents.json").read_text(encoding="utf-8"))


# -- making ------------------------------------------------------------------------------------------------------


def training_documents(name: str) -> list[Document]:
    """What a house model is trained on, in this installation."""
    spec = recipe(name)
    documents = corpora.corpus(spec.corpus).documents("train")
    if spec.apart_from is not None:
        # from all of that corpus, held-out documents too: the judge knows none of the texts that it may be shown
        documents = corpora.unseen(documents, corpora.line_hashes(corpora.corpus(spec.apart_from).everything))
    return documents


def train_house(
    name: str,
    out: Path,
    *,
    steps: int | None = None,
    start: Path | None = None,
    checkpoint: Path | None = None,
    on_progress: Callable[[int, int | None], None] | None = None,
    evaluate: bool = True,
) -> dict[str, Any]:
    """Train a house model, measure it, and write its folder; returns the card.

    Parameters
    ----------
    out : the folder to write; replaced as a whole at the end.
    steps : instead of the recipe's.
    start : folder of a house model of the same recipe and data to go on from, in a new cycle of the learning rate
        (1608.03983) on fresh batches.
    checkpoint : where the training keeps its place; it goes on from there after a kill.
    on_progress : hears (done, total) steps.
    evaluate : False leaves the figures out of the card.

    Raises
    ------
    UsageError
        For an unknown name, or a ``start`` that was made of other data or by another recipe.
    """
    import torch

    from papertrial.lm import tokenizers
    from papertrial.lm.training import adamw, train, warmup_cosine

    spec = recipe(name)
    steps = spec.steps if steps is None else steps
    documents = training_documents(name)
    tokenizer = tokenizers.train_bpe((document.text for document in documents), spec.vocabulary)
    stream = corpora.encode(tokenizer, _texts(documents, spec.repeats))
    model = build(spec, tokenizer)
    earlier = None if start is None else _start_from(model, start, spec, documents)
    purpose = "batches" if earlier is None else f"batches after {earlier['training']['steps']}"
    report = train(
        model,
        corpora.random_batches(stream, spec.batch_size, spec.length, generator=_generator(spec.seed, purpose)),
        steps=steps,
        optimizer=adamw(spec.lr, weight_decay=spec.weight_decay),
        schedule=warmup_cosine(steps, min(spec.warmup, steps - 1), floor=0.02),
        precision="bf16",
        on_progress=on_progress,
        checkpoint=checkpoint,
        checkpoint_every=250,
    )
    figures: dict[str, Any] = {
        "name": name,
        "summary": spec.summary,
        "recipe": _plain(spec),
        "commands": [*(earlier["commands"] if earlier else []), _command(name, steps, earlier is not None)],
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": {
            "corpus": spec.corpus,
            "documents": len(documents),
            "bytes": sum(len(document.text.encode()) for document in documents),
            "tokens_in_stream": len(stream),
            "digest": corpora.digest(documents),
            "versions": corpora.corpus(spec.corpus).versions,
        },
        "training": {
            "steps": steps + (earlier["training"]["steps"] if earlier else 0),
            "tokens": int(report.targets) + (earlier["training"]["tokens"] if earlier else 0),
            "last_loss_nats_per_token": round(float(np.mean(report.losses[-50:])), 4),
            "wall_seconds": round(report.seconds) + (earlier["training"]["wall_seconds"] if earlier else 0),
            "cpu_seconds": round(report.cpu_seconds) + (earlier["training"]["cpu_seconds"] if earlier else 0),
            "threads": torch.get_num_threads(),
            "precision": "bf16 autocast",
        },
        "environment": _environment(),
    }
    model.bfloat16().float()  # what is measured is what is shipped
    if evaluate:
        figures["test"] = {part: measure(model, tokenizer, part, documents) for part in spec.evaluated_on}
    _write(out, model, tokenizer, documents, figures)
    return figures


def _start_from(
    model: "PreTrainedModel", start: Path, spec: HouseModel, documents: Sequence[Document]
) -> dict[str, Any]:
    """Put the weights of the house model in ``start`` into ``model``; returns its card."""
    from papertrial.lm.models import load

    earlier = card(start)
    sizes = ("vocabulary", "width", "layers", "heads", "feed_forward", "length")
    if any(earlier["recipe"][size] != getattr(spec, size) for size in sizes):
        raise UsageError(f"{start} was made by a recipe with other sizes; start anew, without --from")
    if earlier["data"]["digest"] != corpora.digest(documents):
        raise UsageError(
            f"{start} was trained on another version of the text than is installed; start anew, without --from"
        )
    model.load_state_dict(load(str(start)).model.state_dict())
    return earlier


def _command(name: str, steps: int, again: bool) -> str:
    import torch

    threads = torch.get_num_threads()
    command = f"python -m papertrial.lm.house train {name} --steps {steps} --threads {threads} --out {name}"
    return f"{command} --from {name}" if again else command


def build(spec: HouseModel, tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedModel":
    """The untrained model of a recipe: a Llama decoder with tied embeddings, initialised from the recipe's seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=spec.width,
        intermediate_size=spec.feed_forward,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.heads,
        max_position_embeddings=spec.length,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global generator
        torch.manual_seed(_generator(spec.seed, "weights").initial_seed())
        return LlamaForCausalLM(config)


def measure(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", corpus: str, trained_on: Sequence[Document]
) -> dict[str, Any]:
    """Bits per byte of a model on a corpus's test documents that share no long line with what it was trained on,
    beside what compressors reach that were given the same training text."""
    from papertrial.lm.compressors import ByteNgram, xz_bits_per_byte

    documents = held_out(corpus, corpora.line_hashes(trained_on))
    text = "\n\n".join(document.text for document in documents).encode()
    training_text = "\n\n".join(document.text for document in trained_on).encode()
    return {
        "documents": len(documents),
        "bytes": sum(len(document.text.encode()) for document in documents),
        "digest": corpora.digest(documents),
        "bits_per_byte": {
            "model": round(bits_per_byte(model, tokenizer, documents), 4),
            "xz_alone": round(xz_bits_per_byte(text), 4),
            "xz_primed_with_training_text": round(xz_bits_per_byte(text, training_text), 4),
            "byte_6_gram_of_training_text": round(ByteNgram(training_text, 6).bits_per_byte(text), 4),
        },
    }


def held_out(corpus: str, seen: "NDArray[np.uint64]", at_most: int = EVALUATED_BYTES) -> list[Document]:
    """Test documents of a corpus without what was ``seen``, in an order of no meaning, up to ``at_most`` bytes.

    The last document is cut at a paragraph or statement.
    """
    documents = corpora.unseen(corpora.corpus(corpus).documents("test"), seen)
    documents.sort(key=lambda document: hashlib.sha256(document.name.encode()).digest())
    kept, left = [], at_most
    for document in documents:
        pieces = []
        for piece in document.pieces:
            left -= len((piece + document.separator).encode())
            if left < 0:
                break
            pieces.append(piece)
        if pieces:
            kept.append(Document(document.name, tuple(pieces), document.separator))
        if left < 0:
            break
    return kept


def bits_per_byte(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", documents: Sequence[Document]
) -> float:
    """Bits over bytes of whole documents; every token is predicted from at least half a context (but at the start)."""
    from papertrial.lm import scoring

    window = model.config.max_position_embeddings
    return scoring.bits_per_byte(
        model,
        tokenizer,
        [document.text for document in documents],
        bos_token_id=tokenizer.bos_token_id,
        window=window,
        stride=window // 2,
    )


def _texts(documents: Sequence[Document], repeats: dict[str, int]) -> Iterator[str]:
    for document in documents:
        for _ in range(repeats.get(document.name.partition(":")[0], 1)):
            yield document.text


def _generator(seed: int, purpose: str) -> Any:
    import torch

    place = int.from_bytes(hashlib.sha256(f"house/{seed}/{purpose}".encode()).digest()[:7], "big")
    return torch.Generator().manual_seed(place)


def _plain(spec: HouseModel) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(spec)))


def _environment() -> dict[str, str]:
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }


def _write(
    out: Path,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    documents: Sequence[Document],
    figures: dict[str, Any],
) -> None:
    """Write the folder beside its place, then move it there: nobody meets half a model."""
    from safetensors.numpy import save_file

    from papertrial.lm.models import quiet_transformers

    out.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    half.chmod(0o755)
    try:
        with quiet_transformers():
            model.bfloat16().save_pretrained(half)
            tokenizer.save_pretrained(half)
        save_file({"lines": corpora.line_hashes(documents)}, half / "seen.safetensors")
        names = {document.name: corpora.digest([document])[:12] for document in documents}
        (half / "documents.json").write_text(json.dumps(names, indent=0) + "\n", encoding="utf-8")
        (half / "card.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        for path in half.iterdir():
            path.chmod(0o644)
        if out.exists():
            shutil.rmtree(out)
        os.replace(half, out)
    finally:
        shutil.rmtree(half, ignore_errors=True)
        model.float()


# -- command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m papertrial.lm.house list`` or ``train NAME``."""
    parser = argparse.ArgumentParser(prog="python -m papertrial.lm.house", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the house models and what was measured")
    train = commands.add_parser("train", help="train a house model")
    train.add_argument("name")
    train.add_argument("--out", type=Path, help="folder to write (default: the cache of house models)")
    train.add_argument("--steps", type=int, help="instead of the recipe's")
    train.add_argument("--from", dest="start", type=Path, help="folder of the same model to go on from")
    train.add_argument("--threads", type=int, default=None, help="CPU threads")
    train.add_argument("--checkpoint", type=Path, help="folder that keeps the place; continues from it after a kill")
    options = parser.parse_args(arguments)
    try:
        if options.command == "list":
            for name, spec in MODELS.items():
                print(f"house:{name:8s} {spec.summary}")
            return 0
        _train_command(options)
    except UsageError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def _train_command(options: argparse.Namespace) -> None:
    import torch

    from papertrial.home import cache_folder

    recipe(options.name)
    if options.threads:
        torch.set_num_threads(options.threads)
    began = time.monotonic()

    def progress(done: int, total: int | None) -> None:
        if done and total and (done % 100 == 0 or done == total):
            elapsed = time.monotonic() - began
            print(
                f"step {done} of {total}, {elapsed:.0f} s so far, {elapsed / done * (total - done):.0f} s to go",
                flush=True,
            )

    out = options.out or cache_folder("house") / options.name
    with contextlib.suppress(BrokenPipeError):
        figures = train_house(
            options.name,
            out,
            steps=options.steps,
            start=options.start,
            checkpoint=options.checkpoint,
            on_progress=progress,
        )
        print(json.dumps(figures["test"], indent=2))


if __name__ == "__main__":
    sys.exit(main())
