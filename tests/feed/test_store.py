import contextlib
import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date, timedelta

import pytest
import sqlalchemy as sa

from papertrial.errors import PapertrialError, UsageError
from papertrial.feed import database, schema
from papertrial.feed.ingest import ingest_scope
from papertrial.feed.records import Record
from papertrial.feed.runs import recent_runs, recorded_run
from papertrial.feed.store import Counts, Store, period_bounds
from papertrial.feed.trending import score, trending

FIRST = date(2025, 1, 1)


sqlite_only = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


@pytest.fixture
def store(database):
    with Store.open(database) as opened:
        yield opened


def paper(number, **changes):
    fields = {
        "source": "arxiv",
        "title": f"Invented Paper Number {number}",
        "arxiv_id": f"25{number % 12 + 1:02d}.{number:05d}",
        "abstract": "We invent. " * 20,
        "authors": ("Ada Example", "Bo Sample"),
        "published": FIRST + timedelta(days=number % 300),
        "categories": ("cs.CL", "cs.LG")[: 1 + number % 2],
    }
    return Record(**(fields | changes))


def state(store):
    with store.reading() as connection:
        return {
            t.name: sorted(map(repr, connection.execute(sa.select(t)).all())) for t in schema.metadata.sorted_tables
        }


# -- upserts ----------------------------------------------------------------------------------------------------------


def test_everything_a_record_says_comes_back(store):
    record = paper(
        1,
        source="huggingface",
        ai_summary="Machine.",
        entered=date(2025, 3, 3),
        organisation="Meadow",
        comment_count=2,
        upvotes=7,
        keywords=("a", "b"),
        code_url="https://example.org/c",
        project_url="https://example.org/p",
        source_url="https://huggingface.co/papers/2502.00001",
    )
    store.upsert([record])
    found = store.find("2502.00001")
    for name in ("title", "abstract", "ai_summary", "authors", "published", "entered", "organisation", "comment_count"):
        assert getattr(found, name) == getattr(record, name)
    for name in ("upvotes", "keywords", "code_url", "project_url", "categories", "source_url", "source"):
        assert getattr(found, name) == getattr(record, name)
    assert found.author_count == 2
    assert found.pdf_url == "https://arxiv.org/pdf/2502.00001"


def test_ingesting_again_changes_nothing_at_all(store):
    records = [paper(n) for n in range(1200)]
    assert store.upsert(records) == Counts(added=1200)
    before = state(store)
    assert store.upsert(records) == Counts(unchanged=1200)
    assert store.upsert(reversed(records)) == Counts(unchanged=1200)
    assert state(store) == before
    assert (store.count(), store.revision()) == (1200, 1200)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_a_paper_from_two_sources_is_one(store, reverse, together):
    said = [
        Record("page", "Invented paper: number 1", abstract="From the page.", author_count=2, organisation="Meadow"),
        paper(1),
    ]
    said = said[::-1] if reverse else said
    if together:
        store.upsert(said)
    else:
        for record in said:
            store.upsert([record])
    (found,) = store.listing().papers
    assert (found.key, found.title, found.organisation) == ("2502.00001", "Invented Paper Number 1", "Meadow")
    assert set(found.sources) == {"page", "arxiv"}
    assert store.count() == 1


def test_records_are_merged_when_the_arxiv_id_becomes_known(store):
    store.upsert([Record("page", "The Old Title", abstract="x", upvotes=3)])
    store.upsert([paper(1, title="The New Title")])
    old, new = store.listing(limit=2).papers[::-1], store.by_arxiv_id("2502.00001")
    assert {p.title for p in old} == {"The Old Title", "The New Title"}
    page_paper = store.find(next(p.key for p in old if p.arxiv_id is None))
    _, revision = store.changes_since(0)
    # Now one source knows both: the old title and the id.
    store.upsert([Record("huggingface", "The Old Title", arxiv_id="2502.00001")])
    (merged,) = store.listing().papers
    assert (merged.upvotes, merged.title, merged.id) == (3, "The New Title", new.id)
    assert store.find(page_paper.key).id == merged.id
    changes, _ = store.changes_since(revision)
    assert [(c.id, c.removed) for c in changes] == [(merged.id, False), (page_paper.id, True)]
    assert store.count() == 1
    # and a page that still has the old title finds it
    assert store.upsert([Record("page", "the old title")]) == Counts(unchanged=1)


