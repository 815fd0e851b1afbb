"""The training loop's place on disk: all that the next step depends on, in one file that is never half written."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

FILE = "training.pt"


def save_atomically(state: Mapping[str, Any], folder: Path) -> None:
    """Write ``state`` to ``folder``; a kill at any moment leaves either the old file or the new one."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".training-", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / FILE)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(folder: Path) -> dict[str, Any] | None:
    """The state saved in ``folder``, on the CPU, or None if there is none. Never unpickles code.

    Raises
    ------
    ValueError
        If the file is there but is not a checkpoint of this loop.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a training checkpoint ({type(error).__name__}); delete it to start anew"
        ) from error
    if not isinstance(state, dict) or "step" not in state or "run" not in state:
        raise ValueError(f"{path} is not a training checkpoint; delete it to start anew")
    return state


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """State of the global generators that dropout on ``device`` draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Put ``random_state`` back."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def capture(thing: Any) -> Any:
    """State of a generator (``get_state``) or of anything with ``state_dict``."""
    return thing.get_state() if isinstance(thing, torch.Generator) else thing.state_dict()


def restore(thing: Any, state: Any) -> None:
    """Put ``capture`` back."""
    if isinstance(thing, torch.Generator):
        thing.set_state(state)
    else:
        thing.load_state_dict(state)


def model_and_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, processes: int) -> dict[str, Any]:
    """Their states. Over several processes: a collective call; the first gets the full, unsharded state."""
    if processes == 1:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": moments}


def restore_model_and_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], processes: int
) -> None:
    """Put ``model_and_optimizer`` back; a collective call over several processes, each holding the full state."""
    if processes == 1:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(full_state_dict=True),
    )
