"""Backup and restore: everything that cannot be made again, in one file, from SQLite or PostgreSQL into either.

The file is a ZIP archive: ``manifest.json`` (schema, rows of every table, digest of every table and file),
``tables/<name>.jsonl`` (a row a line), ``keys/`` and ``evidence/`` (the user's own runs) of the home folder. All
tables are read in one transaction, so the service may go on while a backup is made. What is derived (search index,
figures) is left out, and so is what a running service is doing (leases, letters counted). Stop the service before a
restore.

A restore reads and checks the whole archive, and writes its files beside the places they are for, before it touches the
database; the files take their places when the database has taken the rows.
"""

import hashlib
import json
import os
import secrets
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any

import sqlalchemy as sa

import papertrial
from papertrial.errors import PapertrialError, UsageError
from papertrial.feed import schema
from papertrial.feed.catalogue import index_folder
from papertrial.feed.database import explained
from papertrial.feed.search import SearchIndex
from papertrial.feed.store import Store
from papertrial.home import home
from papertrial.site.keys import KEY_BYTES

#: 1 had no digests of files (the archive's own checksums still tell damage).
FORMAT = 2
_KEY = "keys/service"
_PIECE = 1 << 20
_ROWS = 500
_FOLDERS = ("keys", "evidence")
_MANIFEST = "manifest.json"
_LEFT_OUT = frozenset(("leases", "letter_counts"))
_LONGEST_LINE = 64_000_000


def backup(path: Path, database: str | None = None) -> dict[str, int]:
    """Write a backup; rows by table. The file is complete or not there at all, and only its owner may read it.

    Raises
    ------
    UsageError
        The path is there already, or cannot be written; the database has accounts and this home folder not their key.
    PapertrialError
        The database cannot be read.
    """
    path = path.absolute()
    if path.exists():
        raise UsageError(f"{path} is there already; name a new file")
    temporary = path.with_name(f".{path.name}.part")
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w+b") as stream:
            with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=4) as archive:
                counts = _write(archive, database)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return counts


def _write(archive: zipfile.ZipFile, database: str | None) -> dict[str, int]:
    counts, digests = {}, {}
    with Store.open(database) as store, _snapshot(store) as connection:
        for table in _tables():
            with archive.open(f"tables/{table.name}.jsonl", "w", force_zip64=True) as stream:
                total, digest = 0, hashlib.sha256()
                for row in connection.execute(sa.select(table).order_by(*table.primary_key.columns)).mappings():
                    line = json.dumps(dict(row), default=_plain, ensure_ascii=False).encode() + b"\n"
                    stream.write(line)
                    digest.update(line)
                    total += 1
            counts[table.name], digests[table.name] = total, digest.hexdigest()
    files = _write_files(archive)
    if counts["users"] and _KEY not in files:
        # Without it the links in letters that were sent would be void after a restore, and nobody would know why.
        raise UsageError(
            f"the database has accounts, but {home() / _KEY} is missing; is this the service's home folder?"
        )
    manifest = {
        "format": FORMAT,
        "papertrial": papertrial.__version__,
        "schema": schema.HEAD,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "rows": counts,
        "digests": digests,
        "files": files,
    }
    archive.writestr(_MANIFEST, json.dumps(manifest, indent=1))
    return counts


def _write_files(archive: zipfile.ZipFile) -> dict[str, str]:
    """Put the folders into the archive; the digest of each file."""
    digests = {}
    for folder in _FOLDERS:
        for file in sorted((home() / folder).rglob("*")):
            if file.is_file() and not file.name.startswith("."):
                name = f"{folder}/{file.relative_to(home() / folder).as_posix()}"
                with file.open("rb") as source, archive.open(zipfile.ZipInfo.from_file(file, name), "w") as target:
                    digests[name] = _copy(source, target)
    return digests


def _copy(source: IO[bytes], target: IO[bytes] | None = None) -> str:
    """Read to the end, writing along where a target is given; the digest of what was read."""
    digest = hashlib.sha256()
    while piece := source.read(_PIECE):
        digest.update(piece)
        if target is not None:
            target.write(piece)
    return digest.hexdigest()