def test_equal_titles_with_different_arxiv_ids_are_two_papers(store):
    store.upsert([paper(1, title="Same"), paper(2, title="Same")])
    assert store.count() == 2
    store.upsert([Record("page", "Same", upvotes=4)])
    assert store.count() == 2
    assert store.by_arxiv_id("2502.00001").upvotes == 4


def test_votes_of_a_merged_paper_move_and_doubles_go(store):
    votes = sa.Table(
        "votes_of_this_test",
        schema.metadata,
        sa.Column("voter", sa.Integer, primary_key=True),
        sa.Column("paper_id", sa.ForeignKey("papers.id"), primary_key=True),
    )
    try:
        votes.create(store.engine)
        store.upsert([Record("page", "The Old Title"), paper(1, title="The New Title")])
        ids = {p.title: p.id for p in store.listing().papers}
        with store.writing() as connection:
            rows = [(1, ids["The Old Title"]), (2, ids["The Old Title"]), (2, ids["The New Title"])]
            connection.execute(votes.insert(), [{"voter": voter, "paper_id": i} for voter, i in rows])
        store.upsert([Record("huggingface", "The Old Title", arxiv_id="2502.00001")])
        with store.reading() as connection:
            held = connection.execute(sa.select(votes).order_by(votes.c.voter)).all()
        assert held == [(1, ids["The New Title"]), (2, ids["The New Title"])]
    finally:
        schema.metadata.remove(votes)


def test_many_random_sayings_agree_with_a_plain_dictionary(store):
    """An oracle that knows arXiv ids only, over many small batches with repetitions inside and between them."""
    draw = random.Random(7)
    oracle = {}
    for _ in range(60):
        batch = [paper(draw.randrange(40), upvotes=draw.randrange(50)) for _ in range(draw.randrange(1, 9))]
        store.upsert(batch)
        for record in batch:
            oracle[record.arxiv_id] = max(record.upvotes, oracle.get(record.arxiv_id, 0))
    assert {p.arxiv_id: p.upvotes for p in store.listing(limit=1000).papers} == oracle
    assert store.count() == len(oracle)


# -- scope ------------------------------------------------------------------------------------------------------------


def write_card(root, family, slug, title, arxiv=None):
    folder = root / family / slug
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f'title = "{title}"', "published = 2025-10-01", f'summary = "Ours of {slug}."']
    (folder / "paper.toml").write_text("\n".join(lines + ([f'arxiv = "{arxiv}"'] if arxiv else [])))


def test_deleting_a_folder_takes_the_paper_out_of_scope_everywhere(store, tmp_path):
    root = tmp_path / "papers"
    write_card(root, "fam", "known_elsewhere", "Invented Paper Number 1", "2502.00001")
    write_card(root, "fam", "known_here", "Only A Card")
    store.upsert([paper(1)])
    assert ingest_scope(store, root).added == 1
    assert [p.slug for p in store.in_scope()] == ["known_elsewhere", "known_here"]
    assert store.find("known_elsewhere").summary == "Ours of known_elsewhere."
    assert ingest_scope(store, root).unchanged == 2
    for slug in ("known_elsewhere", "known_here"):
        (root / "fam" / slug / "paper.toml").unlink()
    _, revision = store.changes_since(0)
    ingest_scope(store, root)
    assert store.in_scope() == []
    (left,) = store.listing().papers
    assert (left.arxiv_id, left.summary, left.family) == ("2502.00001", None, None)
    assert sorted(change.removed for change in store.changes_since(revision)[0]) == [False, True]


