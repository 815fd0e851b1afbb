"""What leaving out void layers costs or gains, against dropping as many layers otherwise; and whether phases differ.

A seed is a model, its world and its questions: a Llama-style model learns facts and sums by heart and is then asked
four-way questions after solved examples. The threshold factor is chosen on questions that the test never asks. Beside
it, a house model of prose shows what the same rules cost on natural text. With ``--model`` that checkpoint answers
which passage of held-out prose goes on from a prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from papertrial.lab.trial import Trial
from papertrial.lm.corpora import Document, Split, corpus, unseen_by
from papertrial.lm.generation import greedy, left_pad
from papertrial.lm.models import Checkpoint
from papertrial.lm.scoring import token_log_probs
from papertrial.lm.training import adamw, train, warmup_cosine
from papertrial.papers.compression.void_layers.examination import CONTROLS, Examination, control_masks, share_used
from papertrial.papers.compression.void_layers.method import (
    PHASES,
    L2AdaptiveComputation,
    LayerTrace,
    skip_layers,
)
from papertrial.papers.compression.void_layers.phases import Comparison, at_alphas, compare
from papertrial.papers.compression.void_layers.questions import FactWorld, Questions, continuations

SCALES = {
    "smoke": {
        "seeds": 1,
        "layers": 4,
        "width": 32,
        "heads": 2,
        "entities": 16,
        "words": 8,
        "steps": 6,
        "batch": 8,
        "solved": 3,
        "lr": 4e-3,
        "questions": 8,
        "validation_questions": 8,
        "examples": 2,
        "alphas": [0.0, 0.1, 0.8],
        "prose_alphas": [0.1, 0.8],
        "prose_rows": 2,
        "prose_tokens": 32,
        "new_tokens": 3,
        "shuffles": 20,
        "question_batch": 8,
        "least_accuracy": 0.0,
    },
    "small": {
        "seeds": 4,
        "layers": 8,
        "width": 96,
        "heads": 4,
        "entities": 64,
        "words": 24,
        "steps": 260,
        "batch": 32,
        "solved": 5,
        "lr": 4e-3,
        "questions": 200,
        "validation_questions": 100,
        "examples": 2,
        "alphas": [0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8],
        "prose_alphas": [0.02, 0.1, 0.4],
        "prose_rows": 16,
        "prose_tokens": 96,
        "new_tokens": 24,
        "shuffles": 200,
        "question_batch": 200,
        "least_accuracy": 60.0,
    },
    "gpu": {
        "seeds": 5,
        "layers": 24,
        "width": 512,
        "heads": 8,
        "entities": 4096,
        "words": 256,
        "steps": 4000,
        "batch": 256,
        "solved": 8,
        "lr": 1e-3,
        "questions": 2000,
        "validation_questions": 1000,
        "examples": 4,
        "alphas": [0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8],
        "prose_alphas": [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8],
        "prose_rows": 64,
        "prose_tokens": 192,
        "new_tokens": 48,
        "shuffles": 1000,
        "question_batch": 500,
        "least_accuracy": 60.0,
    },
}

PHASE_SETS = {"both": ("prompt", "response"), "prompt": ("prompt",), "response": ("response",)}
AUTHORS_ALPHA = 0.8


@dataclass
class Sweep:
    """Per semantics and phases: (share of layers used in both phases, accuracy) for every alpha."""

    points: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    passes: dict[float, list[LayerTrace]] = field(default_factory=dict)


def run(trial: Trial) -> dict[str, dict[str, float]]:
    """One seed. Accuracies and shares of layers in percent, distances as mean total variation, prose in nats/token."""
    model, ask = _subject(trial)
    validation = Examination(model, ask("validation", trial["validation_questions"]), trial["question_batch"])
    questions = ask("test", trial["questions"])
    test = Examination(model, questions, trial["question_batch"])
    full = test.accuracy()
    trial.require(
        full >= trial["least_accuracy"],
        f"the full model answers {full:.0f} % of the questions; it has not learnt what leaving out layers could spoil",
    )
    results: dict[str, dict[str, float]] = {
        "full_model": {"qa_accuracy": full, "layers_used": 100.0},
        "lac_readout": {},
        "lac_skip": {},
    }
    sweep = _sweep(trial, model, test)
    for semantics in ("readout", "skip"):
        alpha = _chosen(trial, model, validation, semantics)
        used, accuracy = sweep.points[f"{semantics}, both"][trial["alphas"].index(alpha)]
        results[f"lac_{semantics}"] |= {"qa_accuracy": accuracy, "layers_used": used}
        trial.note(f"alpha of {semantics} chosen on validation questions", alpha)
    if trial.requested_model is not None:
        results |= _tabulated(sweep, trial["alphas"])
    curves = _controls(trial, model, test, sweep, results)
    _show_accuracy(trial, sweep, curves, full)
    _phases(trial, model, questions, results)
    _prose(trial, results)
    return results


# -- who is asked what -------------------------------------------------------------------------------------------


def _subject(trial: Trial) -> tuple[PreTrainedModel, Callable[[str, int], Questions]]:
    """The model and a function that draws its questions for ``test`` or ``validation``."""
    if trial.requested_model is not None:
        checkpoint = trial.checkpoint("house:prose")
        documents = {"validation": _held_out(checkpoint, "valid"), "test": _held_out(checkpoint, "test")}

        def ask(purpose: str, count: int) -> Questions:
            return continuations(
                checkpoint.tokenizer,
                documents[purpose],
                count,
                prompt=48,
                length=8,
                generator=trial.generator(f"{purpose} questions"),
            )

        return checkpoint.model, ask
    world = FactWorld(trial["entities"], trial["words"], generator=trial.generator("world"))
    config = LlamaConfig(
        vocab_size=world.vocabulary,
        hidden_size=trial["width"],
        intermediate_size=trial["width"] * 8 // 3 // 8 * 8,
        num_hidden_layers=trial["layers"],
        num_attention_heads=trial["heads"],
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(trial.seed)
        model = LlamaForCausalLM(config)
    torch.nn.Module.to(model, trial.device)
    batches = world.batches(trial["batch"], trial["solved"], generator=trial.generator("training"))
    train(
        model,
        ({name: ids.to(trial.device) for name, ids in batch.items()} for batch in batches),
        steps=trial["steps"],
        optimizer=adamw(trial["lr"]),
        schedule=warmup_cosine(trial["steps"], max(1, trial["steps"] // 16), 0.05),
        on_step=lambda report: trial.log("training loss", "full_model", report.step, report.loss),
        on_progress=trial.reporter("training"),
    )
    trial.note("parameters", sum(p.numel() for p in model.parameters()))

    def ask_world(purpose: str, count: int) -> Questions:
        generator = trial.generator(f"{purpose} questions")
        return world.ask(count, trial["examples"], validation=purpose == "validation", generator=generator)

    return model, ask_world


def _held_out(checkpoint: Checkpoint, split: Split) -> list[Document]:
    """Documents of prose that a house model has seen nothing of; of other models that is not known."""
    documents = corpus("prose").documents(split)
    return unseen_by(checkpoint.name, documents) if checkpoint.name.startswith("house:") else documents


# -- accuracy ----------------------------------------------------------------------------------------------------


def _examined(
    model: PreTrainedModel, examination: Examination, alpha: float, semantics: str, phases: str, **dials: int
) -> tuple[float, list[LayerTrace]]:
    """Accuracy with the voids left out, and the trace of each forward."""
    with L2AdaptiveComputation(model, alpha, semantics=semantics, phases=PHASE_SETS[phases], **dials) as lac:  # type: ignore[arg-type]
        accuracy = examination.accuracy()
    return accuracy, lac.passes


def _sweep(trial: Trial, model: PreTrainedModel, test: Examination) -> Sweep:
    """All alphas, meanings and phases on the test questions; what is chosen among them is chosen elsewhere."""
    sweep = Sweep()
    for semantics in ("skip", "readout"):
        for phases in PHASE_SETS:
            name = f"{semantics}, {phases}"
            sweep.points[name] = []
            for alpha in trial.track(trial["alphas"], f"leaving out: {name}"):
                accuracy, passes = _examined(model, test, alpha, semantics, phases)
                sweep.points[name].append((100 * share_used(passes), accuracy))
                if name == "skip, both":
                    sweep.passes[alpha] = passes
    late = "skip, both, first block not in the range"
    sweep.points[late] = []
    for alpha in trial.track(trial["alphas"], f"leaving out: {late}"):
        accuracy, passes = _examined(model, test, alpha, "skip", "both", range_from=2)
        sweep.points[late].append((100 * share_used(passes), accuracy))
    return sweep


def _tabulated(sweep: Sweep, alphas: list[float]) -> dict[str, dict[str, float]]:
    """The sweep as arms, so that the terminal prints it for somebody's own model; reports have it as a figure."""
    return {
        f"{semantics}@{alpha:g}": {"sweep_accuracy": accuracy, "sweep_layers_used": used}
        for semantics in ("skip", "readout")
        for alpha, (used, accuracy) in zip(alphas, sweep.points[f"{semantics}, both"], strict=True)
    }


