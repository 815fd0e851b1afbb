"""Tokens per second of the training loop beside a bare PyTorch loop and the Trainer of transformers, on equal work.

    python benchmarks/training_loop.py [--steps 30] [--rounds 5] [--threads 1] [--width 128]

The three take turns for ``--rounds`` rounds, so that a busy machine slows all of them; every one makes the same fused
AdamW steps on the same random batches, with clipping, on a Llama of the house models' size. Printed are medians of the
rounds: tokens per CPU second (what the loop costs) and per wall second (what the user waits), and ratios to the bare
loop. What each sets up per run is part of its time, imports are not.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from papertrial.lm.models import quiet_transformers
from papertrial.lm.training import adamw, train

VOCABULARY, BATCH, LENGTH = 2048, 8, 128


def build(width: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=4,
        num_attention_heads=max(1, width // 32),
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def batches(seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(VOCABULARY, (BATCH, LENGTH), generator=generator)


def bare(model: nn.Module, steps: int, precision: str) -> float:
    """The loop that one would write by hand."""
    optimizer = adamw(1e-3)(list(model.parameters()))
    model.train()
    stream = batches(0)
    total = 0.0
    for _ in range(steps):
        ids = next(stream)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total += loss.item()
    return total / steps


def ours(model: nn.Module, steps: int, precision: str) -> float:
    """``papertrial.lm.training.train``."""
    report = train(model, batches(0), steps=steps, optimizer=adamw(1e-3), precision=precision)  # type: ignore[arg-type]
    return statistics.fmean(report.losses)


def trainer(model: nn.Module, steps: int, precision: str) -> float:
    """``transformers.Trainer``, without saving, logging or evaluation."""
    stream = batches(0)
    rows = [{"input_ids": row, "labels": row} for _ in range(steps) for row in next(stream)]
    silence = contextlib.redirect_stdout(io.StringIO())  # it prints a summary
    with tempfile.TemporaryDirectory() as folder, quiet_transformers(), silence:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=1e-3, weight_decay=0.1,
            adam_beta2=0.95, lr_scheduler_type="constant", max_grad_norm=1.0, bf16=precision == "bf16", use_cpu=True,
            save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True, optim="adamw_torch_fused",
            train_sampling_strategy="sequential",
        )  # fmt: skip
        return float(Trainer(model=model, args=arguments, train_dataset=rows).train().training_loss)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    loops: dict[str, Callable[[nn.Module, int, str], float]] = {
        "bare loop": bare,
        "papertrial.train": ours,
        "transformers.Trainer": trainer,
    }
    tokens = options.steps * BATCH * LENGTH
    size = sum(p.numel() for p in build(options.width).parameters())
    print(
        f"torch {torch.__version__}, {options.threads} threads, {size / 1e6:.2f}M parameters, {BATCH} x {LENGTH} tokens"
    )
    print(f"{'':24s}{'tok / CPU s':>12s}{'ratio':>8s}{'tok / s':>12s}{'ratio':>8s}   mean loss")
    for precision in ("fp32", "bf16"):
        cpu: dict[str, list[float]] = {name: [] for name in loops}
        wall: dict[str, list[float]] = {name: [] for name in loops}
        loss = {}
        for round_ in range(options.rounds + 1):
            for name, loop in loops.items():
                model = build(options.width)
                began, began_cpu = time.perf_counter(), time.process_time()
                loss[name] = loop(model, options.steps if round_ else 2, precision)
                if round_:  # the first round warms up
                    cpu[name].append(tokens / (time.process_time() - began_cpu))
                    wall[name].append(tokens / (time.perf_counter() - began))
        base_cpu, base_wall = (statistics.median(rates["bare loop"]) for rates in (cpu, wall))
        for name in loops:
            rate_cpu, rate_wall = statistics.median(cpu[name]), statistics.median(wall[name])
            print(
                f"{precision} {name:19s}{rate_cpu:12.0f}{rate_cpu / base_cpu:8.2f}"
                f"{rate_wall:12.0f}{rate_wall / base_wall:8.2f}   {loss[name]:.4f}"
            )


if __name__ == "__main__":
    main()