def test_slug_moves_when_a_card_gets_another_arxiv_id(store, tmp_path):
    root = tmp_path / "papers"
    write_card(root, "fam", "slug_a", "Invented Paper Number 1", "2502.00001")
    store.upsert([paper(1), paper(2)])
    ingest_scope(store, root)
    write_card(root, "fam", "slug_a", "Invented Paper Number 2", "2503.00002")
    report = ingest_scope(store, root)
    assert report.problems == []
    assert store.find("slug_a").arxiv_id == "2503.00002"
    assert store.by_arxiv_id("2502.00001").slug is None


# -- queries ----------------------------------------------------------------------------------------------------------


def test_feed_of_day_week_and_month_against_brute_force(store):
    records = [paper(n, upvotes=n * 7 % 13) for n in range(700)]
    records += [paper(900 + n, published=date(2025, 3, 1), published_precision="month") for n in range(5)]
    store.upsert(records)
    for period in ("2025-03-05", "2025-W10", "2025-03"):
        first, last, month = period_bounds(period)
        expected = [r for r in records if first <= r.published <= last and (month or r.published_precision == "day")]
        pages, cursor = [], None
        while True:
            page = store.feed(period, limit=7, cursor=cursor)
            pages += page.papers
            if (cursor := page.next_cursor) is None:
                break
        assert sorted(p.arxiv_id for p in pages) == sorted(r.arxiv_id for r in expected)
        order = [(p.feed_day, p.upvotes) for p in pages]
        assert order == sorted(order, reverse=True)
        assert store.count_of(period) == len(expected)
    counts = store.counts_by_day("2025-03")
    assert sum(counts.values()) == store.count_of("2025-03") - 5
    assert store.latest_day() == max(r.published for r in records)


@pytest.mark.parametrize("order", ["votes", "top", "trending"])
def test_every_order_of_a_period_against_sorting_in_memory(store, order):
    store.upsert([paper(n, upvotes=n * 37 % 11, comment_count=n % 3) for n in range(400)])
    everything = [p for p in store.listing(limit=1000).papers if p.feed_day.month == 3]
    keys = {
        "votes": lambda p: (p.feed_day, p.upvotes, p.id),
        "top": lambda p: (p.upvotes, p.feed_day, p.id),
        "trending": lambda p: (p.heat, p.id),
    }
    expected = [p.id for p in sorted(everything, key=keys[order], reverse=True)]
    shown, cursor = [], None
    while True:
        page = store.feed("2025-03", limit=4, cursor=cursor, order=order)
        shown += [p.id for p in page.papers]
        if (cursor := page.next_cursor) is None:
            break
    assert shown == expected
    with pytest.raises(UsageError, match="'top' is for"):
        store.listing(order="top")


def test_listings_of_an_organisation_a_topic_and_a_span(store):
    store.upsert([paper(n, organisation="Meadow" if n % 3 else None) for n in range(90)])
    assert len(store.listing(organisation="Meadow", limit=100).papers) == 60
    assert len(store.topic("cs.CL", limit=100).papers) == 90
    first = store.topic("cs.LG", limit=30)
    rest = store.topic("cs.LG", limit=30, cursor=first.next_cursor)
    numbers = [p.id for p in (*first.papers, *rest.papers)]
    assert (len(numbers), len(set(numbers)), rest.next_cursor) == (45, 45, None)
    span = store.listing(since=date(2025, 1, 10), until=date(2025, 1, 19), limit=100).papers
    assert len(span) == 10


@pytest.mark.parametrize("period", ["2025", "2025-13", "2025-02-30", "2025-W60", "today", "", "2025-1-1"])
def test_wrong_period_is_a_usage_error(store, period):
    with pytest.raises(UsageError, match="is not a day"):
        store.feed(period)


