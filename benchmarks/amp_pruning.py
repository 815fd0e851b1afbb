"""What pruning by AMP is worth: size on disk, reading speed and writing speed of sliced models on this machine.

    python benchmarks/amp_pruning.py [--model house:prose] [--ratios 0.2 0.4] [--threads 1]

Each ratio is compared with the whole model in two forms: *masked*, the usual way to report pruning (the same parts
zeroed, which saves nothing), and *sliced*, what ``prune`` writes. Depth, as many whole layers from the middle, is what
one would do for speed alone. Rates count the process's CPU seconds, medians over rounds in turn.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from machine import machine
from transformers import PreTrainedModel

from papertrial.lm.generation import greedy
from papertrial.lm.models import load, quiet_transformers
from papertrial.lm.pruning import keep_layers, magnitude_scores, masked, parameter_counts, prune, sizes
from papertrial.papers.compression.amp_pruning.method import amp_importance, amp_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="house:prose")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.4])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load(options.model).model
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, model.config.vocab_size, (options.batch, options.length), generator=generator)

    def none() -> AbstractContextManager[None]:
        return nullcontext()

    arms: dict[str, tuple[PreTrainedModel, Callable[[], AbstractContextManager[None]]]] = {"whole": (model, none)}
    start = time.process_time()
    importance = amp_importance(model, list(ids.split(4)))
    seconds = {"importance": time.process_time() - start}
    start = time.process_time()
    magnitude_scores(model)
    seconds["magnitude"] = time.process_time() - start
    for ratio in options.ratios:
        plan = amp_plan(model, importance, ratio)
        arms[f"masked {ratio:.0%}"] = (model, lambda plan=plan: masked(model, plan))
        arms[f"sliced {ratio:.0%}"] = (prune(model, plan), none)
        layers = len(sizes(model))
        counts = parameter_counts(model)
        gone = min(round(ratio * counts.total / counts.blocks * layers), layers - 1)
        first = (layers - gone) // 2
        kept = [layer for layer in range(layers) if not first <= layer < first + gone]
        arms[f"depth {ratio:.0%}"] = (keep_layers(model, kept), none)

    rates: dict[str, dict[str, list[float]]] = {name: {"reading": [], "writing": []} for name in arms}
    for _ in range(options.rounds):  # in turn, so that a drift of the machine meets all of them
        for name, (one, context) in arms.items():
            with context(), torch.no_grad():
                start = time.process_time()
                one(input_ids=ids, use_cache=False)
                rates[name]["reading"].append(ids.numel() / (time.process_time() - start))
                start = time.process_time()
                greedy(one, ids[:, :16], max_new_tokens=options.new_tokens, eos_token_id=[])
                taken = time.process_time() - start
                rates[name]["writing"].append(options.batch * options.new_tokens / taken)

    print(machine("torch", "transformers"))
    print(f"{options.model}, {options.batch} x {options.length} tokens read, {options.new_tokens} new tokens a row")
    print("scores: " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))
    base = {what: statistics.median(values) for what, values in rates["whole"].items()}
    print(f"{'':12} {'parameters':>11} {'MB':>7} {'reading, tokens/s':>22} {'writing, tokens/s':>22}")
    for name, (one, _) in arms.items():
        reading, writing = (statistics.median(rates[name][what]) for what in ("reading", "writing"))
        print(
            f"{name:12} {parameter_counts(one).total:11,} {_megabytes(one):7.2f} "
            f"{reading:13,.0f} {reading / base['reading']:6.2f} x {writing:13,.0f} {writing / base['writing']:6.2f} x"
        )


def _megabytes(model: PreTrainedModel) -> float:
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) / 1e6


if __name__ == "__main__":
    main()
