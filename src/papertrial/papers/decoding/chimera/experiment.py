"""Chimera against Medusa heads and against its own parts, on a frozen model of Python code.

The base is a house model, or, at the scale for GPUs, one of 24 layers in bfloat16 that is trained here first. A seed is
its own training batches, initial weights and held-out prompts. All drafts of a seed see the same batches,
draft the same static tree and continue the same prompts. The learning rate was chosen on validation prompts, from 3e-3,
1e-2 and 3e-2 for medusa, 5e-3, 1e-2 and 2e-2 for chimera, 3e-3 and 1e-2 for medusa_wide: 1e-2 was best, or even, for
each.
"""

import copy
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from papertrial.lab.trial import Trial
from papertrial.lm.corpora import Document, corpus, encode, line_hashes, random_batches, unseen, unseen_by
from papertrial.lm.generation import greedy, sample
from papertrial.lm.models import Checkpoint, quiet_transformers
from papertrial.papers.decoding.chimera.base_model import in_precision, train_base
from papertrial.papers.decoding.chimera.method import (
    ChimeraDraft,
    Draft,
    MedusaDraft,
    SpeculativeOutput,
    TokenTree,
    draft_accuracy,
    modelled_speedup,
    speculative_generate,
    train_draft,
)
from papertrial.papers.decoding.chimera.method.training import final_states

SCALES = {
    "smoke": {
        "seeds": 1,
        "base": None,
        "documents": 12,
        "steps": 3,
        "batch": 4,
        "length": 24,
        "heads": 3,
        "nodes": 8,
        "lr": 1e-2,
        "prompts": 2,
        "prompt_tokens": 16,
        "new_tokens": 12,
        "timed_prompts": 1,
        "temperature": 0.7,
        "least_baseline": 0.0,
    },
    "small": {
        "seeds": 5,
        "base": None,
        "documents": 150,
        "steps": 200,
        "batch": 8,
        "length": 64,
        "heads": 3,
        "nodes": 20,
        "lr": 1e-2,
        "prompts": 24,
        "prompt_tokens": 32,
        "new_tokens": 64,
        "timed_prompts": 4,
        "temperature": 0.7,
        "least_baseline": 1.1,
    },
    "gpu": {
        "seeds": 5,
        "base": {
            "layers": 24,
            "width": 1024,
            "heads": 16,
            "steps": 1500,
            "batch": 32,
            "length": 256,
            "lr": 6e-4,
            "dtype": "bfloat16",
        },
        "documents": 1000,
        "steps": 3000,
        "batch": 16,
        "length": 192,
        "heads": 4,
        "nodes": 32,
        "lr": 1e-3,
        "prompts": 64,
        "prompt_tokens": 32,
        "new_tokens": 128,
        "timed_prompts": 8,
        "temperature": 0.7,
        "least_baseline": 1.1,
    },
}


def run(trial: Trial) -> dict[str, dict[str, float]]:
    """One seed; see :class:`Measure` for the metrics."""
    base, held_out = _base(trial)
    batches = _batches(trial, base)
    measure = Measure(trial, base.model, _prompts(trial, base, held_out))
    results = {"autoregressive": measure.autoregressive()}
    accuracies: dict[str, list[float]] = {}
    for arm, build in _drafts(trial, base.model).items():
        draft = build()
        trial.note(f"parameters of {arm}", draft.parameter_count())
        train_draft(
            draft,
            base.model,
            batches,
            steps=trial["steps"],
            lr=trial["lr"],
            warmup=0.05,
            precision="fp32" if base.model.dtype == torch.float32 else "bf16",
            on_step=lambda report, arm=arm: _log(trial, arm, report),
            on_progress=trial.reporter(f"training {arm}"),
        )
        results[arm], accuracies[arm] = measure(draft.set_precision(base.model.dtype))
    trial.require(
        results["medusa"]["tokens_per_forward"] >= trial["least_baseline"],
        f"Medusa heads gain {results['medusa']['tokens_per_forward']:.2f} tokens a pass: too little to be a baseline",
    )
    _show(trial, base, measure, results, accuracies)
    return results


def _base(trial: Trial) -> tuple[Checkpoint, list[Document]]:
    """The base model, and test documents that hold no line of what it was trained on."""
    checkpoint = trial.checkpoint("house:code-fine")
    held_out = corpus("code").documents("test")
    if trial["base"] is None or trial.requested_model is not None:
        # what a user's model has read is not known
        return checkpoint, unseen_by("code-fine", held_out)
    documents = [*corpus("code").documents("train"), *corpus("prose").documents("train")]
    tokenizer = cast(PreTrainedTokenizerFast, checkpoint.tokenizer)
    model = train_base(
        tokenizer,
        encode(tokenizer, [document.text for document in documents]),
        trial["base"],
        generator=trial.generator("base model"),
        device=trial.device,
        on_progress=trial.reporter("training the base model"),
    )
    trial.note("parameters of the base model", sum(parameter.numel() for parameter in model.parameters()))
    return Checkpoint(model, tokenizer, "trained here", checkpoint.folder), unseen(held_out, line_hashes(documents))


