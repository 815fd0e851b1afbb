"""Which cuts a stock configuration can describe, and how it then reads."""

import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from papertrial.lm.anatomy import anatomy
from papertrial.lm.models import quiet_transformers
from papertrial.lm.pruning.plan import LayerSizes, sizes

UNEVEN = "pruned_sizes"
"""Field of the configuration of a model that stock classes cannot build: [heads, key/value heads, neurons] by layer."""

# a Llama model without biases is a Mistral model without a window, whose configuration takes any number of heads
_SISTERS = {"llama": ("Llama", "Mistral", {"sliding_window": None})}


def is_ordinary(model: PreTrainedModel) -> bool:
    """Whether ``save_pretrained`` of the model writes a folder that plain transformers reads back."""
    return not hasattr(model.config, UNEVEN)


def require_ordinary(model: PreTrainedModel, after: Sequence[LayerSizes]) -> None:
    """Make sure that the model, cut to these sizes, is an ordinary checkpoint.

    Raises
    ------
    ValueError
        In one line: what cannot be said, and what would work.
    """
    if len(set(after)) > 1:
        raise ValueError("layers of different widths have no ordinary configuration: cut every layer alike")
    if _ordinary_form(model, after[0]) is not None:
        return
    name, width = model.config.model_type, model.config.hidden_size
    before = sizes(model)[0]
    possible = [n for n in range(1, before.heads) if _ordinary_form(model, _with_heads(before, n)) is not None]
    if possible:
        raise ValueError(
            f"a {name} checkpoint of width {width} cannot have {after[0].heads} heads: its configuration takes "
            f"{', '.join(map(str, possible))} or all {before.heads}; choose another ratio, or prune neurons only"
        )
    raise ValueError(
        f"{name} has no head size of its own (it is width / heads), so that {after[0].heads} of {before.heads} heads "
        "are no ordinary checkpoint: prune neurons only"
    )


def _with_heads(size: LayerSizes, heads: int) -> LayerSizes:
    groups = size.key_value_heads
    return LayerSizes(heads, heads if groups == size.heads else math.gcd(heads, groups), size.neurons)


def described(model: PreTrainedModel, after: Sequence[LayerSizes]) -> PreTrainedModel:
    """A model that was just cut to these sizes, with a configuration that is true of it.

    Its own, with the sizes; or that of its sister class, and then the model is of that class, with the same parameters;
    or, where no stock class has such layers, its own as before with the sizes in a field beside.
    """
    form = _ordinary_form(model, after[0]) if len(set(after)) == 1 else None
    if form is None:
        setattr(model.config, UNEVEN, [[size.heads, size.key_value_heads, size.neurons] for size in after])
        return model
    kind, config, fields = form
    if kind is not type(model):
        return _reborn(model, kind, config)
    for name, value in fields.items():
        setattr(model.config, name, value)
    if hasattr(model.config, UNEVEN):
        delattr(model.config, UNEVEN)
    return model


Form = tuple[type[PreTrainedModel], PretrainedConfig, dict[str, int]]


def _ordinary_form(model: PreTrainedModel, size: LayerSizes) -> Form | None:
    """Class and configuration that build layers of this size and are otherwise the model's own, and the fields that
    differ; None if there is none. Found by building it without memory, so that each version of transformers answers
    for itself."""
    block = anatomy(model).blocks[0]
    for kind, config_class, data in _candidates(model):
        fields = _size_fields(data, size)
        if data.get("head_dim") is None and model.config.hidden_size != size.heads * block.head_size:
            fields["head_dim"] = block.head_size
        try:
            with torch.device("meta"):
                config = config_class.from_dict({**data, **fields})
                probe = anatomy(kind(config))
        except (ValueError, RuntimeError, StrictDataclassError):
            continue  # the family's own validation, or widths that do not divide
        found = probe.blocks[0]
        same = sizes(probe.model)[0] == size and found.head_size == block.head_size and found.scaling == block.scaling
        if same and _parameter_names(probe.model) == _parameter_names(model):
            return kind, config, fields
    return None


