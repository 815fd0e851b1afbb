"""A backup holds everything that cannot be made again; restoring it gives the same rows, on either database."""

import json
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from papertrial.errors import UsageError
from papertrial.feed import schema
from papertrial.feed.records import Record
from papertrial.feed.store import Store
from papertrial.site import keys, upkeep
from papertrial.site.backup import backup, restore
from papertrial.site.people import accounts
from site_service import TODAY, Site


def dump(database: str | None = None) -> dict[str, list[Any]]:
    with Store.open(database) as store, store.reading() as connection:
        return {
            table.name: [tuple(row) for row in connection.execute(sa.select(table).order_by(*table.primary_key))]
            for table in schema.metadata.sorted_tables
            if table.name != "leases"  # what a running service is doing: not kept
        }


@pytest.fixture
def used(site: Site, home: Path) -> Path:
    """A home folder where people have been; nothing works on it in the background any more."""
    ada = site.sign_in("ada@example.org")
    ada.client.put("/api/papers/2601.00003/vote")
    first = ada.client.post("/api/papers/2601.00003/comments", json={"body": "émigré \u2028 日本"}).json()
    site.sign_in("bob@example.org").client.post(
        "/api/papers/2601.00003/comments", json={"body": "reply", "parent": first["id"]}
    )
    made = ada.client.post("/api/collections", json={"title": "c"}).json()
    ada.client.put(f"/api/collections/{made['owner']}/{made['slug']}/items/2601.00001")
    (home / "evidence" / "toy").mkdir(parents=True)
    (home / "evidence" / "toy" / "small.json").write_text("{}")
    site.client.app.state.jobs.stop()  # type: ignore[attr-defined]
    return home