def _drafts(trial: Trial, model: PreTrainedModel) -> dict[str, Callable[[], Draft]]:
    """Drafts by arm. The wide Medusa heads have about as many parameters as Chimera, the plain ones are the paper's."""
    heads = trial["heads"]

    def chimera(**parts: bool) -> Callable[[], Draft]:
        return lambda: ChimeraDraft(model, heads, generator=trial.generator("initial weights"), **parts)

    return {
        "medusa": lambda: MedusaDraft(model, heads),
        "medusa_wide": lambda: MedusaDraft(model, heads, blocks=2, widening=2),
        "chimera": chimera(),
        "chimera_no_trigram": chimera(trigram=False),
        "chimera_no_context": chimera(full_context=False),
    }


def _batches(trial: Trial, base: Checkpoint) -> list[dict[str, Tensor]]:
    """Training batches, which all arms share, with the base model's final states where memory holds them."""
    documents = corpus("code").documents("train")
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0))[: trial["documents"]]
    stream = encode(cast(PreTrainedTokenizerFast, base.tokenizer), [documents[int(i)].text for i in order])
    drawn = random_batches(stream, trial["batch"], trial["length"], generator=trial.generator("batches"))
    if trial["base"] is not None:
        return [{"input_ids": next(drawn).to(trial.device)} for _ in range(trial["steps"])]
    batches = []
    for _ in trial.track(range(trial["steps"]), "states of the base model"):
        ids = next(drawn).to(trial.device)
        batches.append({"input_ids": ids, "hidden": final_states(base.model, ids)})
    return batches


def _prompts(trial: Trial, base: Checkpoint, documents: list[Document]) -> Tensor:
    """This seed's prompts (P, S) from held-out documents; seeds share none."""
    length = trial["prompt_tokens"]
    windows: list[list[int]] = []
    for document in documents:
        ids = base.tokenizer(document.text, add_special_tokens=False)["input_ids"]
        windows += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    first = trial.seed * trial["prompts"]
    trial.require(
        len(windows) >= first + trial["prompts"],
        f"seed {trial.seed} needs windows up to {first + trial['prompts']} of held-out text; there are {len(windows)}",
    )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    chosen = order[first : first + trial["prompts"]].tolist()
    return torch.tensor([windows[i] for i in chosen], device=trial.device)