def test_wrong_cursor_limit_and_order_are_usage_errors(store):
    store.upsert([paper(n) for n in range(5)])
    cursor = store.listing(limit=2).next_cursor
    for wrong in ("x", cursor[:-4], "a" * 500, cursor + "=", "W10"):
        if wrong == cursor + "=":
            continue
        with pytest.raises(UsageError, match="cursor"):
            store.listing(cursor=wrong)
    with pytest.raises(UsageError, match="cursor"):
        store.listing(cursor=cursor, order="trending")
    with pytest.raises(UsageError, match="limit"):
        store.listing(limit=0)
    with pytest.raises(UsageError, match="order"):
        store.listing(order="random")


def test_trending_order_is_that_of_the_score_on_any_day(store):
    store.upsert([paper(n, upvotes=n * 31 % 97, comment_count=n % 5) for n in range(300)])
    shown = trending(store, limit=300).papers
    assert len(shown) == 300
    for on in (date(2025, 6, 1), date(2026, 2, 1)):
        scores = [score(p, on) for p in shown]
        assert scores == sorted(scores, reverse=True) or all(
            b <= a * (1 + 1e-6) for a, b in itertools.pairwise(scores)
        )  # heat is rounded to 9 digits: equal up to 2**(1e-9)


def test_changes_reach_every_paper_once_in_the_order_of_revisions(store):
    store.upsert([paper(n) for n in range(50)])
    store.upsert([paper(n, upvotes=3) for n in range(10)])
    seen, revision = [], 0
    while True:
        changes, following = store.changes_since(revision, limit=7)
        assert [c.revision for c in changes] == sorted(c.revision for c in changes)
        if not changes:
            assert following == revision
            break
        seen += changes
        revision = following
    assert len(seen) == 50
    assert len({c.id for c in seen}) == 50
    assert revision == store.revision()
    assert all(c.paper.key == c.key for c in seen)


@sqlite_only
def test_no_query_walks_the_whole_table(store):
    """With statistics that say millions of rows, every plan searches or reads an index in order."""
    store.upsert([paper(n, organisation="Meadow", source="huggingface") for n in range(200)])
    statements = []

    @sa.event.listens_for(store.engine, "before_cursor_execute")
    def note(_connection, _cursor, statement, parameters, _context, _many):
        if statement.lstrip().upper().startswith("SELECT"):
            statements.append((statement, parameters))

    first = store.listing(limit=5)
    store.listing(limit=5, cursor=first.next_cursor)
    store.listing(limit=5, organisation="Meadow")
    store.listing(limit=5, family="fam")
    page = store.feed("2025-03", limit=3)
    store.feed("2025-03", limit=3, cursor=page.next_cursor)
    store.feed("2025-03-05")
    store.feed("2025-W10", limit=3)
    hot = store.feed("2025-03", limit=3, order="trending")
    store.feed("2025-03", limit=3, order="trending", cursor=hot.next_cursor)
    store.listing(limit=3, organisation="Meadow", order="top")
    hot = trending(store, limit=3)
    trending(store, limit=3, cursor=hot.next_cursor)
    topic = store.topic("cs.CL", limit=3)
    store.topic("cs.CL", limit=3, cursor=topic.next_cursor)
    store.find("2502.00001"), store.find("some_slug"), store.find("t-" + "0" * 20)
    store.by_ids([1, 2, 3])
    store.in_scope(), store.latest_day(), store.counts_by_day("2025-03"), store.count_of("2025-03")
    store.changes_since(100, 10)
    store.upsert([paper(1), Record("page", "Another")])
    sa.event.remove(store.engine, "before_cursor_execute", note)
    assert len(statements) > 20
    with store.reading() as connection:
        for statement, parameters in statements:
            if "FROM counters" in statement:
                continue
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
            details = [row[3] for row in plan]
            for detail in details:
                walks = detail.startswith("SCAN") and "USING" not in detail and "CONSTANT" not in detail
                assert not walks, (statement, details)
                # An index read from end to end is fine only in the order that is asked for, where LIMIT stops it.
                if detail.startswith("SCAN"):
                    assert "LIMIT" in statement, (statement, details)
                if "TEMP B-TREE FOR ORDER BY" in detail:
                    sorted_on_purpose = ("titles", "heat + ", "ORDER BY papers.upvotes DESC")
                    assert any(text in statement for text in sorted_on_purpose), (statement, details)


