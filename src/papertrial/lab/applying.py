"""``papertrial apply``: a paper's method on somebody's checkpoint, written as an ordinary Hugging Face folder.

A paper takes part by having a function ``apply`` in its method; see docs/adding-a-paper.md. The folder appears under
its name only when it is complete: weights, configuration, tokenizer, a card that says what was done and what it cost,
and the same as JSON. The figures after the change are those of the written folder, loaded again.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from papertrial.errors import UsageError
from papertrial.lab.apply_options import given_options, method_of
from papertrial.lab.claim import PaperCard

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from papertrial.lm.changing import Changed
    from papertrial.lm.evaluation import Texts
    from papertrial.lm.models import Checkpoint

Progress = Callable[[str, int, int | None], None]

SPEED_SECONDS = 4.0
"""How long passes are timed, the given and the written checkpoint in turn; the quickest counts."""

WINDOW = 512
"""Tokens of context, at most, when perplexity is measured; half of a window overlaps with the last one."""

_TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template.*",
)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """A checkpoint in figures.

    Attributes
    ----------
    bytes : of its weights on the disk.
    perplexity : on the evaluation text.
    tokens_per_second : read in one forward pass over a window, on the machine and device at hand.
    """

    parameters: int
    bytes: int
    perplexity: float
    tokens_per_second: float


@dataclass(frozen=True)
class Applied:
    """What was written, and what it cost.

    Attributes
    ----------
    folder : the new checkpoint.
    before, after : figures of the given and of the written checkpoint.
    record : everything, as in the folder's ``papertrial.json``.
    """

    folder: Path
    summary: str
    facts: Mapping[str, str | float]
    before: Cost
    after: Cost
    record: dict[str, Any]


def apply_to_checkpoint(
    card: PaperCard,
    model: str,
    out: Path,
    arguments: Sequence[str] = (),
    *,
    calibration: str | None = None,
    evaluation: str | None = None,
    evaluation_tokens: int = 20_000,
    seed: int = 0,
    device: str = "cpu",
    on_progress: Progress | None = None,
) -> Applied:
    """Apply a paper's method to a checkpoint and write the result to ``out``.

    Parameters
    ----------
    card
        A paper whose method has ``apply``.
    model
        Hub id, local folder or ``house:NAME``.
    out
        Must not exist yet.
    arguments
        The method's own options as on the command line, ``["--ratio", "0.3"]``.
    calibration, evaluation
        Texts: a file or a data set of the Hub, see `papertrial.lm.evaluation.read_data`. Default: the training and the
        held-out part of the house corpus ``prose``.
    evaluation_tokens
        Of the evaluation text, how many tokens are used to measure perplexity.
    seed
        Of whatever the method draws.
    on_progress
        Hears ``(what, done, total)``.

    Raises
    ------
    UsageError
        In one line: no such method, option, model, file or device; a model that the method cannot treat; an ``out``
        that exists.
    """
    import torch

    from papertrial.lm.models import load

    method = method_of(card)
    options = given_options(card, method.options, arguments)
    out = _free(out)
    if evaluation_tokens < 2:
        raise UsageError(f"--evaluation-tokens must be at least 2, got {evaluation_tokens}")
    report = on_progress or (lambda what, done, total: None)
    report("loading the model", 0, None)
    checkpoint = load(model, device=device)
    texts, held_out = _texts(calibration, "train", checkpoint), _texts(evaluation, "test", checkpoint)
    if set(texts.texts) & set(held_out.texts):
        raise UsageError("a text of the evaluation also stands in the calibration: the perplexity would flatter")
    generator = torch.Generator().manual_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between libraries; nothing that the user can mend
            changed: Changed = method.apply(
                checkpoint, texts.texts, options, generator=generator, on_progress=on_progress
            )
    except ValueError as error:
        raise UsageError(f"{card.slug} cannot be applied to {model}: {error}") from error
    perplexity = _perplexity(checkpoint, held_out, evaluation_tokens, lambda d, t: report("perplexity before", d, t))
    with _staging(out) as staging:
        report("writing", 0, None)
        _write_model(changed.model, checkpoint, staging)
        written = load(str(staging), device=device)
        new_perplexity = _perplexity(
            written, held_out, evaluation_tokens, lambda d, t: report("perplexity after", d, t)
        )
        report("speed", 0, None)
        speed, new_speed = _speeds(checkpoint, written)
        before = _cost(checkpoint, perplexity, speed)
        after = _cost(written, new_perplexity, new_speed)
        record = {
            "paper": {"slug": card.slug, "title": card.title, "arxiv": card.arxiv},
            "base": {"model": model, "digest": checkpoint.digest},
            "options": vars(options),
            "seed": seed,
            "summary": changed.summary,
            "facts": dict(changed.facts),
            "calibration": {"source": texts.source, "documents": len(texts.texts)},
            "evaluation": {
                "source": held_out.source,
                "tokens": evaluation_tokens,
                "window": _window(written),
                "device": device,
            },
            "before": vars(before),
            "after": vars(after),
            "versions": _versions(),
        }
        _write_text(staging / "papertrial.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        _write_text(staging / "README.md", model_card(card, record))
    return Applied(out, changed.summary, changed.facts, before, after, record)


# -- texts and figures -------------------------------------------------------------------------------------------


def _texts(source: str | None, split: Any, checkpoint: "Checkpoint") -> "Texts":
    from papertrial.lm.evaluation import Texts, read_texts

    if source is not None:
        found = read_texts(source)
        return Texts(found.texts, Path(source).name if Path(source).is_file() else source)  # not whose disk it lies on
    from papertrial.lm.corpora import corpus, unseen_by

    prose = corpus("prose")
    documents = prose.documents(split)
    if split == "test" and checkpoint.name.startswith("house:"):
        documents = unseen_by(checkpoint.name.removeprefix("house:"), documents)
    what = {"train": "training part", "test": "held-out part"}[split]
    return Texts(tuple(document.text for document in documents), f"house corpus prose, {what}, {prose.digest[:12]}")


def _window(checkpoint: "Checkpoint") -> int:
    return min(WINDOW, getattr(checkpoint.model.config, "max_position_embeddings", None) or WINDOW)


def _cost(checkpoint: "Checkpoint", perplexity: float, speed: float) -> Cost:
    size = sum(path.stat().st_size for path in checkpoint.folder.glob("model*.safetensors"))
    return Cost(
        sum(parameter.numel() for parameter in checkpoint.model.parameters()), size, perplexity, round(speed, 1)
    )


def _speeds(*checkpoints: "Checkpoint") -> list[float]:
    """Tokens a second of each, timed in turn so that what else the machine does is the same for all."""
    import torch

    best = [math.inf] * len(checkpoints)
    window = min(map(_window, checkpoints))
    end = time.monotonic() + SPEED_SECONDS
    with torch.inference_mode():
        while time.monotonic() < end or math.inf in best:
            for place, checkpoint in enumerate(checkpoints):
                ids = torch.arange(window, device=checkpoint.model.device)[None] % checkpoint.model.config.vocab_size
                began = time.perf_counter()
                checkpoint.model(ids, use_cache=False).logits[0, -1, 0].item()  # waits for the device
                best[place] = min(best[place], time.perf_counter() - began)
    return [window / seconds for seconds in best]


def _perplexity(
    checkpoint: "Checkpoint", texts: "Texts", tokens: int, report: Callable[[int, int | None], None]
) -> float:
    from papertrial.lm.scoring import sequence_nll

    model, window = checkpoint.model, _window(checkpoint)
    nats, count = 0.0, 0
    for text in texts.texts:
        report(count, tokens)
        ids = checkpoint.tokenizer(text, verbose=False)["input_ids"][: tokens - count]
        if len(ids) > 1:
            nats += float(sequence_nll(model, [ids], window=window, stride=window // 2).sum())
            count += len(ids) - 1
        if count >= tokens - 1:
            break
    if not count:
        raise UsageError("the evaluation text gives no two tokens in a row")
    report(tokens, tokens)
    return math.exp(min(nats / count, 700.0))


# -- the folder --------------------------------------------------------------------------------------------------


def _free(out: Path) -> Path:
    out = out.expanduser().absolute()
    if os.path.lexists(out):
        raise UsageError(f"{out} exists; nothing is overwritten, give another --out")
    return out


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A hidden folder beside ``out`` that takes its name at the end, or is removed if anything goes wrong.

    What a killed process left behind (it cannot remove it) goes when the same ``out`` is asked for again.
    """
    import psutil

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"cannot make the folder {out.parent}: a file is in the way") from None
    for left in out.parent.glob(f".{out.name}.*.partial"):
        owner = left.name.removesuffix(".partial").rpartition(".")[2]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    folder = out.parent / f".{out.name}.{os.getpid()}.partial"
    folder.mkdir()
    try:
        with _termination_as_exit():
            yield folder
        if os.path.lexists(out):
            raise UsageError(f"{out} has come into being meanwhile; nothing is overwritten")
        os.rename(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextlib.contextmanager
def _termination_as_exit() -> Iterator[None]:
    """SIGTERM as an exception, so that what is half done is cleared away."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(*_: object) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _write_model(model: "PreTrainedModel", checkpoint: "Checkpoint", folder: Path) -> None:
    import torch

    from papertrial.lm.models import quiet_transformers

    config = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    stored = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    if isinstance(stored, torch.dtype) and stored.is_floating_point:
        model = model.to(stored)  # type: ignore[arg-type]  # as it was given: on a CPU it was widened to compute
    with quiet_transformers():
        model.save_pretrained(folder)
    # copied, not saved anew: loading gives a tokenizer settings that its owner did not ask for
    for pattern in _TOKENIZER_FILES:
        for path in checkpoint.folder.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _versions() -> dict[str, str]:
    import importlib.metadata

    return {name: importlib.metadata.version(name) for name in ("papertrial", "torch", "transformers")}


def model_card(card: PaperCard, record: Mapping[str, Any]) -> str:
    """``README.md`` of a changed checkpoint: what was done, by which settings, and what it cost."""
    base = record["base"]["model"]
    local = Path(base).expanduser().is_dir()
    shown = Path(base).name if local else base  # where a folder lies is nobody's business
    header = ["library_name: transformers", "pipeline_tag: text-generation"]
    header += [f"tags: {json.dumps(['papertrial', card.slug])}"]
    if not local and not base.startswith("house:"):
        header.append(f"base_model: {json.dumps(base.partition('@')[0])}")
    before, after = record["before"], record["after"]

    def row(what: str, key: str, form: str) -> str:
        change = 100 * (after[key] / before[key] - 1)
        return f"| {what} | {before[key]:{form}} | {after[key]:{form}} | {change:+.1f} % |"

    source = f"[{card.title}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else card.title
    lines = ["---", *header, "---", "", f"# {shown}, changed by {card.slug}", "", record["summary"], ""]
    lines += [f"Method: {source}. Applied by `papertrial apply {card.slug}` to `{shown}`", ""]
    lines[-2] += f" (SHA-256 of its configuration and weights: `{record['base']['digest'][:16]}`)."
    lines += ["## What it cost", "", "| | before | after | change |", "|---|---|---|---|"]
    lines += [row("parameters", "parameters", ",d"), row("bytes of weights", "bytes", ",d")]
    lines += [row("tokens read in a second", "tokens_per_second", ",.0f")]
    lines += [row("perplexity, lower is better", "perplexity", ",.4g"), ""]
    evaluation = record["evaluation"]
    lines += [
        f"Perplexity on up to {evaluation['tokens']:,} tokens of {evaluation['source']}, with up to "
        f"{evaluation['window']} tokens of context; calibrated on {record['calibration']['source']}. Speed: one text "
        f"of one window, on {evaluation['device']}. The figures after the change are those of this folder as it "
        "stands. Perplexity on one text says little about other tasks: measure yours.",
        "",
        "## How",
        "",
        "| | |",
        "|---|---|",
        *(f"| {_cell(name)} | {_cell(value)} |" for name, value in record["facts"].items()),
        *(f"| `--{name.replace('_', '-')}` | {_cell(value)} |" for name, value in record["options"].items()),
        f"| `--seed` | {record['seed']} |",
        *(f"| {name} | {version} |" for name, version in record["versions"].items()),
        "",
        "## Use",
        "",
        "An ordinary checkpoint: `AutoModelForCausalLM.from_pretrained(folder)`. The licence of the model it was made "
        "from goes on to apply.",
        "",
    ]
    return "\n".join(lines)


def _cell(value: object) -> str:
    """Text that stays within its cell of a Markdown table."""
    return " ".join(str(value).split()).replace("\\", "\\\\").replace("|", "\\|")
