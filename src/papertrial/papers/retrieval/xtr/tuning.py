"""Chooses the learning rate of both objectives on the development modules, with seeds that no trial uses.

    python -m papertrial.papers.retrieval.xtr.tuning

writes ``tuning.json`` beside this file: every learning rate with its MRR@10 on the development queries, ranked from the
16 tokens first retrieved as in the first claim, per seed. The best of each objective is what
``SCALES["small"]["lr"]`` holds; a test compares the two.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from papertrial.lm.docstring_pairs import docstring_pairs
from papertrial.lm.encoders import load_minilm
from papertrial.papers.retrieval.xtr.docstring_search import Search, index_of, maxsim_mrr, split_pairs
from papertrial.papers.retrieval.xtr.experiment import OBJECTIVES, SCALES, SHALLOW, new_encoder, states, train_arm
from papertrial.papers.retrieval.xtr.method import vectors_of

LEARNING_RATES = (5e-5, 1e-4, 2e-4, 5e-4)
SEEDS = (0, 1, 2)


def stream(seed: int, purpose: str) -> int:
    """The start of a generator that shares nothing with those of any trial."""
    return int.from_bytes(hashlib.sha256(f"xtr tuning/{seed}/{purpose}".encode()).digest()[:7], "big")


def main(arguments: list[str] | None = None) -> None:
    """Run the grid and write the table after every run; what it already holds of the same set-up is not run again."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--scale", default="small", choices=list(SCALES))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    scale, path = SCALES[options.scale], results_of(options.scale)
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if table.get("setup") != setup_of(scale):
        table = {
            "setup": setup_of(scale),
            "seeds": list(SEEDS),
            "untrained": {"mrr@10": [], "full maxsim": []},
            "runs": {},
        }
        for name in OBJECTIVES:
            table["runs"][name] = [{"lr": lr, "mrr@10": [], "full maxsim": []} for lr in LEARNING_RATES]
    checkpoint = load_minilm(device=options.device)
    pairs = docstring_pairs(tuple(scale["packages"]))[: scale["pairs"]]
    queries, documents = states(checkpoint, pairs, scale)
    for number, seed in enumerate(SEEDS):
        split = split_pairs(pairs, scale["queries"], np.random.default_rng(stream(seed, "modules")))
        for name, row in _arms(table):
            if len(row["mrr@10"]) > number:
                continue
            encoder = new_encoder(checkpoint, scale, torch.Generator().manual_seed(stream(seed, "projection")))
            if name != "untrained":
                own = {**scale, "lr": {name: row["lr"]}}
                batches = torch.Generator().manual_seed(stream(seed, "batches"))
                train_arm(name, own, encoder, queries, documents, split.train, batches)
            index = index_of(encoder, documents, options.device)
            asked = vectors_of(encoder, [queries[place] for place in split.development])
            row["mrr@10"].append(round(Search(index, asked, split.development, SHALLOW).mrr(SHALLOW), 4))
            row["full maxsim"].append(round(maxsim_mrr(index, asked, split.development), 4))
            print(f"seed {seed} {name} {row}", flush=True)
            path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    for name in OBJECTIVES:
        print(name, chosen(table["runs"][name]))


def _arms(table: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [("untrained", table["untrained"]), *((name, row) for name in OBJECTIVES for row in table["runs"][name])]


def results_of(scale: str) -> Path:
    """The table of a scale."""
    return Path(__file__).with_name("tuning.json" if scale == "small" else f"tuning_{scale}.json")


def setup_of(scale: dict[str, Any]) -> dict[str, Any]:
    """What of a scale the choice depends on."""
    return {key: value for key, value in scale.items() if key not in ("seeds", "lr", "k_primes", "k_train_others")}


def chosen(rows: list[dict[str, Any]]) -> float:
    """The learning rate of the highest mean."""
    return float(max(rows, key=lambda row: sum(row["mrr@10"]) / len(row["mrr@10"]))["lr"])


if __name__ == "__main__":
    main()
