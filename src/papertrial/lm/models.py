"""Checkpoints by name: house models, models of the Hugging Face hub, local folders."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from papertrial.errors import UsageError, first_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Kind = Literal["causal", "masked", "encoder"]

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")
_HEADS = {
    "causal": ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"),
    "masked": ("ForMaskedLM", "ForPreTraining"),
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.*", "*.model")


@dataclass
class Checkpoint:
    """A model with its tokenizer, in evaluation mode.

    Attributes
    ----------
    model : on its device.
    tokenizer : pads on the left for causal models; its pad token is the end-of-text token where it had none.
    name : as it was asked for.
    folder : where its files lie.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    name: str
    folder: Path

    @cached_property
    def digest(self) -> str:
        """SHA-256 of configuration and weights: the same name may mean other weights tomorrow."""
        return folder_digest(self.folder)


def folder_digest(folder: Path) -> str:
    """SHA-256 over ``config.json`` and the safetensors files of a model folder, in the order of their names."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return _files_digest(tuple((path, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in files))


@lru_cache(maxsize=32)  # large files are read once while nobody writes them
def _files_digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    total = hashlib.sha256()
    for path, _, _ in files:
        total.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def load(
    name: str,
    *,
    device: "torch.device | str" = "cpu",
    dtype: "torch.dtype | None" = None,
    kind: Kind = "causal",
) -> Checkpoint:
    """Load a checkpoint. Weights come from safetensors only, and no code of the checkpoint is ever run.

    Parameters
    ----------
    name : ``house:prose`` and its like, a local folder, or a hub id (``org/name``, optionally ``@revision``). Hub
        models that are in the local cache are loaded without the network.
    device : where to put the model.
    dtype : None means float32 for house models and on the CPU, and the stored type elsewhere.
    kind : ``causal`` (next-token head), ``masked`` (masked-token head) or ``encoder`` (no head).

    Raises
    ------
    UsageError
        In one line: no such model, not a model folder, the wrong kind, damaged weights, no tokenizer, no network.
    """
    import torch

    if kind not in get_args(Kind):
        raise UsageError(f"kind must be one of {', '.join(get_args(Kind))}; got {kind!r}")
    house = name.startswith("house:")
    folder = model_folder(name)
    if dtype is None and (house or torch.device(device).type == "cpu"):
        dtype = torch.float32
    with quiet_transformers():
        config = _config(name, folder, kind)
        model = _model(name, folder, kind, config, dtype)
        tokenizer = _tokenizer(name, folder, kind)
    try:
        model.to(device)  # type: ignore[arg-type]
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"cannot put {name} on device {device}: {first_line(error)}") from error
    return Checkpoint(model.eval(), tokenizer, name, folder)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Neither warnings nor progress bars from transformers and the hub while models are built, loaded or saved."""
    import huggingface_hub.utils.logging as hub_logging
    import transformers.utils.logging as logging

    bars = logging.is_progress_bar_enabled()
    levels = logging.get_verbosity(), hub_logging.get_verbosity()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(levels[0])
        hub_logging.set_verbosity(levels[1])
        if bars:
            logging.enable_progress_bar()


# -- where the files are -----------------------------------------------------------------------------------------


def model_folder(name: str) -> Path:
    """Where the files of a checkpoint lie, fetched from the hub if need be; ``name`` and errors as of :func:`load`."""
    if name.startswith("house:"):
        from papertrial.lm import house

        return house.folder(name.removeprefix("house:"))
    if not name.strip():
        raise UsageError("the name of the model is empty")
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UsageError(f"{name} is a file; give the folder that holds config.json and the safetensors")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not _HUB_ID.fullmatch(name):
        raise UsageError(f"no such model folder: {name} (house models are written house:<name>, hub models org/name)")
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    """The local snapshot of a hub model: from the cache if it is complete there, else over the network."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    arguments: dict[str, Any] = {
        "repo_id": repository,
        "revision": revision or None,
        "allow_patterns": ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"],
        "ignore_patterns": ["*/*"],
    }
    try:
        cached = Path(snapshot_download(**arguments, local_files_only=True))
        if _complete(cached):
            return cached
    except Exception:  # not in the cache: whatever the reason, the network decides
        pass
    try:
        with quiet_transformers():
            return Path(snapshot_download(**arguments))
    except Exception as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise UsageError(f"cannot get {name} from the hub{offline}: {first_line(error)}") from error


def _complete(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return all((folder / shard).is_file() for shard in set(json.loads(index.read_text())["weight_map"].values()))
    return (folder / "model.safetensors").is_file()


# -- what is in them ---------------------------------------------------------------------------------------------


def _config(name: str, folder: Path, kind: Kind) -> Any:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UsageError(f"{name} is not a model folder: {folder} has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise UsageError(
            f"{name} has no safetensors weights in {folder}; other formats can carry code and are not read"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UsageError(f"cannot read the configuration of {name}: {first_line(error)}") from error
    architectures = config.architectures or []
    heads = _HEADS.get(kind)
    if heads and architectures and not any(a.endswith(heads) for a in architectures):
        raise UsageError(f"{name} is a {architectures[0]} checkpoint; a {kind} language model is needed here")
    return config


def _model(name: str, folder: Path, kind: Kind, config: Any, dtype: "torch.dtype | None") -> "PreTrainedModel":
    import transformers

    if hasattr(config, "pruned_sizes"):
        pruned = _pruned(name, folder, dtype)
        return cast("PreTrainedModel", pruned.base_model) if kind == "encoder" else pruned
    classes = {"causal": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM", "encoder": "AutoModel"}
    loader = getattr(transformers, classes[kind])
    if type(config) not in loader._model_mapping:
        raise UsageError(f"{name} is a {config.model_type} checkpoint, of which transformers makes no {kind} model")
    try:
        model, info = loader.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        raise UsageError(f"cannot load {name} as a {kind} model: {first_line(error)}") from error
    # a pooler is not used by kind "encoder"; any other absent weight would be random numbers under the model's name
    missing = sorted(key for key in info["missing_keys"] if not (kind == "encoder" and "pooler." in key))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UsageError(f"{name} is not a complete {kind} checkpoint: it lacks the weights {missing[0]}{more}")
    return model


def _pruned(name: str, folder: Path, dtype: "torch.dtype | None") -> "PreTrainedModel":
    from papertrial.lm.pruning import load_pruned

    try:
        return load_pruned(folder, dtype=dtype)
    except ValueError as error:
        raise UsageError(f"cannot load {name} with its pruned layers: {first_line(error)}") from error


def _tokenizer(name: str, folder: Path, kind: Kind) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    if not any(path.is_file() for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)):
        raise UsageError(f"{name} has no tokenizer: {folder} holds neither tokenizer.json nor a vocabulary")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UsageError(f"cannot load the tokenizer of {name}: {first_line(error)}") from error
    if kind == "causal":
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None and tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
