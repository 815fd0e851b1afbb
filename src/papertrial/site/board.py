"""The papers in scope as the lab knows them: cards, verdicts and evidence, read once and again when files change."""

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from papertrial.errors import PapertrialError
from papertrial.lab import summary
from papertrial.lab.catalogue import Standing
from papertrial.lab.claim import PaperCard, paper_folders, read_card
from papertrial.lab.evidence import Evidence, reference_evidence
from papertrial.lab.verdict import Judgement
from papertrial.site.standings import Stamp, Standings, key_of, shared_stamp

log = logging.getLogger("papertrial.site")

_WATCHED = (".toml", ".json", ".py")


@dataclass(eq=False)
class Entry:
    """One paper in scope. What is asked for is worked out once, then kept.

    Evidence and judgements take milliseconds. A standing that is not remembered takes some fifty, because all of the
    paper's code is read for it: lists of papers do without.
    """

    card: PaperCard
    stamp: Stamp
    key: str
    remembered: Standings
    _evidence: dict[str, Evidence] | None = None
    _standing: Standing | None = None
    _judgements: list[Judgement] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def evidence(self) -> dict[str, Evidence]:
        """The recorded evidence by scale, the largest last; empty where there is none, or none can be read."""
        with self._lock:
            return self._read_evidence()

    def _read_evidence(self) -> dict[str, Evidence]:
        if self._evidence is None:
            try:
                self._evidence = reference_evidence(self.card) if self.card.on_trial else {}
            except Exception:
                log.exception("the evidence of %s cannot be read", self.card.slug)
                self._evidence = {}
        return self._evidence

    @property
    def standing(self) -> Standing:
        with self._lock:
            if self._standing is None:
                try:
                    self._standing = self.remembered.of(self.card, self.key, self._read_evidence())
                except Exception as error:  # half-written code, for one: it must not take the other papers down
                    log.exception("%s cannot be read", self.card.slug)
                    self._standing = Standing(self.card, "incomplete", (str(error),), {})
            return self._standing

    @property
    def judgements(self) -> list[Judgement]:
        """Verdicts on every claim from the evidence at the largest scale; empty before there is any."""
        with self._lock:
            if self._judgements is None:
                found = list(self._read_evidence().values())
                self._judgements = summary.judgements(self.card, found[-1]) if found else []
            return self._judgements

    @property
    def headline(self) -> Judgement | None:
        """The verdict on the headline claim, if there is evidence."""
        return self.judgements[0] if self.judgements else None


@dataclass(frozen=True)
class Snapshot:
    """All papers in scope at one moment."""

    entries: dict[str, Entry]
    by_arxiv: dict[str, str]
    problems: tuple[str, ...]
    number: int

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    @property
    def on_trial(self) -> int:
        """How many papers have a method and an experiment here."""
        return sum(entry.card.on_trial for entry in self)

    def get(self, slug: str | None) -> Entry | None:
        """A paper by slug."""
        return self.entries.get(slug) if slug else None

    def find(self, name: str) -> Entry | None:
        """A paper by slug or arXiv id."""
        return self.entries.get(self.by_arxiv.get(name, name))


class Board:
    """The current snapshot. `refresh` looks at the files and replaces what changed; a background job calls it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._snapshot: Snapshot | None = None
        self._remembered = Standings()

    @property
    def snapshot(self) -> Snapshot:
        """The papers as of the last `refresh`."""
        return self._snapshot or self.refresh()

    def refresh(self) -> Snapshot:
        """Read cards whose folders changed; the others keep what was worked out of them."""
        with self._lock:
            before = self._snapshot
            old = before.entries if before else {}
            entries: dict[str, Entry] = {}
            problems: list[str] = []
            shared = shared_stamp()
            for folder in paper_folders():
                stamp = _stamp(folder)
                held, key = old.get(folder.name), key_of(stamp, shared)
                if held is not None and held.key == key:
                    entries[folder.name] = held
                    continue
                try:
                    entries[folder.name] = Entry(read_card(folder), stamp, key, self._remembered)
                except PapertrialError as error:  # one bad card must not take the others down
                    problems.append(str(error))
                    if held is not None:
                        entries[folder.name] = held
            same = before is not None and list(old.values()) == list(entries.values())
            if not same or before is None:
                by_arxiv = {entry.card.arxiv: slug for slug, entry in entries.items() if entry.card.arxiv}
                number = before.number + 1 if before else 1
                self._snapshot = before = Snapshot(entries, by_arxiv, tuple(problems), number)
            return before

    def warm(self) -> None:
        """Work out every standing ahead of the first reader who asks."""
        for entry in self.snapshot:
            _ = entry.judgements, entry.standing
        self._remembered.save()


def _stamp(folder: Path) -> Stamp:
    found = []
    for path in folder.rglob("*"):
        if path.suffix in _WATCHED and "__pycache__" not in path.parts:
            try:
                status = path.stat()
            except OSError:
                continue  # deleted meanwhile
            found.append((path.relative_to(folder).as_posix(), status.st_mtime_ns, status.st_size))
    return tuple(sorted(found))
