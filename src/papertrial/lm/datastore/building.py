"""Writing a datastore: one forward pass over the text, resumable at any batch."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from papertrial.home import cache_folder
from papertrial.lm.anatomy import unwrap
from papertrial.lm.datastore.states import KeySite, Sequences, StateBatch, pieces_of, target_states
from papertrial.lm.datastore.store import (
    VALUES,
    Datastore,
    file_digest,
    keys_file,
    read_manifest,
    write_manifest,
)

FORMAT = 1
SAVE_EVERY = 64
"""Batches between notes of the place; a killed build repeats at most these."""


def build_datastore(
    model: PreTrainedModel,
    sequences: Sequences,
    folder: Path | str | None = None,
    *,
    sites: Mapping[str, KeySite] | None = None,
    window: int,
    stride: int | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    batch_size: int = 16,
    on_progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, Datastore]:
    """Store, for every token of the sequences but each one's first, the activation before it and the token.

    Parameters
    ----------
    model
        A decoder of a known family, in any mode (it runs in evaluation mode).
    sequences
        Token ids of each document without padding, beginning with a token that is no target (bos).
    folder
        Where the store goes. One that holds a finished store of the same model, text and settings is opened; an
        unfinished one is continued. Default: a folder of the cache, named by all of these.
    sites
        Which activations, by name; several cost one forward pass. Default ``{"key": KeySite()}``.
    window, stride, batch_size
        See :func:`papertrial.lm.datastore.target_states`. Query with the same window and stride.
    dtype
        Of the keys on disk. float16 halves the size; keys beyond its range are an error.
    on_progress
        Hears (entries done, entries in all).

    Returns
    -------
    dict
        A memory-mapped :class:`Datastore` for each site.

    Raises
    ------
    ValueError
        For sequences without a target, keys that are not finite, or a folder with another store in it.
    """
    sites = {"key": KeySite()} if sites is None else dict(sites)
    if any(not name.replace("_", "").replace("-", "").isalnum() for name in sites):
        raise ValueError(f"names of sites become file names: letters, digits, - and _ only; got {', '.join(sites)}")
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype must be 'float16' or 'float32', got {dtype!r}")
    pieces = pieces_of(sequences, window, stride)
    entries = sum(targets for _, targets in pieces)
    if entries == 0:
        raise ValueError("sequences hold no target: give at least one sequence of two tokens")
    recipe: dict[str, Any] = {
        "format": FORMAT,
        "model": model_digest(model),
        "text": _text_digest(sequences),
        "sites": {name: [site.site, site.layer] for name, site in sites.items()},
        "window": window,
        "stride": window // 2 if stride is None else stride,
        "batch_size": batch_size,
        "dtype": dtype,
        "entries": entries,
    }
    if folder is None:
        name = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:24]
        folder = cache_folder("datastores") / name
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        manifest = read_manifest(folder) or {"recipe": recipe, "batches": 0, "rows": 0}
        _require_same(folder, manifest["recipe"], recipe)
        if not manifest.get("digests"):
            batches = target_states(
                model, sequences, sites, window=window, stride=stride, batch_size=batch_size,
                first_batch=manifest["batches"],
            )  # fmt: skip
            _Writing(folder, manifest, on_progress).write_all(batches)
    return {name: Datastore.open(folder, name) for name in sites}


class _Writing:
    """The arrays that are being filled, and the place that has been reached."""

    def __init__(
        self, folder: Path, manifest: dict[str, Any], on_progress: Callable[[int, int | None], None] | None
    ) -> None:
        self.folder, self.manifest, self.on_progress = folder, manifest, on_progress
        self.entries: int = manifest["recipe"]["entries"]
        self.dtype = np.dtype(manifest["recipe"]["dtype"])
        self.arrays: dict[str, NDArray[Any]] = {}

    def write_all(self, batches: Any) -> None:
        for batch in batches:
            self._write(batch)
            if self.manifest["batches"] % SAVE_EVERY == 0:
                self._save()
            if self.on_progress:
                self.on_progress(self.manifest["rows"], self.entries)
        if self.manifest["rows"] != self.entries:
            raise AssertionError(f"{self.manifest['rows']} entries were written, {self.entries} were expected")
        self._save()
        files = [VALUES, *(keys_file(name) for name in self.manifest["recipe"]["sites"])]
        self.manifest["digests"] = {file: file_digest(self.folder / file) for file in files}
        write_manifest(self.folder, self.manifest)

    def _write(self, batch: StateBatch) -> None:
        start = self.manifest["rows"]
        rows = slice(start, start + len(batch.targets))
        self._array(VALUES, np.dtype(np.int32), ())[rows] = batch.targets.cpu().numpy()
        for name, states in batch.states.items():
            self.manifest["recipe"].setdefault("width", {})[name] = states.shape[1]
            keys = _as_keys(states, self.dtype, name, start)
            self._array(keys_file(name), self.dtype, (states.shape[1],))[rows] = keys
        self.manifest["rows"] = rows.stop
        self.manifest["batches"] += 1

    def _array(self, file: str, dtype: np.dtype[Any], row: tuple[int, ...]) -> NDArray[Any]:
        if file not in self.arrays:
            path, shape = self.folder / file, (self.entries, *row)
            if self.manifest["rows"]:
                array = np.load(path, mmap_mode="r+", allow_pickle=False)
                if array.shape != shape or array.dtype != dtype:
                    raise ValueError(
                        f"{path} is {array.dtype} {array.shape}, not {dtype} {shape}: remove {self.folder}"
                    )
            else:
                array = open_memmap(path, mode="w+", dtype=dtype, shape=shape)
            self.arrays[file] = array
        return self.arrays[file]

    def _save(self) -> None:
        # the rows reach the disk before the note that says so
        for array in self.arrays.values():
            if isinstance(array, np.memmap):
                array.flush()
        write_manifest(self.folder, self.manifest)


def _as_keys(states: Tensor, dtype: np.dtype[Any], name: str, start: int) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        keys = states.cpu().numpy().astype(dtype)
    if not np.isfinite(keys).all():
        hint = "; float32 would hold them" if bool(torch.isfinite(states).all()) else ""
        raise ValueError(f"keys {name!r} from entry {start} on are not finite in {dtype}{hint}")
    return keys


def _require_same(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    wrong = [key for key in wanted if found.get(key) != wanted[key]]
    if wrong:
        raise ValueError(
            f"{folder} holds a datastore with another {', '.join(wrong)}: give another folder or remove it"
        )


def model_digest(model: nn.Module) -> str:
    """SHA-256 of the names and values of a model's parameters."""
    total = hashlib.sha256()
    for name, parameter in sorted(unwrap(model).named_parameters()):
        total.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        total.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _text_digest(sequences: Sequences) -> str:
    total = hashlib.sha256()
    for sequence in sequences:
        ids = np.asarray(sequence, dtype=np.int64)
        total.update(len(ids).to_bytes(8, "big") + ids.tobytes())
    return total.hexdigest()