def _candidates(
    model: PreTrainedModel,
) -> Iterator[tuple[type[PreTrainedModel], type[PretrainedConfig], dict[str, Any]]]:
    data = {name: value for name, value in model.config.to_dict().items() if name != UNEVEN}
    yield type(model), type(model.config), data
    if model.config.model_type in _SISTERS:
        own, other, changes = _SISTERS[model.config.model_type]
        kind = getattr(transformers, type(model).__name__.replace(own, other), None)
        if kind is not None:
            left = {"model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp"}
            data = {name: value for name, value in data.items() if name not in left}
            yield kind, kind.config_class, {**data, **changes, "architectures": [kind.__name__]}


def _size_fields(data: dict[str, Any], size: LayerSizes) -> dict[str, int]:
    """The configuration's fields that say the sizes of a layer, in the words of its family."""
    neurons = next(name for name in ("n_inner", "ffn_dim", "intermediate_size") if name in data)
    fields = {("n_head" if "n_head" in data else "num_attention_heads"): size.heads, neurons: size.neurons}
    if data.get("num_key_value_heads") is not None:
        fields["num_key_value_heads"] = size.key_value_heads
    return fields


def _parameter_names(model: PreTrainedModel) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def _reborn(model: PreTrainedModel, kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """The same parameters and buffers in another class; no copy is made."""
    with torch.device("meta"):
        new = kind(config)
    new.load_state_dict(model.state_dict(), assign=True)
    new.tie_weights()
    buffers = dict(model.named_buffers())
    for name, _ in list(new.named_buffers()):  # tables that are no part of the state, such as rotary frequencies
        owner, _, last = name.rpartition(".")
        setattr(new.get_submodule(owner), last, buffers[name])
    new.generation_config = copy.deepcopy(model.generation_config)
    new.set_attn_implementation(model.config._attn_implementation)
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(wanted[name])
    return new.train(model.training)


def keep_layers_in_config(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Fields that count or list layers, for the layers that are left."""
    config = model.config
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[layer] for layer in layers]
    if hasattr(config, UNEVEN):
        setattr(config, UNEVEN, [getattr(config, UNEVEN)[layer] for layer in layers])
    config.num_hidden_layers = len(layers)


# -- what no stock class can build -------------------------------------------------------------------------------


def load_pruned(folder: Path | str, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a pruned model that was saved with ``save_pretrained``, whether its cut has an ordinary form or not.

    Parameters
    ----------
    folder
        With ``config.json`` and safetensors; no other format is read and no code of the folder is run.
    dtype
        Default: as stored.

    Raises
    ------
    ValueError
        If the folder is not such a checkpoint, or weights and sizes do not fit.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} has no config.json with safetensors beside it")
    with quiet_transformers():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        kind = getattr(transformers, (config.architectures or [""])[0], None)
        if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
            raise ValueError(f"{folder}: config.json names no architecture of transformers: {config.architectures}")
        rows = getattr(config, UNEVEN, None)
        if rows is not None:
            kind = _narrowed(kind, rows)
        try:
            loaded: Any = kind.from_pretrained(
                folder, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True
            )
        except RuntimeError as error:
            raise ValueError(f"{folder}: the weights do not have the sizes that its configuration gives") from error
    model, report = loaded
    if report["missing_keys"]:
        raise ValueError(f"{folder} lacks the weights {', '.join(sorted(report['missing_keys'])[:3])}")
    if rows is not None:
        model.__class__ = kind.__base__  # the subclass has done its work
    return cast(PreTrainedModel, model.eval())


def _narrowed(kind: type[PreTrainedModel], rows: Any) -> type[PreTrainedModel]:
    """A subclass whose models have layers of these sizes from the start, so that transformers can load into them."""

    def build(self: PreTrainedModel, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        _narrow_to(self, rows)

    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})


def _narrow_to(model: PreTrainedModel, rows: Any) -> None:
    from papertrial.lm.pruning.surgery import cut

    blocks = anatomy(model).blocks
    if not isinstance(rows, list) or len(rows) != len(blocks):
        raise ValueError(f"{UNEVEN} must give [heads, key/value heads, neurons] of each of the {len(blocks)} layers")
    for block, row in zip(blocks, rows, strict=True):
        most = (block.heads, block.key_value_heads, block.neurons)
        fits = isinstance(row, list) and len(row) == 3 and all(type(value) is int for value in row)
        if not fits or not all(1 <= value <= limit for value, limit in zip(row, most, strict=True)):
            raise ValueError(f"{UNEVEN} of layer {block.index} must lie in 1 .. {most}, got {row!r}")
        cut(block, range(row[0]), range(row[1]), range(row[2]))