def test_a_restored_database_has_every_row_and_goes_on_counting(
    used: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = used / "backup.zip"
    counts = backup(archive)
    assert counts["papers"] > 100
    assert counts["comments"] == 2
    before, key = dump(), keys.read_key(used, "service")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.setenv("PAPERTRIAL_HOME", str(elsewhere))
    assert restore(archive) == counts
    assert dump() == before
    assert keys.read_key(elsewhere, "service") == key
    assert (elsewhere / "evidence" / "toy" / "small.json").read_text() == "{}"
    with Store.open() as store:
        signed = accounts.sign_in(store, accounts.make_sign_in_link(store, "new@example.org", minutes=5), days=1)
    assert signed.reader.id > max(row[0] for row in before["users"])


def test_a_backup_is_its_owners_alone_and_never_overwrites(used: Path) -> None:
    archive = used / "backup.zip"
    backup(archive)
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    with pytest.raises(UsageError, match="already"):
        backup(archive)
    assert not list(used.glob(".*.part"))


def test_a_backup_is_one_state_while_people_go_on(used: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vote that comes between two tables is in neither."""
    from papertrial.site import backup as module

    plain = module._plain
    late = site.sign_in("late@example.org")

    def vote_meanwhile(value: Any) -> str:
        late.client.put("/api/papers/2601.00005/vote")
        return plain(value)

    monkeypatch.setattr(module, "_plain", vote_meanwhile)
    counts = backup(used / "b.zip")
    assert counts["votes"] == 1
    assert len(dump()["votes"]) == 2


def test_a_database_in_use_is_replaced_only_on_request(used: Path) -> None:
    archive = used / "b.zip"
    backup(archive)
    before = dump()
    with Store.open() as store, store.writing() as connection:
        connection.execute(schema.metadata.tables["votes"].delete())
    with pytest.raises(UsageError, match="--force"):
        restore(archive)
    restore(archive, force=True)
    assert dump() == before


def test_a_backup_moves_from_sqlite_to_postgresql_and_back(
    used: Path, postgresql: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts, before = backup(used / "first.zip"), dump()
    monkeypatch.setenv("PAPERTRIAL_HOME", str(tmp_path_factory.mktemp("server")))
    assert restore(used / "first.zip", postgresql) == counts
    assert dump(postgresql) == before
    with Store.open(postgresql) as store:  # numbers go on behind those that were restored
        signed = accounts.sign_in(store, accounts.make_sign_in_link(store, "new@example.org", minutes=5), days=1)
        assert signed.reader.id > max(row[0] for row in before["users"])
        accounts.delete_account(store, signed.reader.id)
        with store.writing() as connection:
            connection.execute(schema.metadata.tables["sign_in_links"].delete())
            connection.execute(schema.metadata.tables["sign_in_links"].insert(), _rows("sign_in_links", before))
    assert backup(used / "second.zip", postgresql) == counts
    monkeypatch.setenv("PAPERTRIAL_HOME", str(tmp_path_factory.mktemp("laptop")))
    assert restore(used / "second.zip") == counts
    assert dump() == before


def _rows(name: str, dumped: dict[str, list[Any]]) -> list[dict[str, Any]]:
    columns = schema.metadata.tables[name].columns.keys()
    return [dict(zip(columns, row, strict=True)) for row in dumped[name]]


def test_search_knows_what_was_restored_and_nothing_else(used: Path, site: Site) -> None:
    archive, here = used / "b.zip", site.context
    backup(archive)
    here.store.upsert([Record(source="page", title="Quokkas forage at dusk", entered=TODAY)])
    upkeep.update_index_now(here)
    assert here.search("quokkas forage", mode="lexical").papers
    restore(archive, force=True)
    upkeep.update_index_now(here)
    assert here.index.revision == here.store.revision()
    assert not here.search("quokkas forage", mode="lexical").result.hits
    assert here.search("speculative decoding", mode="lexical").papers


def _rewritten(source: Path, target: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name, data: data.replace(b"ada@", b"eve@") if "users" in name else data, "damaged"),
        (lambda name, data: data[: len(data) // 2] if "papers.jsonl" in name else data, "damaged"),
        (lambda name, data: b"" if "votes" in name else data, "damaged"),
        (lambda name, data: None if "votes" in name else data, "damaged|votes"),
        (lambda name, data: b"[1]\n" if "votes" in name else data, "damaged"),
        (lambda name, data: None if name == "manifest.json" else data, "not a backup"),
        (lambda name, data: data.replace(b'"format": 2', b'"format": 9') if "manifest" in name else data, "newer"),
    ],
)
def test_a_damaged_backup_changes_nothing(used: Path, change: Any, message: str) -> None:
    good = used / "good.zip"
    backup(good)
    before = dump()
    with pytest.raises(UsageError, match=message):
        restore(_rewritten(good, used / "bad.zip", change), force=True)
    assert dump() == before


def _files(folder: Path) -> dict[str, bytes]:
    kept = [file for name in ("keys", "evidence") for file in sorted((folder / name).rglob("*")) if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in kept}


def _without_digests(change: Callable[[str, bytes], bytes | None]) -> Callable[[str, bytes], bytes | None]:
    """As a backup of the first format is: its manifest knows no files."""

    def older(name: str, data: bytes) -> bytes | None:
        if name == "manifest.json":
            manifest = json.loads(data)
            del manifest["files"]
            return json.dumps(manifest | {"format": 1}).encode()
        return change(name, data)

    return older


_FILE_DAMAGE = [
    (lambda name, data: bytes(32) if name == "keys/service" else data, "keys/service"),
    (lambda name, data: b"" if name == "keys/service" else data, "keys/service"),
    (lambda name, data: None if name == "keys/service" else data, "key"),
    (lambda name, data: b"{ }" if "evidence/toy" in name else data, "evidence/toy/small.json"),
    (lambda name, data: None if "evidence/toy" in name else data, "evidence/toy/small.json"),
    (_without_digests(lambda name, data: None if name == "keys/service" else data), "key"),
    (_without_digests(lambda name, data: b"short" if name == "keys/service" else data), "not a key"),
    (lambda name, data: data.replace(b"keys/service", b"keys/../../x") if "manifest" in name else data, "key"),
    (
        lambda name, data: data.replace(b"evidence/toy/small", b"evidence/../../small") if "manifest" in name else data,
        "no place",
    ),
]


@pytest.mark.parametrize(("change", "message"), _FILE_DAMAGE)
def test_a_backup_whose_files_are_damaged_changes_nothing(
    used: Path, change: Any, message: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the database and key of a service in use, nor an empty home folder."""
    good = used / "good.zip"
    backup(good)
    bad = _rewritten(good, used / "bad.zip", change)
    with Store.open() as store, store.writing() as connection:
        connection.execute(schema.metadata.tables["votes"].delete())
    before, files = dump(), _files(used)
    with pytest.raises(UsageError, match=f"damaged.*{message}"):
        restore(bad, force=True)
    assert (dump(), _files(used)) == (before, files)
    empty = tmp_path_factory.mktemp("empty")
    monkeypatch.setenv("PAPERTRIAL_HOME", str(empty))
    with pytest.raises(UsageError, match=message):
        restore(bad)
    assert not [file for file in empty.rglob("*") if file.is_file()]


def test_one_flipped_byte_of_the_key_is_found_before_anything_is_changed(used: Path) -> None:
    """As a bad disk does it: inside the archive, whose structure stays whole."""
    archive = used / "b.zip"
    backup(archive)
    data, key = bytearray(archive.read_bytes()), keys.read_key(used, "service")
    with zipfile.ZipFile(archive) as opened:
        info = opened.getinfo("keys/service")
    at = info.header_offset + 30 + len("keys/service") + len(info.extra) + info.compress_size // 2
    data[at] ^= 0x40
    archive.write_bytes(data)
    with Store.open() as store, store.writing() as connection:
        connection.execute(schema.metadata.tables["votes"].delete())
    before = dump()
    with pytest.raises(UsageError, match="damaged"):
        restore(archive, force=True)
    assert dump() == before
    assert keys.read_key(used, "service") == key


def test_a_backup_of_the_first_format_still_restores(used: Path, tmp_path_factory: Any, monkeypatch: Any) -> None:
    backup(used / "good.zip")
    old = _rewritten(used / "good.zip", used / "old.zip", _without_digests(lambda _, data: data))
    before, files = dump(), _files(used)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.setenv("PAPERTRIAL_HOME", str(elsewhere))
    restore(old)
    assert (dump(), _files(elsewhere)) == (before, files)


def test_accounts_are_not_backed_up_without_their_key(used: Path) -> None:
    (used / "keys" / "service").unlink()
    with pytest.raises(UsageError, match="keys/service is missing"):
        backup(used / "b.zip")
    assert not (used / "b.zip").exists()


def test_what_is_no_backup_is_refused(home: Path) -> None:
    (home / "x.zip").write_bytes(b"not a zip")
    with pytest.raises(UsageError, match="damaged or no backup"):
        restore(home / "x.zip")
    with pytest.raises(UsageError, match="no file"):
        restore(home / "missing.zip")


def test_a_hostile_archive_writes_nowhere_else(used: Path) -> None:
    good = used / "good.zip"
    backup(good)
    bad = used / "bad.zip"
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(bad, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        for name in (
            "keys/../../escaped",
            "/tmp/papertrial-escaped",
            "evidence/../escaped",
            "other/escaped",
            "escaped",
        ):
            new.writestr(name, "x")
    restore(bad, force=True)
    assert not list(used.parent.rglob("*escaped*"))
    assert not Path("/tmp/papertrial-escaped").exists()


def test_the_manifest_says_what_is_inside(used: Path) -> None:
    backup(used / "b.zip")
    with zipfile.ZipFile(used / "b.zip") as archive:
        manifest = json.loads(archive.read("manifest.json"))
        assert manifest["schema"] == schema.HEAD
        assert {f"tables/{name}.jsonl" for name in manifest["rows"]} <= set(archive.namelist())
        assert "keys/service" in archive.namelist()