def _chosen(trial: Trial, model: PreTrainedModel, validation: Examination, semantics: str) -> float:
    """The alpha above zero with the best validation accuracy; among equals the largest, which uses fewest layers."""
    alphas = _above_zero(trial)
    found = {alpha: _examined(model, validation, alpha, semantics, "both")[0] for alpha in alphas}
    return float(max(found, key=lambda alpha: (found[alpha], alpha)))


def _controls(
    trial: Trial, model: PreTrainedModel, test: Examination, sweep: Sweep, results: dict[str, dict[str, float]]
) -> dict[str, list[tuple[float, float]]]:
    """As many layers per token as the rule leaves out, chosen otherwise; means over all alphas above zero."""
    plain = L2AdaptiveComputation(model, 0.0, phases=())
    with plain:
        test.accuracy()
    generator = trial.generator("random layers")
    curves: dict[str, list[tuple[float, float]]] = {arm: [] for arm in CONTROLS}
    alphas = _above_zero(trial)
    for alpha in trial.track(alphas, "controls"):
        passes = sweep.passes[alpha]
        used = 100 * share_used(passes)
        masks = control_masks(passes, plain.passes, generator)
        for arm, chosen in masks.items():
            curves[arm].append((used, test.masked(chosen)))
    for arm, points in (*curves.items(), ("lac_skip", sweep.points["skip, both"][-len(alphas) :])):
        accuracies = [accuracy for _, accuracy in points]
        results.setdefault(arm, {})["matched_usage_accuracy"] = sum(accuracies) / len(accuracies)
    return curves


