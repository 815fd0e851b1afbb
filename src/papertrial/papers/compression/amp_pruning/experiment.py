"""AMP's choice of heads and neurons against other choices of as many, on sliced models, before and after recovery.

A seed is a base model of its own with its own text, calibration prompts, recovery batches and test windows: the house
models in turn at ``small``, models trained here at ``gpu``. Every criterion takes the same number of heads and neurons
out of every layer, so that all cut models of a ratio have the same size and shape; only ``depth`` (whole layers from
the middle, as many as come closest) differs. Every recovered arm gets the same batches in the same order.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from papertrial.lab.trial import Trial
from papertrial.lm.corpora import corpus, encode, random_batches, token_windows, unseen_by
from papertrial.lm.generation import greedy
from papertrial.lm.models import Checkpoint
from papertrial.lm.pruning import (
    LayerSizes,
    UnitScores,
    keep_layers,
    loss_change_scores,
    magnitude_scores,
    parameter_counts,
    prune,
    random_scores,
    sizes,
    wanda_scores,
)
from papertrial.lm.scoring import continuation_scores, perplexity
from papertrial.lm.training import adamw, train, warmup_cosine
from papertrial.papers.compression.amp_pruning.method import amp_importance, amp_plan, recover

SCALES = {
    "smoke": {
        "seeds": 1,
        "bases": [["house:prose", "prose"]],
        "pretrain": None,
        "ratios": [0.4],
        "calibration": [8, 32],
        "test_windows": [4, 64],
        "cloze": {"items": 6, "prompt": 12, "continuation": 6},
        "draws": 1,
        "tuned_draws": 1,
        "tuned": ["amp", "magnitude", "loss_change", "random"],
        "recovery": {"steps": 2, "batch": 2, "length": 32, "rate": 1e-2, "rank": 8},
        "timing": {"rounds": 3, "batch": 4, "length": 64},
        "least_cloze": 0.0,
    },
    "small": {
        "seeds": 4,
        "bases": [
            ["house:prose", "prose"],
            ["house:code", "code"],
            ["house:scorer", "framework-prose"],
            ["house:code-fine", "code"],
        ],
        "pretrain": None,
        "ratios": [0.2, 0.4],
        "calibration": [50, 64],
        "test_windows": [96, 128],
        "cloze": {"items": 250, "prompt": 24, "continuation": 12},
        "draws": 5,
        "tuned_draws": 2,
        "tuned": ["amp", "magnitude", "wanda", "loss_change", "random", "reversed", "depth"],
        # the rate with the lowest validation perplexity of 1e-3 .. 3e-2, for every criterion that was looked at
        "recovery": {"steps": 40, "batch": 8, "length": 128, "rate": 1e-2, "rank": 8},
        "timing": {"rounds": 9, "batch": 8, "length": 128},
        "least_cloze": 45.0,
    },
    "gpu": {
        "seeds": 3,
        "bases": [["house:prose", "prose+library-prose+framework-prose"]],
        "pretrain": {
            "layers": 12,
            "width": 768,
            "heads": 12,
            "feed_forward": 2048,
            "steps": 1500,
            "batch": 64,
            "length": 256,
            "rate": 1e-3,
        },
        "ratios": [0.2, 0.3, 0.4, 0.5],
        "calibration": [50, 256],
        "test_windows": [256, 256],
        "cloze": {"items": 1000, "prompt": 24, "continuation": 12},
        "draws": 5,
        "tuned_draws": 2,
        "tuned": ["amp", "amp_projected", "magnitude", "wanda", "loss_change", "random", "reversed", "depth"],
        "recovery": {"steps": 300, "batch": 32, "length": 256, "rate": 1e-3, "rank": 8},
        "timing": {"rounds": 15, "batch": 32, "length": 256},
        "least_cloze": 45.0,
    },
}

CLAIMED = 0.4
"""The ratio that the claims are about; metrics of others carry it in their names."""


def run(trial: Trial) -> dict[str, dict[str, float]]:
    """One seed: test perplexity and cloze accuracy (%) of every arm, tokens per second of the sliced models."""
    base, texts = _base(trial)
    data = Data(trial, base, texts)
    model = base.model
    whole = {"test_perplexity": data.perplexity(model), "cloze_accuracy": data.cloze(model)}
    trial.require(
        whole["cloze_accuracy"] >= trial["least_cloze"],
        f"the base model chooses the true continuation in {whole['cloze_accuracy']:.0f} % of four-way items; pruning "
        f"says something from {trial['least_cloze']:.0f} % on",
    )
    trial.note("base model", base.name)
    trial.note("parameters of the base model", parameter_counts(model).total)
    results: dict[str, dict[str, float]] = {"unpruned": whole}
    criteria = _criteria(trial, model, data.calibration)
    for ratio in trial["ratios"]:
        cut = {arm: [plan() for plan in plans] for arm, plans in _cuts(trial, model, criteria, ratio).items()}
        suffix = "" if ratio == CLAIMED else f"@{round(100 * ratio)}"
        for arm, models in trial.track(list(cut.items()), f"measuring at {ratio:.0%}"):
            values = results.setdefault(arm, {})
            values[f"test_perplexity{suffix}"] = _geometric([data.perplexity(one) for one in models])
            values[f"parameters_left{suffix}"] = 100 * parameter_counts(models[0]).total / parameter_counts(model).total
            trial.log(
                "test perplexity by share of parameters taken out, %",
                arm,
                100 * ratio,
                values[f"test_perplexity{suffix}"],
            )
            if ratio == CLAIMED:
                some = models[: trial["tuned_draws"]]
                values["cloze_accuracy"] = sum(map(data.cloze, some)) / len(some)
        if ratio == CLAIMED:
            speeds = tokens_per_second(trial, {"unpruned": model, "amp": cut["amp"][0], "depth": cut["depth"][0]})
            for arm, speed in speeds.items():
                results[arm]["tokens_per_second"] = speed
            trial.note("a layer of the cut model", _in_words(sizes(cut["amp"][0])[0]))
            written = {"unpruned": _continued(base, data, model), "amp": _continued(base, data, cut["amp"][0])}
            written["magnitude"] = _continued(base, data, cut["magnitude"][0])
            _recover(trial, cut, data, results)
            written["amp_tuned"] = _continued(base, data, cut["amp"][0])
            _show(trial, base, data, criteria["amp"][0][0], written)
    return results


class Data:
    """This seed's calibration prompts, recovery stream, test windows and cloze items, all from its own draws."""

    def __init__(self, trial: Trial, base: Checkpoint, texts: dict[str, list[str]]) -> None:
        self.trial = trial
        self.stream = encode(base.tokenizer, texts["train"])  # type: ignore[arg-type]
        count, length = trial["calibration"]
        prompts = random_batches(self.stream, count, length, generator=trial.generator("calibration"))
        self.calibration: Tensor = next(prompts).to(trial.device)
        held_out = encode(base.tokenizer, texts["test"])  # type: ignore[arg-type]
        count, length = trial["test_windows"]
        self.test = _some(token_windows(held_out, length), count, trial.generator("test windows"))
        sizes = trial["cloze"]
        span = sizes["prompt"] + sizes["continuation"]
        items = _some(token_windows(held_out, span), sizes["items"], trial.generator("cloze items"))
        self.prompts, true = items[:, : sizes["prompt"]], items[:, sizes["prompt"] :]
        # three continuations of other items beside the true one, which stands first
        shifts = [0, *(1 + torch.randperm(len(items) - 1, generator=trial.generator("cloze choices"))[:3]).tolist()]
        self.choices = torch.stack([true.roll(shift, 0) for shift in shifts], 1)  # (N, 4, T)

    def perplexity(self, model: PreTrainedModel) -> float:
        return perplexity(model, list(self.test), batch_size=16)

    def cloze(self, model: PreTrainedModel) -> float:
        """Share of items (%) whose true continuation is the most likely of four."""
        prompts = self.prompts.repeat_interleave(self.choices.shape[1], 0)
        nats, _ = continuation_scores(model, list(prompts), list(self.choices.flatten(0, 1)), batch_size=64)
        return 100 * float((nats.unflatten(0, (-1, self.choices.shape[1])).argmax(1) == 0).double().mean())