def _tables() -> list[sa.Table]:
    """What is kept, each table after those that its rows refer to."""
    return [table for table in schema.metadata.sorted_tables if table.name not in _LEFT_OUT]


@contextmanager
def _snapshot(store: Store) -> Iterator[sa.Connection]:
    """One state of the database for all tables."""
    options: dict[str, Any] = {"stream_results": True}
    if store.engine.url.get_backend_name() == "postgresql":
        options["isolation_level"] = "REPEATABLE READ"
    with (
        explained(store.engine.url),
        store.engine.connect().execution_options(**options) as connection,
        connection.begin(),
    ):
        yield connection


def restore(path: Path, database: str | None = None, *, force: bool = False) -> dict[str, int]:
    """Bring a backup back; rows by table. All of the database is replaced, or nothing.

    Parameters
    ----------
    force
        Replace a database that has papers or accounts in it already.

    Raises
    ------
    UsageError
        The file is not a backup, is damaged, or was made by a newer version; the database is not empty.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            manifest = _manifest(archive, path)
            _check_tables(archive, manifest, path)
            with _staged(archive, manifest["files"], path) as staged, Store.open(database) as store:
                _check_empty(store, force)
                with store.writing() as connection:
                    counts = _replace(connection, archive, manifest, path)
                    _forget_index(database)
                for temporary, target in staged:
                    os.replace(temporary, target)
            return counts
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except (zipfile.BadZipFile, EOFError, zlib.error, OSError) as error:
        raise UsageError(f"{path} is damaged or no backup: {error}") from None


def _manifest(archive: zipfile.ZipFile, path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(archive.read(_MANIFEST))
        rows, digests = dict(manifest["rows"]), dict(manifest["digests"])
        made_with, file_format = str(manifest["schema"]), int(manifest["format"])
        files = dict(manifest["files"]) if file_format > 1 else _files_without_digests(archive)
    except (KeyError, ValueError, TypeError):
        raise UsageError(f"{path} is not a backup of Papertrial") from None
    if not 1 <= file_format <= FORMAT or made_with > schema.HEAD:
        raise UsageError(f"{path} was made by a newer Papertrial (schema {made_with}, this one knows {schema.HEAD})")
    if rows.get("users") and _KEY not in files:
        raise UsageError(f"{path} is damaged: it has accounts, but not the service's key ({_KEY})")
    return {"rows": rows, "digests": digests, "files": files}


def _files_without_digests(archive: zipfile.ZipFile) -> dict[str, None]:
    """The files of a backup of format 1."""
    return {name: None for name in archive.namelist() if _is_ours(name)}


def _is_ours(name: str) -> bool:
    """Whether a file's name leads into one of the folders, and nowhere else."""
    parts = PurePosixPath(name).parts
    plain = all(part and not part.startswith(".") and part.isprintable() and "\\" not in part for part in parts)
    return len(parts) > 1 and parts[0] in _FOLDERS and plain and "/".join(parts) == name


def _check_tables(archive: zipfile.ZipFile, manifest: dict[str, Any], path: Path) -> None:
    """Read every table of the archive once, before anything is changed."""
    held = set(archive.namelist())
    for name in manifest["rows"]:
        if f"tables/{name}.jsonl" not in held:
            raise UsageError(f"{path} is damaged: table {name} is missing")
        with archive.open(f"tables/{name}.jsonl") as stream:
            if _copy(stream) != manifest["digests"].get(name):
                raise UsageError(f"{path} is damaged: table {name} is not what was written")


@contextmanager
def _staged(archive: zipfile.ZipFile, files: dict[str, str | None], path: Path) -> Iterator[list[tuple[Path, Path]]]:
    """The files of the archive, checked and written beside their places; (written, its place) of each."""
    staged: list[tuple[Path, Path]] = []
    try:
        for name, digest in files.items():
            temporary, target = _place(name, path)
            staged.append((temporary, target))
            try:
                source = archive.open(name)
            except KeyError:
                raise UsageError(f"{path} is damaged: {name} is missing") from None
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with source, os.fdopen(descriptor, "wb") as stream:
                found = _copy(source, stream)
                stream.flush()
                os.fsync(stream.fileno())
            if digest is not None and found != digest:
                raise UsageError(f"{path} is damaged: {name} is not what was written")
            if name == _KEY and temporary.stat().st_size != KEY_BYTES:
                raise UsageError(f"{path} is damaged: {name} is not a key")
        yield staged
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)


