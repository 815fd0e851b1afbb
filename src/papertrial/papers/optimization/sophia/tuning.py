"""Tunes every language-modelling arm of a scale on the validation split, with seeds that no trial uses.

    python -m papertrial.papers.optimization.sophia.tuning --processes 2

writes ``tuning.json`` beside this file: every setting tried with its validation loss per seed. High learning rates are
unstable on some seeds only, so the best few of every arm are run on further seeds before one of them is chosen. The
best of each arm is what ``SCALES["small"]["settings"]`` holds; a test compares the two.
"""

import argparse
import hashlib
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from papertrial.lm.optim import Tuning, grid_settings, tune
from papertrial.papers.optimization.sophia.pretraining import Streams, make_task, train_arm

RESULTS = Path(__file__).with_name("tuning.json")
SEEDS = (0, 1)
FINAL_SEEDS = (0, 1, 2, 3, 4)
FINALISTS = 4
"""Settings of an arm that go on from ``SEEDS`` to all of ``FINAL_SEEDS``."""


def tuning_streams(seed: int, device: torch.device | str = "cpu") -> Streams:
    """Generators that share nothing with those of any trial. Labels are drawn on ``device``, the rest on the CPU."""

    def stream(purpose: str) -> torch.Generator:
        digest = hashlib.sha256(f"tuning/{seed}/{purpose}".encode()).digest()
        where = device if purpose == "labels and probes" else "cpu"
        return torch.Generator(device=where).manual_seed(int.from_bytes(digest[:7], "big"))

    return stream


def runs_to_tune(scale: dict[str, Any]) -> dict[str, int]:
    """Every tuned run of a scale with its length: the arms, and Sophia-G again at half the steps."""
    return {name: scale["steps"] // 2 if name.endswith("_half") else scale["steps"] for name in scale["grids"]}


def tune_arm(name: str, scale: dict[str, Any], streams: Streams, *, steps: int, device: torch.device) -> Tuning:
    """Grid search of one arm on the validation split with the streams given."""
    task = make_task(scale, device)

    def score(**setting: float) -> float:
        arm = name.removesuffix("_half")
        run = train_arm(arm, setting, scale, task, streams, steps=steps, split="valid", device=device)
        return run.curve.final

    return tune(score, scale["grids"][name])


def _one(job: tuple[str, dict[str, float], int, dict[str, Any]]) -> float:
    name, setting, seed, scale = job
    torch.set_num_threads(1)
    device = torch.device("cpu")
    run = train_arm(
        name.removesuffix("_half"), setting, scale, make_task(scale, device), tuning_streams(seed),
        steps=runs_to_tune(scale)[name], split="valid", device=device,
    )  # fmt: skip
    return run.curve.final


def main(arguments: list[str] | None = None) -> None:
    """Run the grids and write the table; what it already holds of the same set-up is not run again."""
    from papertrial.papers.optimization.sophia.experiment import SCALES

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--scale", default="small", choices=[name for name in SCALES if "settings" in SCALES[name]])
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args(arguments)
    scale = SCALES[options.scale]
    setup = {key: value for key, value in scale.items() if key not in ("seeds", "settings", "grids", "toy")}
    table: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known: dict[tuple[str, str], list[float]] = {}
    if table.get("setup") == setup:
        for name, rows in table["runs"].items():
            known |= {_key(name, row["setting"]): row["losses"] for row in rows}
    wanted = [(name, setting) for name in scale["grids"] for setting in grid_settings(scale["grids"][name])]
    with ProcessPoolExecutor(options.processes, mp_context=multiprocessing.get_context("spawn")) as pool:

        def complete(settings: list[tuple[str, dict[str, float]]], seeds: tuple[int, ...]) -> None:
            jobs = [(n, s, seed, scale) for n, s in settings for seed in seeds[len(known.get(_key(n, s), [])) :]]
            for (name, setting, seed, _), loss in zip(jobs, pool.map(_one, jobs), strict=True):
                known.setdefault(_key(name, setting), []).append(round(loss, 4))
                print(f"{name} {setting} seed {seed}: {loss:.4f}", flush=True)
                _write(setup, [(n, s) for n, s in wanted if len(known.get(_key(n, s), [])) >= len(SEEDS)], known)

        complete(wanted, SEEDS)
        complete([(name, s) for name in scale["grids"] for s in _finalists(name, scale, known)], FINAL_SEEDS)
    for name, rows in _write(setup, wanted, known).items():
        best = chosen(rows)
        print(name, best["setting"], best["losses"])


def chosen(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of lowest mean loss among those that were run on all seeds."""
    return min((row for row in rows if len(row["losses"]) == len(FINAL_SEEDS)), key=lambda row: sum(row["losses"]))


def _finalists(name: str, scale: dict[str, Any], known: dict[tuple[str, str], list[float]]) -> list[dict[str, float]]:
    settings = list(grid_settings(scale["grids"][name]))
    return sorted(settings, key=lambda s: sum(known[_key(name, s)][: len(SEEDS)]))[:FINALISTS]


def _key(name: str, setting: dict[str, float]) -> tuple[str, str]:
    return name, json.dumps(setting, sort_keys=True)


def _write(
    setup: dict[str, Any], rows: list[tuple[str, dict[str, float]]], known: dict[tuple[str, str], list[float]]
) -> dict[str, list[dict[str, Any]]]:
    """Write what is known, after every setting: a run that is stopped goes on from there."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for name, setting in rows:
        runs.setdefault(name, []).append({"setting": setting, "losses": known[_key(name, setting)]})
    lines = ",\n".join(
        f'  "{name}": [\n' + ",\n".join("   " + json.dumps(row) for row in rows) + "\n  ]"
        for name, rows in runs.items()
    )
    head = f'{{\n "setup": {json.dumps(setup)},\n "seeds": {json.dumps(FINAL_SEEDS)},\n "runs": {{\n'
    RESULTS.write_text(f"{head}{lines}\n }}\n}}\n")
    return runs


if __name__ == "__main__":
    main()