def _some(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)[:count]]


def _base(trial: Trial) -> tuple[Checkpoint, dict[str, list[str]]]:
    """This seed's model and the texts that it is calibrated, recovered and tested on."""
    name, text = trial["bases"][trial.seed % len(trial["bases"])]
    base = trial.checkpoint(name)
    documents = {split: corpus(text).documents(split) for split in ("train", "test")}  # type: ignore[arg-type]
    if base.name.startswith("house:") and not trial["pretrain"]:
        documents["test"] = unseen_by(base.name.removeprefix("house:"), documents["test"])
    texts = {split: [document.text for document in found] for split, found in documents.items()}
    if trial["pretrain"] and trial.requested_model is None:
        base.model = _pretrained(trial, base, texts["train"])
    return base, texts


def _pretrained(trial: Trial, base: Checkpoint, texts: list[str]) -> PreTrainedModel:
    """A Llama-style model trained here, with the tokenizer of the house model."""
    sizes = trial["pretrain"]
    config = LlamaConfig(
        vocab_size=base.model.config.vocab_size,
        hidden_size=sizes["width"],
        intermediate_size=sizes["feed_forward"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        max_position_embeddings=sizes["length"],
        tie_word_embeddings=True,
        bos_token_id=base.tokenizer.bos_token_id,
        eos_token_id=base.tokenizer.eos_token_id,
        pad_token_id=base.tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trial.seed)
        model = LlamaForCausalLM(config)
    model.to(trial.device)  # type: ignore[arg-type]
    stream = encode(base.tokenizer, texts).to(trial.device)  # type: ignore[arg-type]
    batches = random_batches(stream, sizes["batch"], sizes["length"], generator=trial.generator("pretraining"))
    train(
        model,
        batches,
        steps=sizes["steps"],
        optimizer=adamw(sizes["rate"]),
        schedule=warmup_cosine(sizes["steps"], sizes["steps"] // 15),
        precision="bf16" if trial.device.type == "cuda" else "fp32",
        on_progress=trial.reporter("training the base model"),
        checkpoint=trial.scratch / "base",
    )
    return model.eval()


def _criteria(trial: Trial, model: PreTrainedModel, prompts: Tensor) -> dict[str, list[tuple[UnitScores, Any]]]:
    """Scores of every criterion, of the whole model and once, with the end that goes."""
    batches = list(prompts.split(10))
    amp = amp_importance(model, batches)
    generator = trial.generator("random scores")
    scores = {
        "amp": [amp],
        "amp_projected": [amp_importance(model, batches, mlp_criterion="projected")],
        "magnitude": [magnitude_scores(model)],
        "wanda": [wanda_scores(model, batches)],
        "loss_change": [loss_change_scores(model, batches)],
        "random": [random_scores(model, generator=generator) for _ in range(trial["draws"])],
    }
    found: dict[str, list[tuple[UnitScores, Any]]] = {
        arm: [(one, "lowest") for one in several] for arm, several in scores.items()
    }
    return {**found, "reversed": [(amp, "highest")]}


def _cuts(
    trial: Trial, model: PreTrainedModel, criteria: dict[str, list[tuple[UnitScores, Any]]], ratio: float
) -> dict[str, list[Callable[[], PreTrainedModel]]]:
    """What makes the cut models of a ratio, one or (random) several per arm."""

    def sliced(scores: UnitScores, end: Any) -> Callable[[], PreTrainedModel]:
        return lambda: prune(model, amp_plan(model, scores, ratio, remove=end))

    counts, layers = parameter_counts(model), len(sizes(model))
    dropped = min(round(ratio * counts.total / counts.blocks * layers), layers - 1)
    first = (layers - dropped) // 2
    kept = [layer for layer in range(layers) if not first <= layer < first + dropped]
    cuts = {arm: [sliced(scores, end) for scores, end in several] for arm, several in criteria.items()}
    return {**cuts, "depth": [lambda: keep_layers(model, kept)]}


def _recover(
    trial: Trial, cut: dict[str, list[PreTrainedModel]], data: Data, results: dict[str, dict[str, float]]
) -> None:
    """The same short LoRA tuning of each arm; changes the cut models."""
    settings = trial["recovery"]
    for arm in trial.track(trial["tuned"], "recovering"):
        tuned = []
        for model in cut[arm][: trial["tuned_draws"]]:
            batches = random_batches(
                data.stream.to(trial.device),
                settings["batch"],
                settings["length"],
                generator=trial.generator("recovery"),
            )
            tuned.append(
                recover(
                    model,
                    batches,
                    steps=settings["steps"],
                    generator=trial.generator("adapters"),
                    rate=settings["rate"],
                    rank=settings["rank"],
                )
            )
        results[f"{arm}_tuned"] = {
            "test_perplexity": _geometric([data.perplexity(one) for one in tuned]),
            "cloze_accuracy": sum(map(data.cloze, tuned)) / len(tuned),
        }


def _continued(base: Checkpoint, data: Data, model: PreTrainedModel) -> str:
    """What a model makes of the first cloze prompt, greedily."""
    tokens = greedy(model, data.prompts[:1].to(model.device), max_new_tokens=24).tokens
    return str(base.tokenizer.decode(tokens[0], skip_special_tokens=True))


def _show(trial: Trial, base: Checkpoint, data: Data, importance: UnitScores, written: dict[str, str]) -> None:
    prompt = str(base.tokenizer.decode(data.prompts[0], skip_special_tokens=True))
    trial.example(f"A held-out prompt, {CLAIMED:.0%} of the parameters gone", prompt, written)
    trial.figure(
        "Importance of heads",
        kind="heatmap",
        x_label="head",
        y_label="layer",
        caption="AMP's importance of each head of the whole model: the mean over calibration prompts of the L1 norm of "
        "what it adds to the residual stream. Every layer loses as many, so the order within a row decides.",
        series={"mean L1 norm": torch.stack(importance.heads)},
    )
    first, last = importance.neurons[0], importance.neurons[-1]
    trial.figure(
        "Importance of neurons",
        kind="line",
        x_label="neuron, by rank",
        y_label="mean absolute activation",
        log_y=True,
        caption="MLP neurons of the first and the last layer in the order in which AMP would take them out.",
        series={"first layer": _thinned(first), "last layer": _thinned(last)},
    )


def _in_words(layer: LayerSizes) -> str:
    return f"{layer.heads} heads, {layer.key_value_heads} key/value heads, {layer.neurons} neurons"


def _thinned(scores: Tensor) -> list[tuple[float, float]]:
    """At most 200 points of the sorted scores."""
    ordered = scores.sort().values
    return [(float(rank), float(ordered[rank])) for rank in range(0, len(ordered), max(1, len(ordered) // 200))]


def _geometric(values: Sequence[float]) -> float:
    """Of perplexities: the exponential of the mean loss over draws, which one bad draw cannot swamp."""
    return math.exp(sum(map(math.log, values)) / len(values))


@torch.no_grad()
def tokens_per_second(trial: Trial, models: dict[str, PreTrainedModel]) -> dict[str, float]:
    """Tokens a forward pass reads per second; models in turn, median of rounds after one to warm up.

    On a CPU the seconds are those of the process, so that other work on the machine does not count.
    """
    settings, cuda = trial["timing"], trial.device.type == "cuda"
    shape = (settings["batch"], settings["length"])
    vocabulary = next(iter(models.values())).config.vocab_size
    ids = torch.randint(vocabulary, shape, generator=trial.generator("timing")).to(trial.device)
    clock = time.perf_counter if cuda else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in trial.track(range(settings["rounds"] + 1), "timing"):
        for name, model in models.items():
            start = clock()
            model(input_ids=ids, use_cache=False)
            if cuda:
                torch.cuda.synchronize(trial.device)
            seconds[name].append(clock() - start)
    return {name: ids.numel() / sorted(values[1:])[len(values[1:]) // 2] for name, values in seconds.items()}