def _place(name: str, path: Path) -> tuple[Path, Path]:
    """Where a file of the archive goes, and where it is written before."""
    target = home() / name
    if _is_ours(name):
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if target.parent.resolve().is_relative_to((home() / PurePosixPath(name).parts[0]).resolve()):
            return target.with_name(f".{target.name}.{secrets.token_hex(8)}"), target
    raise UsageError(f"{path} is damaged: it holds a file {name[:80]!r}, which has no place here")


def _check_empty(store: Store, force: bool) -> None:
    if force:
        return
    from papertrial.feed.people_schema import users

    with store.reading() as connection:
        people = connection.execute(sa.select(sa.func.count()).select_from(users)).scalar_one()
    if store.count() or people:
        raise UsageError(
            f"the database has {store.count():,} papers and {people} accounts; give --force to replace them"
        )


def _replace(
    connection: sa.Connection, archive: zipfile.ZipFile, manifest: dict[str, Any], path: Path
) -> dict[str, int]:
    tables = _tables()
    for table in reversed(tables):
        connection.execute(table.delete())
    counts = {}
    for table in tables:
        if table.name not in manifest["rows"]:
            continue  # a table that came after the backup was made
        try:
            counts[table.name] = _insert_rows(connection, archive, table, path)
        except (sa.exc.IntegrityError, sa.exc.DataError) as error:
            raise UsageError(f"{path} is damaged: a row of table {table.name} does not fit: {error.orig}") from None
        if counts[table.name] != manifest["rows"][table.name]:
            raise UsageError(f"{path} is damaged: table {table.name} is not what was written")
    _count_on(connection)
    return counts


def _insert_rows(connection: sa.Connection, archive: zipfile.ZipFile, table: sa.Table, path: Path) -> int:
    """Bring one table back; how many rows it has."""
    batch, total = [], 0
    with archive.open(f"tables/{table.name}.jsonl") as stream:
        while line := stream.readline(_LONGEST_LINE):
            batch.append(_row(table, line, path))
            total += 1
            if len(batch) == _ROWS:
                connection.execute(table.insert(), batch)
                batch = []
    if batch:
        connection.execute(table.insert(), batch)
    return total


def _row(table: sa.Table, line: bytes, path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if not isinstance(row, dict) or not row:
            raise ValueError(row)
        return {column.name: _typed(column, row[column.name]) for column in table.columns if column.name in row}
    except (ValueError, TypeError, AttributeError):
        raise UsageError(f"{path} is damaged: a row of table {table.name} cannot be read") from None


def _typed(column: sa.Column[Any], value: Any) -> Any:
    if value is not None and isinstance(column.type, sa.DateTime):
        return datetime.fromisoformat(value)
    if value is not None and isinstance(column.type, sa.Date):
        return date.fromisoformat(value)
    return value


def _plain(value: Any) -> str:
    if isinstance(value, datetime | date):
        return value.isoformat()
    raise PapertrialError(f"{type(value).__name__} cannot be backed up")


def _count_on(connection: sa.Connection) -> None:
    """PostgreSQL: numbers that it gives out go on behind the restored ones. SQLite sees to it by itself."""
    if connection.dialect.name != "postgresql":
        return
    for table in _tables():
        for column in table.primary_key.columns:
            found = connection.execute(sa.select(sa.func.pg_get_serial_sequence(table.name, column.name))).scalar()
            if found:
                top = connection.execute(sa.select(sa.func.max(column))).scalar()
                connection.execute(sa.select(sa.func.setval(found, (top or 0) + 1, False)))


def _forget_index(database: str | None) -> None:
    """Search begins anew: the restored revisions are not those that the index counts by."""
    folder = index_folder(database)
    if folder.is_dir():
        index = SearchIndex(folder, None)
        index.clear()
        index.commit(0)