# -- the database itself ----------------------------------------------------------------------------------------------


def test_opening_at_head_does_not_load_the_migration_library_and_import_is_light(tmp_path):
    code = (
        "import sys, papertrial.feed.store as s\n"
        "store = s.Store.open(); store.count()\n"
        "print([m for m in ('alembic', 'torch', 'transformers', 'scipy', 'httpx', 'lxml') if m in sys.modules])"
    )
    environment = os.environ | {"PAPERTRIAL_HOME": str(tmp_path)}
    loaded = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert "alembic" in loaded[0]
    assert loaded[1].strip() == "[]"


def test_migrations_build_the_tables_that_the_code_describes(store, monkeypatch):
    from alembic.autogenerate import compare_metadata
    from alembic.config import Config
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory
    from sqlalchemy.dialects.postgresql.base import ischema_names

    from papertrial.feed.dense_shared import HalfVector, vectors_metadata

    monkeypatch.setitem(ischema_names, "halfvec", HalfVector)
    config = Config()
    config.set_main_option("script_location", str(database.MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_current_head() == schema.HEAD
    with store.reading() as connection:
        kind = connection.dialect.name
        described = [schema.metadata, vectors_metadata] if kind == "postgresql" else schema.metadata
        differences = compare_metadata(MigrationContext.configure(connection), described)
    assert differences == []


def test_database_of_a_newer_version_is_refused(tmp_path):
    url = f"sqlite:///{tmp_path / 'new.db'}"
    with Store.open(url) as store, store.writing() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(PapertrialError, match="newer Papertrial"):
        Store.open(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [("mysql://h/d", "not supported"), ("nonsense", "not a database URL"), ("sqlite://", "needs a file")],
)
def test_wrong_database_url_is_a_usage_error(url, message):
    with pytest.raises(UsageError, match=message):
        Store.open(url)


def test_file_that_is_no_database_is_explained(tmp_path):
    (tmp_path / "x.db").write_bytes(b"This is a letter to my aunt, and no database at all." * 100)
    with pytest.raises(PapertrialError, match="not a SQLite database"):
        Store.open(f"sqlite:///{tmp_path / 'x.db'}")


@sqlite_only
def test_full_disk_is_one_line_and_loses_nothing(store):
    store.upsert([paper(n) for n in range(100)])
    before = state(store)
    with store.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()

    @sa.event.listens_for(store.engine, "checkout")
    def fill(connection, _record, _proxy):
        connection.execute(f"PRAGMA max_page_count = {pages + 20}")

    with pytest.raises(PapertrialError, match="disk is full") as caught:
        store.upsert([paper(n, abstract="long " * 2000) for n in range(200, 400)])
    assert "\n" not in str(caught.value)
    assert state(store) == before
    with pytest.raises(PapertrialError, match="disk is full"), recorded_run(store, "files") as report:
        report.count(store.upsert([paper(n, abstract="long " * 2000) for n in range(200, 400)]))


def test_run_that_fails_is_recorded_with_its_error(store):
    def fail():
        with recorded_run(store, "files: a") as report:
            report.problems.append("a: line 3: x")
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        fail()
    with recorded_run(store, "scope") as report:
        report.count(Counts(added=2))
    newest, older = recent_runs(store)
    assert (newest.source, newest.added, newest.error) == ("scope", 2, None)
    assert newest.finished >= newest.started
    assert (older.error, older.problem_count, older.problems) == ("RuntimeError: no", 1, ("a: line 3: x",))


def _write(url, worker, barrier):
    barrier.wait(30)
    with Store.open(url) as store:
        for start in range(0, 200, 20):
            store.upsert([paper(n, upvotes=worker) for n in range(start, start + 20)])
            store.upsert([paper(1000 + worker * 1000 + n) for n in range(start, start + 20)])


def test_writers_at_the_same_time_lose_and_double_nothing(database):
    """Four processes open a fresh database at once and write the same and different papers."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    workers = [context.Process(target=_write, args=(database, number, barrier)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * 4
    with Store.open(database) as store:
        assert store.count() == 200 + 4 * 200
        assert {store.find(paper(n).arxiv_id).upvotes for n in range(200)} == {3}
        changes, revision = store.changes_since(0, limit=5000)
        assert len({c.revision for c in changes}) == len(changes) == 1000
        assert revision == store.revision()


def test_killed_writer_leaves_a_sound_database(tmp_path):
    code = (
        "import sys; from papertrial.feed.store import Store; from papertrial.feed.records import Record\n"
        "store = Store.open(); n = 0\n"
        "while True:\n"
        "    store.upsert([Record('page', f'Paper {i}', abstract='x' * 500) for i in range(n, n + 50)])\n"
        "    n += 50; print(n, flush=True)\n"
    )
    environment = os.environ | {"PAPERTRIAL_HOME": str(tmp_path)}
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        acknowledged = int(writer.stdout.readline())
        time.sleep(0.15)
        writer.send_signal(signal.SIGKILL)
        acknowledged = max([acknowledged, *(int(line) for line in writer.stdout.read().split())])
        writer.wait()
        with Store.open(f"sqlite:///{tmp_path / 'papertrial.db'}") as store, store.reading() as connection:
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
            rows = connection.execute(sa.select(sa.func.count()).select_from(schema.papers)).scalar()
            highest = connection.execute(sa.select(sa.func.max(schema.papers.c.revision))).scalar()
            assert rows == store.count()
            assert rows >= acknowledged
            assert rows % 50 == 0
            assert highest == store.revision()


def test_a_field_a_source_does_not_mention_stays(store):
    store.upsert([paper(1, organisation="Meadow")])
    assert store.upsert([replace(paper(1), abstract=None, authors=(), categories=())]) == Counts(unchanged=1)
    assert store.find("2502.00001").organisation == "Meadow"


def test_the_version_is_another_one_after_every_write_and_only_then(store):
    store.upsert([paper(1)])
    first = store.version()
    for _ in range(3):
        store.listing()
        store.upsert([paper(1)])  # the same again
    seen = [store.version()]
    with Store.open(store.engine.url.render_as_string(hide_password=False)) as elsewhere:
        for number in range(3):
            elsewhere.upsert([paper(10 + number)])
            seen.append(store.version())
    store.upsert([paper(20)])
    seen.append(store.version())
    with contextlib.suppress(RuntimeError), store.writing() as connection:
        connection.execute(schema.papers.update().values(upvotes=1))
        raise RuntimeError("taken back")
    assert len(set(seen)) == len(seen)
    assert first not in seen[1:]
    if store.engine.url.get_backend_name() == "sqlite":  # PostgreSQL counts what was taken back, too
        assert seen[0] == first
        assert seen[-1] == store.version()


def test_a_held_view_shows_one_moment_to_its_thread_alone(store):
    store.upsert([paper(1)])
    with store.held():
        assert store.count() == 1
        with Store.open(store.engine.url.render_as_string(hide_password=False)) as elsewhere:
            elsewhere.upsert([paper(2)])
            assert elsewhere.count() == 2
        with ThreadPoolExecutor(1) as other:
            assert other.submit(store.count).result() == 2
        with store.held():
            assert store.find(paper(1).arxiv_id) is not None
    assert store.count() == 2


@sqlite_only
def test_what_is_not_shown_leaves_the_version_as_it_is(store):
    store.upsert([paper(1)])
    before = store.version()
    with store.writing(shown=False) as connection:
        connection.execute(schema.papers.update().values(upvotes=1))
    assert store.version() == before
    with store.writing() as connection:
        connection.execute(schema.papers.update().values(upvotes=2))
    assert store.version() != before