def _show_accuracy(trial: Trial, sweep: Sweep, curves: dict[str, list[tuple[float, float]]], full: float) -> None:
    names = {"skip, both": "lac_skip", "readout, both": "lac_readout"}
    shown = {arm: sweep.points[name] for name, arm in names.items()}
    trial.figure(
        "Accuracy against the share of layers used",
        kind="scatter",
        x_label="layers used, %",
        y_label="questions answered, %",
        caption="Each point is a threshold factor. The controls leave out as many layers of every token as the rule "
        "does; chance is 25 %.",
        series=shown | curves | {"full_model": [(100.0, full)]},
    )
    trial.figure(
        "Accuracy against the threshold factor",
        x_label="alpha",
        y_label="questions answered, %",
        caption="Voids left out in the prompt, in the response, or in both, under the two meanings of leaving out.",
        series={name: [accuracy for _, accuracy in points] for name, points in sweep.points.items()},
        x=trial["alphas"],
    )


# -- phases ------------------------------------------------------------------------------------------------------


def _phases(trial: Trial, model: PreTrainedModel, questions: Questions, results: dict[str, dict[str, float]]) -> None:
    """Profiles while the unchanged model reads the prompts and writes its answers, over all alphas above zero.

    The authors' alpha alone would say little here: the first block's jump is so large that it voids nearly everything
    after the second block in either phase. It is reported beside.

    Prompt and response hold different kinds of tokens. So the response is also compared with the answers inside the
    prompt, against a null of its own: these groups are smaller, and small groups lie further apart by chance.
    """
    ids, mask = left_pad(questions.prompts, 0)
    length = questions.options.shape[2]
    with L2AdaptiveComputation(model, phases=()) as lac:
        greedy(model, ids, mask, max_new_tokens=length, eos_token_id=None)
    trace = lac.trace
    groups: dict[str, Tensor] = {phase: trace.of(phase) for phase in PHASES}
    pairs = {"prompt and response": _distances(trial, trace, groups["prompt"], "phase_distance", results)}
    if len(questions.examples):
        places = torch.zeros_like(trace.real)
        places[:, : len(questions.examples)] = questions.examples.to(places.device)
        groups["answers inside the prompt"] = places
        pairs["answers inside the prompt and response"] = _distances(
            trial, trace, places, "phase_distance", results, arms=("answers_in_prompt", "shuffled_answers")
        )
    traces = at_alphas(trace, _above_zero(trial))
    profiles = {
        name: torch.stack([t.active[:, chosen].double().mean(1) for t in traces]).mean(0)
        for name, chosen in groups.items()
    }
    for phase in PHASES:
        results["lac"][f"{phase}_usage"] = 100 * float(profiles[phase].mean())
    trial.figure(
        "Which layers are active in which phase",
        kind="bar",
        x_label="layer",
        y_label="tokens for which it is active, %",
        caption="The rule on the unchanged model, mean over the threshold factors. Answers inside the prompt are those "
        "of the solved examples: the same kind of tokens as the response, but read and not generated.",
        series={name: (100 * share).tolist() for name, share in profiles.items()},
        x=[str(layer + 1) for layer in range(len(trace.active))],
    )
    trial.figure(
        "Distance between the phases",
        x_label="alpha",
        y_label="mean total variation over layers",
        log_x=True,
        caption="How far apart the shares of active tokens are, layer by layer; and how far apart random groups of the "
        "same tokens are, of the same sizes.",
        series={name: list(pair.found) for name, pair in pairs.items()}
        | {f"{name}, by chance": list(pair.chance) for name, pair in pairs.items()},
        x=_above_zero(trial),
    )


