"""Where papers stand, remembered between starts: to work it out means to read all of a paper's code.

A standing holds as long as no file of the paper and none of what papers share has changed; the key says so. What is
remembered can be made again, and is left aside where it cannot be read.
"""

import hashlib
import json
import logging
import threading
from pathlib import Path

import papertrial
from papertrial.errors import PapertrialError
from papertrial.home import cache_folder
from papertrial.lab.catalogue import Standing, standing
from papertrial.lab.claim import PaperCard
from papertrial.lab.digests import PACKAGE
from papertrial.lab.evidence import Evidence, write_atomically

log = logging.getLogger("papertrial.site")

Stamp = tuple[tuple[str, int, int], ...]


class Standings:
    """Standings by slug and key. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, tuple[str, str, tuple[str, ...]]] | None = None
        self._changed = False

    def of(self, card: PaperCard, key: str, evidence: dict[str, Evidence]) -> Standing:
        """Where a paper with some evidence stands: as it is remembered under a key, or worked out."""
        with self._lock:
            if self._known is None:
                self._known = _read()
            held = self._known.get(card.slug)
        if held is not None and held[0] == key:
            return Standing(card, held[1], held[2], evidence)  # type: ignore[arg-type]
        found = standing(card)
        if found.state in ("fresh", "aged", "stale"):
            with self._lock:
                self._known[card.slug] = (key, found.state, found.problems)
                self._changed = True
        return found

    def save(self) -> None:
        """Remember what was worked out since the last time."""
        with self._lock:
            if not self._changed or self._known is None:
                return
            text, self._changed = json.dumps(self._known), False
        try:
            write_atomically(_path(), text)
        except (OSError, PapertrialError) as error:
            log.warning("standings are not remembered: %s", error)


def key_of(stamp: Stamp, shared: str) -> str:
    """What a paper's standing depends on, in short."""
    return hashlib.sha256(repr((stamp, shared)).encode()).hexdigest()[:32]


def shared_stamp() -> str:
    """The state of everything that papers share: the packages `lm` and `lab`, house models, the version."""
    total = hashlib.sha256(papertrial.__version__.encode())
    for package in ("lm", "lab"):
        for path in sorted((PACKAGE / package).rglob("*")):
            if "__pycache__" not in path.parts and path.is_file():
                status = path.stat()
                total.update(f"{path}\0{status.st_mtime_ns}\0{status.st_size}\n".encode())
    return total.hexdigest()


def _path() -> Path:
    return cache_folder("board") / "standings.json"


def _read() -> dict[str, tuple[str, str, tuple[str, ...]]]:
    try:
        held = json.loads(_path().read_text(encoding="utf-8"))
        return {
            str(slug): (str(key), str(state), tuple(map(str, problems)))
            for slug, (key, state, problems) in held.items()
            if state in ("fresh", "aged", "stale")
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
