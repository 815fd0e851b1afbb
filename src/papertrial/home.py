"""Where state lives: the database, caches, runs and users' evidence, never the package folder."""

import os
from pathlib import Path

import platformdirs


def home() -> Path:
    """The state folder: ``$PAPERTRIAL_HOME``, else the platform's data folder. Not created here."""
    given = os.environ.get("PAPERTRIAL_HOME")
    if given:
        return Path(given).expanduser().absolute()
    return Path(platformdirs.user_data_dir("papertrial", appauthor=False))


def cache_folder(name: str) -> Path:
    """A folder of things that can be made again (encoded corpora, house models trained on first use); created."""
    folder = home() / "cache" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