def _above_zero(trial: Trial) -> list[float]:
    return [alpha for alpha in trial["alphas"] if alpha > 0]


def _distances(
    trial: Trial,
    trace: LayerTrace,
    one: Tensor,
    name: str,
    results: dict[str, dict[str, float]],
    *,
    arms: tuple[str, str] = ("lac", "shuffled_phases"),
) -> Comparison:
    """Distance of some tokens from the response at every alpha, and of random groups; the means are the metrics."""
    comparison = compare(
        trace,
        one,
        trace.of("response"),
        _above_zero(trial),
        count=trial["shuffles"],
        generator=trial.generator(f"{name} of {arms[0]}"),
    )
    for arm, mean, each in zip(
        arms,
        (comparison.mean, comparison.mean_chance),
        (comparison.found, comparison.chance),
        strict=True,
    ):
        values = results.setdefault(arm, {})
        values[f"mean_{name}"] = mean
        if AUTHORS_ALPHA in comparison.alphas:
            values[f"{name}_at_{AUTHORS_ALPHA}"] = each[comparison.alphas.index(AUTHORS_ALPHA)]
    trial.note(f"99th percentile of {arms[1]}, mean_{name}", round(comparison.chance_quantile(0.99), 4))
    return comparison


# -- natural text ------------------------------------------------------------------------------------------------


def _prose(trial: Trial, results: dict[str, dict[str, float]]) -> None:
    """Loss of a model of prose under the same rules, and the profiles of its prompts and continuations."""
    checkpoint = trial.checkpoint("house:prose")
    model, generator = checkpoint.model, trial.generator("prose")
    texts = [checkpoint.tokenizer.encode(d.text, add_special_tokens=False) for d in _held_out(checkpoint, "test")]
    stream = torch.tensor([token for ids in texts for token in ids])
    starts = torch.randint(len(stream) - trial["prose_tokens"], (trial["prose_rows"], 1), generator=generator)
    ids = stream[starts + torch.arange(trial["prose_tokens"])].to(trial.device)

    def nats() -> float:
        with torch.no_grad():
            return -float(token_log_probs(model, ids).mean())

    with L2AdaptiveComputation(model, 0.0, phases=()) as plain:
        results["full_model"]["prose_nats"] = nats()
    losses: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ("lac_skip", *CONTROLS)}
    for alpha in trial.track(trial["prose_alphas"], "prose"):
        with L2AdaptiveComputation(model, alpha) as lac:
            loss = nats()
        used = 100 * share_used(lac.passes)
        losses["lac_skip"].append((used, loss))
        for arm, masks in control_masks(lac.passes, plain.passes, generator).items():
            with skip_layers(model, masks[0]):
                losses[arm].append((used, nats()))
    for arm, points in losses.items():
        results[arm]["prose_nats"] = sum(loss for _, loss in points) / len(points)
    trial.figure(
        "Loss on prose against the share of layers used",
        kind="scatter",
        x_label="layers used, %",
        y_label="nats per token",
        caption="A house model of prose. Every control leaves out as many layers of each token as the rule does.",
        series=losses | {"full_model": [(100.0, results["full_model"]["prose_nats"])]},
    )
    half = trial["prose_tokens"] // 2
    with L2AdaptiveComputation(model, phases=()) as lac:
        greedy(model, ids[:, :half], max_new_tokens=trial["new_tokens"], eos_token_id=None)
    _distances(trial, lac.trace, lac.trace.of("prompt"), "prose_phase_distance", results)
