"""Time of one Sophia update against torch's AdamW (for-loop, foreach, fused) on the parameters of a GPT-2.

    python benchmarks/sophia_step.py --width 384 --layers 6 --threads 1

Prints milliseconds per update (median of interleaved rounds, so that a busy machine hits every row alike) and the ratio
to AdamW foreach. Gradients are fixed; only the optimisers work. The curvature rows are the update of h from a gradient
that is already there; the forward and backward pass that gives it is the user's model and is not timed here.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import AdamW

from papertrial.papers.optimization.sophia.method import SophiaG


def gpt2_parameters(width: int, layers: int, vocabulary: int, device: torch.device) -> list[nn.Parameter]:
    """The trainable parameters of a GPT-2 of that size, with a gradient each."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=width, n_layer=layers, n_head=max(1, width // 64), vocab_size=vocabulary, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    parameters = list(GPT2LMHeadModel(config).to(device).parameters())
    generator = torch.Generator(device=device).manual_seed(0)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator, device=device) * 1e-3
    return parameters


def copies(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """The same parameters and gradients in memory of their own, so that no row finds them in another's cache."""
    clones = []
    for p in parameters:
        clone = nn.Parameter(p.detach().clone())
        clone.grad = p.grad.clone() if p.grad is not None else None
        clones.append(clone)
    return clones


def seconds(action: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call, with the device drained before and after."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    parameters = gpt2_parameters(options.width, options.layers, options.vocabulary, device)

    def sophia(foreach: bool) -> SophiaG:
        optimizer = SophiaG(copies(parameters), foreach=foreach)
        optimizer.update_hessian(4096)
        return optimizer

    foreach, single, refreshed = sophia(True), sophia(False), sophia(True)
    rows: dict[str, Callable[[], object]] = {
        "AdamW for-loop": AdamW(copies(parameters), foreach=False, fused=False).step,
        "AdamW foreach": AdamW(copies(parameters), foreach=True).step,
        "AdamW fused": AdamW(copies(parameters), fused=True).step,
        "SophiaG step, foreach": foreach.step,
        "SophiaG step, one parameter at a time": single.step,
        "SophiaG curvature update": lambda: refreshed.update_hessian(4096),
    }
    times: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(options.rounds + 3):
        for name, action in rows.items():
            taken = seconds(action, device)
            if turn >= 3:
                times[name].append(taken)
    medians = {name: statistics.median(values) for name, values in times.items()}
    size = sum(p.numel() for p in parameters)
    print(f"{size / 1e6:.2f}M parameters in {len(parameters)} tensors, {device}, {options.threads} thread(s), "
          f"torch {torch.__version__}")  # fmt: skip
    print(f"{'':40}{'ms':>9}{'x AdamW foreach':>18}")
    for name, median in medians.items():
        print(f"{name:40}{1e3 * median:9.3f}{median / medians['AdamW foreach']:18.2f}")
    amortised = medians["SophiaG step, foreach"] + medians["SophiaG curvature update"] / 10
    print(f"{'SophiaG per step at k = 10':40}{1e3 * amortised:9.3f}{amortised / medians['AdamW foreach']:18.2f}")


if __name__ == "__main__":
    main()