class Measure:
    """All arms' metrics on the same prompts.

    ``tokens_per_forward`` and ``sampled_tokens_per_forward``: new tokens per verification pass, greedy and at the
    temperature; ``greedy_match`` and ``sampled_match``: % of tokens that are those of transformers' own greedy decoding
    and of plain sampling with the same random numbers; ``accuracy_s``: % of right best guesses at step s on the base
    model's greedy text; ``accuracy_fall``: the points that are lost from the first step to the last;
    ``tokens_per_second``: greedy, one prompt at a time, per CPU second, drafting included; ``modelled_speedup``: where
    a pass takes as long as its weights take to read, whatever the tokens in it.

    In half precision near ties fall either way, with the number of tokens in a pass. There ``greedy_match`` is that of
    the same weights in float32 on the timed prompts, and ``half_precision_match`` the share at work.
    """

    def __init__(self, trial: Trial, model: PreTrainedModel, prompts: Tensor) -> None:
        self.trial, self.model, self.prompts = trial, model, prompts
        self.tree = TokenTree.likely(trial["nodes"], trial["heads"])
        self.new = trial["new_tokens"]
        self.reference = self._written(model, prompts)
        self.half = model.dtype != torch.float32
        if self.half:
            self.exact = in_precision(copy.deepcopy(model), torch.float32)
            self.exact_prompts = prompts[: trial["timed_prompts"]]
            self.exact_reference = self._written(self.exact, self.exact_prompts)
        self.sampled = sample(
            model, prompts, max_new_tokens=self.new, temperature=trial["temperature"], generator=self._generator()
        ).tokens
        trial.note("tree nodes", len(self.tree))

    def _written(self, model: PreTrainedModel, prompts: Tensor) -> Tensor:
        """What transformers' own greedy decoding goes on with, (P, T)."""
        with quiet_transformers():
            written = cast(Any, model).generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=self.new,
                eos_token_id=-1, pad_token_id=0,
            )  # fmt: skip
        return cast(Tensor, written)[:, prompts.shape[1] :]

    def _matches(self, tokens: Tensor, decode: Callable[[PreTrainedModel, Tensor], Tensor]) -> dict[str, float]:
        """``greedy_match`` of tokens written by the model, or of another run of ``decode`` in float32."""
        share = _share(tokens, self.reference)
        if not self.half:
            return {"greedy_match": share}
        exact = decode(self.exact, self.exact_prompts)
        return {"greedy_match": _share(exact, self.exact_reference), "half_precision_match": share}

    def _generator(self) -> torch.Generator:
        return self.trial.generator("sampling")

    def _rate(self, decode: Callable[[Tensor], Any]) -> float:
        """New tokens per second of this process, prompt by prompt; the first run of each is to warm up."""
        prompts = self.prompts[: self.trial["timed_prompts"]].split(1)
        decode(prompts[0])
        if self.trial.device.type == "cuda":
            torch.cuda.synchronize()
        clock = time.process_time if self.trial.device.type == "cpu" else time.perf_counter
        began = clock()
        for prompt in prompts:
            decode(prompt)
        if self.trial.device.type == "cuda":
            torch.cuda.synchronize()
        return len(prompts) * self.new / (clock() - began)

    def autoregressive(self) -> dict[str, float]:
        def decode(model: PreTrainedModel, prompts: Tensor) -> Tensor:
            return greedy(model, prompts, max_new_tokens=self.new).tokens

        return {
            "tokens_per_forward": 1.0,
            "sampled_tokens_per_forward": 1.0,
            **self._matches(decode(self.model, self.prompts), decode),
            "tokens_per_second": self._rate(lambda prompt: decode(self.model, prompt)),
            "modelled_speedup": 1.0,
        }

    def __call__(self, draft: Draft) -> tuple[dict[str, float], list[float]]:
        def decode(model: PreTrainedModel, prompts: Tensor, **settings: Any) -> SpeculativeOutput:
            return speculative_generate(model, draft, prompts, tree=self.tree, max_new_tokens=self.new, **settings)

        best = decode(self.model, self.prompts)
        drawn = decode(
            self.model, self.prompts, do_sample=True, temperature=self.trial["temperature"], generator=self._generator()
        )
        text = torch.cat([self.prompts, self.reference], 1)
        accuracy = [100 * share for share in draft_accuracy(draft, self.model, text, start=self.prompts.shape[1])]
        weights = sum(parameter.numel() for parameter in self.model.parameters())
        # one head is read per call, and everything else of the draft each time
        heads = sum(parameter.numel() for head in draft.heads for parameter in head.parameters())  # type: ignore[union-attr]
        shared = draft.parameter_count() - heads
        per_call = heads / draft.n_heads + (shared if isinstance(draft, ChimeraDraft) else shared / draft.n_heads)
        tau = best.stats.tokens_per_forward
        metrics = {
            "tokens_per_forward": tau,
            "sampled_tokens_per_forward": drawn.stats.tokens_per_forward,
            **self._matches(best.tokens, lambda model, prompts: decode(model, prompts).tokens),
            "sampled_match": _share(drawn.tokens, self.sampled),
            "tokens_per_second": self._rate(lambda prompt: decode(self.model, prompt)),
            "modelled_speedup": modelled_speedup(
                tau, draft_calls=self.tree.depth, draft_cost=per_call / weights, tree_cost=0.0
            ),
        }
        metrics |= {f"accuracy_{step}": share for step, share in enumerate(accuracy, 1)}
        return metrics | {"accuracy_fall": accuracy[0] - accuracy[-1]}, accuracy


def _share(tokens: Tensor, reference: Tensor) -> float:
    return 100 * float((tokens == reference).double().mean())


def _log(trial: Trial, arm: str, report: Any) -> None:
    if report.step % max(1, trial["steps"] // 50) == 0:
        trial.log("training loss, nats per position over all steps", arm, report.step, report.loss)
        trial.log("training accuracy of the first step", arm, report.step, report.parts["accuracy_1"])


def _show(
    trial: Trial,
    base: Checkpoint,
    measure: Measure,
    results: dict[str, dict[str, float]],
    accuracies: dict[str, list[float]],
) -> None:
    trial.figure(
        "Accuracy by draft step",
        kind="line",
        x_label="draft step",
        y_label="right best guesses, %",
        caption="On the base model's own greedy text, where the tokens before were drafted right.",
        x=list(range(1, trial["heads"] + 1)),
        series=accuracies,
    )
    trial.figure(
        "Tokens per pass of the base model",
        kind="bar",
        y_label="tokens",
        caption=f"One tree of {len(measure.tree)} nodes for all drafts; 1 is decoding token by token.",
        x=list(results),
        series={
            "greedy": [values["tokens_per_forward"] for values in results.values()],
            "sampled": [values["sampled_tokens_per_forward"] for values in results.values()],
        },
    )
    decode = base.tokenizer.batch_decode
    prompts, texts = decode(measure.prompts[:2]), decode(measure.reference[:2])
    for row, prompt in enumerate(prompts):
        trial.example(f"Prompt {row + 1}", prompt, {"every arm, greedy": texts[row]})
