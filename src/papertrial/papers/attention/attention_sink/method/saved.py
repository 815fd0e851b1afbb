"""A variant's trained parameters in a folder that ``save_pretrained`` wrote.

``save_pretrained`` writes them with the model, but ``from_pretrained`` builds the plain architecture, which has no
place for them, and leaves them out. They are read from the folder itself.
"""

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from papertrial.lm.anatomy import anatomy, unwrap

SINK_PARAMETERS = "attention_sink"
"""Name under which a layer's own parameters hang on its attention module (and stand in the state dict)."""


def saved_parameters(model: nn.Module, folder: str | os.PathLike[str]) -> dict[int, dict[str, Tensor]]:
    """What the folder holds of a variant, by layer of ``model`` and name (``key``, ``value``, ``first``, ``second``).

    The folder may be of the model with or without its language head: ``model.layers.0...`` and ``layers.0...`` are the
    same layer.

    Raises
    ------
    ValueError
        For a folder without safetensors, one whose files cannot be read, and one whose model had no such parameters.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"saved must be a folder that save_pretrained wrote; {folder} holds no safetensors")
    found: dict[str, dict[str, Tensor]] = {}
    mark = f".{SINK_PARAMETERS}."
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in [name for name in tensors.keys() if mark in name]:  # noqa: SIM118 - not a mapping
                    module, _, parameter = name.partition(mark)
                    found.setdefault(module, {})[parameter] = tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"saved: {file} cannot be read: {error}") from error
    if not found:
        raise ValueError(f"saved: the model in {folder} had no parameters of a sink variant when it was written")
    inner = unwrap(model)
    prefix = f"{getattr(inner, 'base_model_prefix', '')}."
    stripped = {module.removeprefix(prefix): own for module, own in found.items()}
    names = {id(module): name.removeprefix(prefix) for name, module in inner.named_modules()}
    blocks = enumerate(anatomy(model).blocks)
    return {layer: stripped[name] for layer, block in blocks if (name := names[id(block.attention)]) in stripped}
