"""A small pre-training task on which optimisers are compared: same start, same batches, same evaluation for each."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from papertrial.lm.batches import RandomBatches, encode, random_batches, token_windows
from papertrial.lm.corpora import corpus
from papertrial.lm.schedules import Schedule
from papertrial.lm.tokenizers import train_bpe
from papertrial.lm.training import NonFiniteLossError, OptimizerFactory, StepReport, train


@dataclass
class LossCurve:
    """Held-out loss of one run.

    Attributes
    ----------
    points : (step, nats per token), the last one at the end of the run.
    train_loss : mean training loss of the last tenth of the steps, nats per token.
    diverged_at : the step with a loss or gradient that is not finite, or None. Such a run has ``points[-1]`` infinite.
    cpu_seconds : of the steps, without the evaluations.
    """

    points: list[tuple[float, float]] = field(default_factory=list)
    train_loss: float = math.inf
    diverged_at: int | None = None
    cpu_seconds: float = 0.0

    @property
    def final(self) -> float:
        """Loss at the end of the run."""
        return self.points[-1][1]


@dataclass(frozen=True)
class LanguageModelTask:
    """Next-token prediction on a corpus with a tokenizer of its own, split by document.

    Attributes
    ----------
    streams : training ids (N,) by the name ``"train"``; held-out windows (W, T) by ``"valid"`` and ``"test"``.
    vocabulary : number of tokens.
    batch_size, length : of a training batch (B, T).
    """

    streams: Mapping[str, Tensor]
    vocabulary: int
    batch_size: int
    length: int

    @property
    def tokens_per_step(self) -> int:
        """Predicted tokens of one batch."""
        return self.batch_size * (self.length - 1)

    def to(self, device: torch.device | str) -> "LanguageModelTask":
        """The same task with its data on ``device``."""
        streams = {name: tensor.to(device) for name, tensor in self.streams.items()}
        return LanguageModelTask(streams, self.vocabulary, self.batch_size, self.length)

    def batches(self, generator: torch.Generator) -> RandomBatches:
        """Endless training batches (B, T); the same generator state gives every optimiser the same order."""
        return random_batches(self.streams["train"], self.batch_size, self.length, generator=generator)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str, rows: int = 64) -> float:
        """Mean loss on all windows of a held-out split, nats per token."""
        windows = self.streams[split]
        total = torch.zeros((), dtype=torch.float64)
        for ids in windows.split(rows):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").double().cpu()
        return float(total) / (windows.shape[0] * (windows.shape[1] - 1))

    def run(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | OptimizerFactory,
        generator: torch.Generator,
        *,
        steps: int,
        schedule: Schedule,
        split: str,
        evaluate_every: int,
        clip_norm: float = 1.0,
        before_update: Callable[[int], None] | None = None,
        on_progress: Callable[[int, int | None], None] | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> LossCurve:
        """Train ``model`` in place and follow its loss on one held-out split.

        Parameters
        ----------
        optimizer, schedule, clip_norm, before_update, on_progress, precision : as of ``papertrial.lm.training.train``.
        generator : of the batches.
        split : ``"valid"`` to tune, ``"test"`` to report.
        evaluate_every : steps between evaluations; the last step is always evaluated.

        Returns
        -------
        LossCurve
            A run that diverges is returned, not raised: its final loss is infinite.
        """
        if split not in ("valid", "test"):
            raise ValueError(f"split must be 'valid' or 'test', got {split!r}")
        if evaluate_every < 1:
            raise ValueError(f"evaluate_every must be at least 1, got {evaluate_every}")
        curve = LossCurve()
        evaluating = 0.0

        def follow(report: StepReport) -> None:
            nonlocal evaluating
            if report.step % evaluate_every == 0 and report.step < steps:
                began = time.process_time()
                model.eval()
                curve.points.append((float(report.step), self.evaluate(model, split)))
                model.train()
                evaluating += time.process_time() - began

        try:
            report = train(
                model, self.batches(generator), steps=steps, optimizer=optimizer, schedule=schedule,
                clip_norm=clip_norm, before_update=before_update, on_step=follow, on_progress=on_progress,
                precision=precision,
            )  # fmt: skip
        except NonFiniteLossError as error:
            curve.diverged_at = error.step
            curve.points.append((float(steps), math.inf))
            return curve
        curve.points.append((float(steps), self.evaluate(model, split)))
        tail = report.losses[-max(1, steps // 10) :]
        curve.train_loss = sum(tail) / len(tail)
        curve.cpu_seconds = report.cpu_seconds - evaluating
        return curve


@lru_cache(maxsize=4)
def corpus_task(
    name: str, *, vocabulary: int, length: int, batch_size: int, held_out_windows: int
) -> LanguageModelTask:
    """The task of a named corpus: a byte-level BPE trained on its training documents, and windows of its splits.

    Parameters
    ----------
    name : of the corpus, such as ``"prose"``.
    vocabulary : size of the BPE.
    length : T of training and held-out windows.
    batch_size : B.
    held_out_windows : windows kept of each held-out split, spread evenly over it.

    Raises
    ------
    ValueError
        If a held-out split has fewer windows than asked for.
    """
    texts = corpus(name)
    tokenizer = train_bpe(texts.texts("train"), vocabulary)
    streams = {"train": encode(tokenizer, texts.texts("train"))}
    for split in ("valid", "test"):
        windows = token_windows(encode(tokenizer, texts.texts(split)), length)
        if len(windows) < held_out_windows:
            raise ValueError(f"held_out_windows is {held_out_windows}; the {split} split of {name} has {len(windows)}")
        streams[split] = windows[torch.linspace(0, len(windows) - 1, held_out_windows).long()]
    return LanguageModelTask(streams, len(tokenizer), batch_size, length)


def decoder(
    task: LanguageModelTask,
    generator: torch.Generator,
    *,
    family: Literal["llama", "gpt2"],
    width: int,
    layers: int,
    heads: int,
) -> nn.Module:
    """A small decoder for a task, with tied embeddings and without dropout, initialised from ``generator`` alone.

    ``llama`` has a SwiGLU of 8/3 width (rounded up to 16), ``gpt2`` its MLP of 4 widths.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        if family == "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=task.vocabulary, n_positions=task.length, n_embd=width, n_layer=layers, n_head=heads,
                    embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, bos_token_id=None, eos_token_id=None,
                )
            )  # fmt: skip
        if family == "llama":
            return LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=task.vocabulary, max_position_embeddings=task.length, hidden_size=width,
                    intermediate_size=-(-8 * width // 3 // 16) * 16, num_hidden_layers=layers,
                    num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=True,
                    bos_token_id=None, eos_token_id=None,
                )
            )  # fmt: skip
    raise ValueError(f"family must be 'llama' or 'gpt2', got {family!r}")
