"""From files and paper folders into the catalogue."""

import stat
from collections.abc import Iterable
from datetime import date
from pathlib import Path

from papertrial.errors import UsageError
from papertrial.feed.runs import IngestReport, recorded_run
from papertrial.feed.sources import MAX_BYTES, parse
from papertrial.feed.sources.scope import parse_scope, slugs_in_scope
from papertrial.feed.store import Store

__all__ = ["IngestReport", "ingest_files", "ingest_scope"]

_SUFFIXES = (".txt", ".md", ".html", ".htm", ".json", ".xml", ".atom", ".rss")


def ingest_files(store: Store, paths: Iterable[Path | str], today: date | None = None) -> IngestReport:
    """Bring saved pages, listings, feeds and API replies into the catalogue; the format is found from the content.

    Parameters
    ----------
    paths
        Files, or folders of them (files that end in .txt, .md, .html, .htm, .json, .xml, .atom or .rss; not deeper).
    today
        The day before which a page without any dates was saved (default: today).

    Returns
    -------
    IngestReport
        A file that cannot be read, and each part of one, is a problem and no reason to leave out the others.

    Raises
    ------
    UsageError
        A path does not exist; nothing is stored then.
    PapertrialError
        The database refused; what was stored before stays.
    """
    files = [file for path in paths for file in _files(Path(path))]
    with recorded_run(store, f"files: {', '.join(file.name for file in files)}") as report:
        for file in files:
            try:
                parsed = parse(_read(file), today)
            except OSError as error:
                report.problems.append(f"{file.name}: cannot be read: {error.strerror or error}")
                continue
            report.problems += [f"{file.name}: {problem}" for problem in parsed.problems]
            report.count(store.upsert(parsed.records))
    return report


def ingest_scope(store: Store, folder: Path | None = None) -> IngestReport:
    """Bring the papers in scope into the catalogue, and take those out of scope whose folder is gone.

    Parameters
    ----------
    folder
        The papers folder (default: the installed one).

    Raises
    ------
    UsageError
        There is no such folder; nothing is taken out of scope then.
    """
    if folder is not None and not folder.is_dir():
        raise UsageError(f"there is no papers folder {str(folder)!r}")
    with recorded_run(store, "scope") as report:
        parsed = parse_scope(folder)
        report.problems += parsed.problems
        report.updated += store.retire_slugs(slugs_in_scope(folder))
        report.count(store.upsert(parsed.records))
    return report


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES and file.is_file())
    if not path.exists():
        raise UsageError(f"there is no file {str(path)!r}")
    return [path]


def _read(file: Path) -> bytes:
    """A file's bytes, one more than is allowed at most: the parser refuses and says so."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise OSError(0, "not a regular file")
    with file.open("rb") as stream:
        return stream.read(MAX_BYTES + 1)
