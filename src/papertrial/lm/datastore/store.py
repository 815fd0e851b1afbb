"""A finished datastore: keys and values as arrays, memory-mapped where they come from disk."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from papertrial.lm.datastore.states import KeySite

MANIFEST = "manifest.json"
VALUES = "values.npy"


def keys_file(name: str) -> str:
    """File of the keys called ``name``."""
    return f"keys-{name}.npy"


@dataclass(frozen=True)
class Datastore:
    """Row i: the activation before token ``values[i]`` of the text.

    Attributes
    ----------
    keys
        (N, D) float16 or float32; a read-only memory map if the store lies on disk.
    values
        (N,) token ids, int32.
    recipe
        What it was made of: digests of model and text, sites, window. Empty for arrays.
    name
        Which of the recipe's sites the keys are, empty for arrays.
    digest
        SHA-256 of keys and values, empty for arrays.
    """

    keys: NDArray[np.floating]
    values: NDArray[np.int32]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    digest: str = ""

    def __post_init__(self) -> None:
        if self.keys.ndim != 2 or self.keys.dtype not in (np.float16, np.float32):
            raise ValueError(
                f"keys must be (N, D) in float16 or float32, got {self.keys.dtype} {tuple(self.keys.shape)}"
            )
        if self.values.shape != self.keys.shape[:1] or self.values.dtype.kind not in "iu":
            raise ValueError(
                f"values must be {self.keys.shape[:1]} token ids, one per key; got {self.values.dtype} "
                f"{tuple(self.values.shape)}"
            )
        if len(self.keys) == 0:
            raise ValueError("the datastore is empty: it needs at least one key")

    @classmethod
    def from_arrays(cls, keys: NDArray[np.floating], values: NDArray[np.integer]) -> "Datastore":
        """A store in memory; ValueError for keys that are not finite."""
        if not np.isfinite(keys).all():
            raise ValueError("keys hold values that are not finite")
        return cls(np.asarray(keys), np.asarray(values).astype(np.int32, casting="same_kind"))

    @classmethod
    def open(cls, folder: Path | str, name: str = "key", *, verify: bool = False) -> "Datastore":
        """Open the keys ``name`` of a folder that ``build_datastore`` finished.

        Parameters
        ----------
        verify
            Read everything once and compare it with the digests of the build.

        Raises
        ------
        ValueError
            If there is no finished store, it has no such keys, or files do not agree with the manifest.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if manifest is None or not manifest.get("digests"):
            state = (
                "an unfinished datastore: build it again, it goes on where it stopped" if manifest else "no datastore"
            )
            raise ValueError(f"{folder} holds {state}")
        if name not in manifest["recipe"]["sites"]:
            raise ValueError(f"{folder} has no keys {name!r}; it has {', '.join(manifest['recipe']['sites'])}")
        keys = np.load(folder / keys_file(name), mmap_mode="r", allow_pickle=False)
        values = np.load(folder / VALUES, mmap_mode="r", allow_pickle=False)
        expected = (manifest["recipe"]["entries"], manifest["recipe"]["width"][name])
        if keys.shape != expected or values.shape != expected[:1]:
            raise ValueError(f"{folder}: keys are {keys.shape} and values {values.shape}, the manifest says {expected}")
        if verify:
            for file in (keys_file(name), VALUES):
                if file_digest(folder / file) != manifest["digests"][file]:
                    raise ValueError(f"{folder / file} is damaged: its digest is not that of the build")
        digest = hashlib.sha256((manifest["digests"][keys_file(name)] + manifest["digests"][VALUES]).encode())
        return cls(keys, values, manifest["recipe"], name, digest.hexdigest())

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def width(self) -> int:
        """D."""
        return int(self.keys.shape[1])

    @property
    def site(self) -> KeySite | None:
        """Where the keys were taken, None for arrays."""
        return KeySite(*self.recipe["sites"][self.name]) if self.name else None

    def subset(self, rows: NDArray[np.integer]) -> "Datastore":
        """A store in memory of some rows, in the order given."""
        return Datastore(np.asarray(self.keys[rows]), np.asarray(self.values[rows]), self.recipe, self.name)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, None if there is none that can be read."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Replace the manifest in one step."""
    temporary = folder / f"{MANIFEST}.tmp"
    temporary.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    temporary.replace(folder / MANIFEST)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
