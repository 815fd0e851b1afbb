"""Digests: asked for, confirmed, built, sent once, and ended, on SQLite and on PostgreSQL, over a real mail server."""

import email
import email.policy
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import sqlalchemy as sa
from aiosmtpd.controller import Controller

from papertrial.errors import UsageError
from papertrial.feed import schema
from papertrial.feed.delivery_schema import digests
from papertrial.feed.delivery_schema import subscriptions as table
from papertrial.feed.records import Record
from papertrial.feed.store import Store, utc_now
from papertrial.feed.writing import Batch
from papertrial.site.board import Snapshot
from papertrial.site.context import Context
from papertrial.site.delivery import asking, news, queue, subscriptions
from papertrial.site.delivery.digests import content_of, send_digests, send_due
from papertrial.site.delivery.periods import end_after, period_ending
from papertrial.site.delivery.smtp import LetterDelayed, LetterRefused, LetterUnclear, Server, SmtpMailer
from papertrial.site.delivery.subscriptions import Watch
from papertrial.site.delivery.watching import Query
from papertrial.site.errors import Problem
from papertrial.site.limits import Limiter
from papertrial.site.mail import Letter
from papertrial.site.people import accounts, tags
from papertrial.site.settings import Settings
from site_service import TODAY, Site, free_port, links_in, records

DAY = timedelta(days=1)


@pytest.fixture
def here(database: str, home: Path) -> Iterator[Context]:
    """A service without its HTTP side, over the small catalogue."""
    settings = Settings(database=database, encoder=False, fetch=False)
    with Store.open(database) as store:
        store.upsert(records())
        yield Context(settings, store, Limiter(settings))


def subscribed(
    here: Context, address: str = "reader@example.org", watch: Watch | None = None, **more: Any
) -> subscriptions.Subscription:
    """An address that asked and confirmed."""
    asked = subscriptions.ask(here.store, address, watch or Watch("feed"), **more)
    assert asked is not None
    return subscriptions.confirm(here.store, asked[1])


def letters(home: Path) -> list[EmailMessage]:
    found = [file.read_bytes() for file in sorted((home / "outbox").glob("*.eml"))]
    return [email.message_from_bytes(content, policy=email.policy.default) for content in found]  # type: ignore[misc]


def plain(message: EmailMessage) -> str:
    part = message.get_body(("plain",))
    assert part is not None
    return str(part.get_content())


def tomorrow() -> datetime:
    """A moment when every digest that was confirmed just now has become due once."""
    return utc_now() + DAY + timedelta(hours=1)


def states(here: Context) -> list[tuple[str, str]]:
    with here.store.reading() as connection:
        query = sa.select(digests.c.period, digests.c.state).order_by(digests.c.id)
        return [(row.period, row.state) for row in connection.execute(query)]


# -- periods ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Pacific/Apia"])
@pytest.mark.parametrize("cadence", ["daily", "weekly"])
def test_periods_follow_each_other_without_gap_or_overlap_over_changes_of_clocks(zone: str, cadence: Any) -> None:
    for hour in (0, 2, 7, 23):
        moment, names = datetime(2025, 3, 1), []
        before = period_ending(moment, cadence, zone, hour)
        for _ in range(300 if cadence == "daily" else 60):
            moment = end_after(moment, cadence, zone, hour)
            period = period_ending(moment, cadence, zone, hour)
            assert period.ends == moment
            assert period.starts == before.ends
            assert period_ending(moment - timedelta(seconds=1), cadence, zone, hour) == before
            names.append(period.name)
            before = period
        assert len(set(names)) == len(names)
        local = before.ends.replace(tzinfo=UTC).astimezone(ZoneInfo(zone))
        assert local.hour == hour
        assert cadence == "daily" or local.weekday() == 0


def test_a_period_is_named_after_the_day_or_week_it_covers() -> None:
    assert period_ending(datetime(2025, 10, 4, 6), "daily", "Europe/Berlin", 7).name == "2025-10-03"
    assert period_ending(datetime(2025, 10, 4, 18), "daily", "UTC", 18).name == "2025-10-04"
    assert period_ending(datetime(2025, 10, 6, 7), "weekly", "UTC", 7).name == "2025-W40"


# -- double opt-in ----------------------------------------------------------------------------------------------------


def test_nothing_is_sent_before_the_address_confirms(here: Context, home: Path) -> None:
    assert subscriptions.ask(here.store, "a@example.org", Watch("feed")) is not None
    assert send_due(here, now=tomorrow).sent == 0
    assert letters(home) == []


def test_the_letters_link_confirms_by_post_only(site: Site, home: Path) -> None:
    answer = site.client.post("/subscriptions", data={"email": "New@Example.org", "kind": "feed", "timezone": "UTC"})
    assert answer.status_code == 200
    (letter,) = letters(home)
    assert letter["To"] == "new@example.org"
    link = next(link for link in links_in(plain(letter)) if "/confirm/" in link).removeprefix("http://testserver")
    for _ in range(2):
        page = site.client.get(link)
        assert page.status_code == 200
        assert "<form" in page.text
    with site.context.store.reading() as connection:
        assert connection.execute(sa.select(table.c.state)).scalars().all() == ["pending"]
    assert site.client.post(link).status_code == 200
    with site.context.store.reading() as connection:
        row = connection.execute(sa.select(table)).one()
    assert row.state == "active"
    assert row.confirmed is not None
    assert site.client.post(link).status_code == 200  # a second click does no harm
    assert site.client.post("/subscriptions/confirm/" + "x" * 43).status_code == 403


def test_a_link_that_is_too_old_confirms_nothing_and_the_address_is_forgotten(here: Context) -> None:
    asked = subscriptions.ask(here.store, "a@example.org", Watch("feed"))
    assert asked is not None
    with here.store.writing() as connection:
        connection.execute(table.update().values(confirm_until=utc_now() - timedelta(seconds=1)))
    with pytest.raises(Problem) as refused:
        subscriptions.confirm(here.store, asked[1])
    assert refused.value.status == 403
    subscriptions.tidy(here.store)
    with here.store.reading() as connection:
        assert connection.execute(sa.select(table)).all() == []


def test_nobody_can_fill_a_mailbox_with_confirmations(site: Site, home: Path) -> None:
    for _ in range(5):
        answer = site.client.post("/subscriptions", data={"email": "victim@example.org"})
        assert answer.status_code == 200  # the answer does not tell
    assert len(letters(home)) == 1
    for i in range(subscriptions.LETTERS_PER_ADDRESS + 2):
        answer = site.client.post(
            "/subscriptions", data={"email": "victim@example.org", "kind": "search", "value": f"word{i}"}
        )
    assert answer.status_code == 429
    assert len(letters(home)) == subscriptions.LETTERS_PER_ADDRESS


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"email": "nobody"}, "email"),
        ({"kind": "everything"}, "kind"),
        ({"kind": "search", "value": ""}, "value"),
        ({"kind": "search", "value": "a\nb"}, "value"),
        ({"kind": "search", "value": "x" * 251}, "value"),
        ({"family": "nonsense"}, "family"),
        ({"timezone": "Mars/Olympus"}, "timezone"),
        ({"timezone": "../../etc/passwd"}, "timezone"),
        ({"hour": "24"}, "hour"),
        ({"cadence": "hourly"}, "cadence"),
    ],
)
def test_what_is_wrong_is_refused_by_name(site: Site, home: Path, fields: dict[str, str], field: str) -> None:
    answer = site.client.post("/subscriptions", data={"email": "a@example.org", "timezone": "UTC"} | fields)
    assert answer.status_code == 422
    assert f'id="{field}-problem"' in answer.text
    assert letters(home) == []


def test_another_site_cannot_subscribe_anybody(site: Site) -> None:
    data = {"email": "a@example.org"}
    for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.example"}):
        assert site.client.post("/subscriptions", data=data, headers=headers).status_code == 403
    browser = site.sign_in()
    del browser.client.headers["X-CSRF-Token"]
    assert browser.client.post("/subscriptions", data=data).status_code == 403


# -- unsubscribing ----------------------------------------------------------------------------------------------------


def test_one_click_ends_a_digest_without_cookies_and_get_does_not(make_site: Callable[..., Site], home: Path) -> None:
    site = make_site()
    here = site.context
    subscribed(here)
    assert send_due(here, now=tomorrow).sent == 1
    (letter,) = letters(home)
    raw = next((home / "outbox").glob("*.eml")).read_text()
    (header,) = re.findall(r"^List-Unsubscribe: <(\S+)>$", raw, re.MULTILINE)  # on one line
    assert re.findall(r"^List-Unsubscribe-Post: List-Unsubscribe=One-Click$", raw, re.MULTILINE)
    assert header in plain(letter)
    path = header.removeprefix("http://testserver")
    for _ in range(3):
        assert site.client.get(path).status_code == 200  # scanners open links
    assert site.client.head(path).status_code == 200
    assert len(subscriptions_in(here)) == 1
    site.client.cookies.clear()
    one_click = {"content": "List-Unsubscribe=One-Click", "headers": {"Sec-Fetch-Site": "cross-site"}}
    one_click["headers"]["Content-Type"] = "application/x-www-form-urlencoded"  # type: ignore[index]
    assert site.client.post(path, **one_click).status_code == 200  # type: ignore[arg-type]
    assert subscriptions_in(here) == []
    assert site.client.post(path, **one_click).status_code == 200  # type: ignore[arg-type]
    assert site.client.get(path).status_code == 200
    assert send_due(here, now=lambda: tomorrow() + DAY).sent == 0


def test_the_page_of_a_letters_link_has_a_button_that_ends_the_digest(site: Site) -> None:
    subscription = subscribed(site.context)
    path = f"/unsubscribe/{subscriptions.unsubscribe_token(site.context.key, subscription)}"
    assert f'<form method="post" action="{path}"' in site.client.get(path).text
    answer = site.client.post(path)
    assert answer.status_code == 200
    assert "Unsubscribed" in answer.text
    assert subscriptions_in(site.context) == []


def test_a_forged_link_ends_nothing(site: Site) -> None:
    subscription = subscribed(site.context)
    token = subscriptions.unsubscribe_token(site.context.key, subscription)
    number, nonce, mac = token.split(".")
    for forged in (f"{number}.{nonce}.{'0' * 64}", f"{int(number) + 1}.{nonce}.{mac}", "x" * 60, f"é{token}"):
        assert site.client.post(f"/unsubscribe/{forged}").status_code == 404
    assert len(subscriptions_in(site.context)) == 1


def subscriptions_in(here: Context) -> list[Any]:
    with here.store.reading() as connection:
        return list(connection.execute(sa.select(table)).all())


# -- content ----------------------------------------------------------------------------------------------------------


def test_a_digest_has_the_papers_since_the_last_one_and_each_once(here: Context, home: Path) -> None:
    subscribed(here)
    assert send_due(here, now=tomorrow).sent == 1
    first = plain(letters(home)[0])
    fresh = [r.title for r in records() if r.entered]
    assert all(title in first for title in fresh)
    assert "We study sparse attention" in first
    assert send_due(here, now=lambda: tomorrow() + DAY).empty == 1  # nothing new: no letter
    late = Record(source="huggingface", title="Zebras parse sentences", arxiv_id="2601.00099", entered=TODAY, upvotes=3)
    here.store.upsert([late])
    with here.store.writing() as connection:
        arrived = tomorrow() + DAY + timedelta(hours=3)
        connection.execute(
            schema.papers.update().where(schema.papers.c.arxiv_id == "2601.00099").values(first_seen=arrived)
        )
    assert send_due(here, now=lambda: tomorrow() + 2 * DAY).sent == 1
    second = plain(letters(home)[1])
    assert "Zebras parse sentences" in second
    assert not any(title in second for title in fresh)


def test_a_harvest_of_old_papers_is_no_news(here: Context) -> None:
    old = [
        Record(source="arxiv", title=f"Old paper {i}", arxiv_id=f"2001.0000{i}", published=TODAY - 300 * DAY)
        for i in range(5)
    ]
    here.store.upsert(old)
    subscribed(here)
    queue.enqueue_due(here.store, tomorrow())
    digest = queue.claim(here.store, "me", tomorrow())
    assert digest is not None
    titles = [pick.paper.title for pick in content_of(here, digest).picks]
    assert len(titles) == 7
    assert not any(title.startswith("Old") for title in titles)


def test_a_search_wants_every_word_and_phrases_as_they_stand(here: Context) -> None:
    subscribed(here, watch=Watch("search", "quantizing case 3"))
    queue.enqueue_due(here.store, tomorrow())
    digest = queue.claim(here.store, "me", tomorrow())
    assert digest is not None
    assert [pick.paper.arxiv_id for pick in content_of(here, digest).picks] == ["2601.00003"]
    paper = here.store.find("2601.00001")
    assert paper is not None
    assert Query.of('"speculative decoding"').finds(paper)
    assert not Query.of('"decoding speculative"').finds(paper)
    assert Query.of("decoding speculative").finds(paper)
    assert not Query.of("decoding pruning").finds(paper)
    assert not Query.of(" ").finds(paper)


def test_a_topic_has_the_papers_of_its_category(here: Context) -> None:
    subscribed(here, watch=Watch("topic", "cs.CL"))
    subscribed(here, watch=Watch("topic", "math.AG"))
    assert (send_due(here, now=tomorrow)).sent == 1
    assert sorted(state for _, state in states(here)) == ["empty", "sent"]


def test_the_digest_of_a_tag_is_learned_from_it_and_goes_to_its_reader_alone(here: Context) -> None:
    token = accounts.make_sign_in_link(here.store, "ada@example.org", minutes=5)
    reader = accounts.sign_in(here.store, token, days=1).reader
    topics = {"walrus": "The walrus swims in arctic water", "desert": "A camel crosses dry desert sand"}
    made = [
        Record(
            source="huggingface",
            title=f"{name} study {i}",
            arxiv_id=f"2602.{n}{i:04d}",
            abstract=f"{text} {i}.",
            entered=TODAY,
        )
        for n, (name, text) in enumerate(topics.items())
        for i in range(6)
    ]
    here.store.upsert(made)
    for i in range(3):
        paper = here.store.find(f"2602.0000{i}")
        assert paper is not None
        tags.tag(here.store, reader, paper.id, "sea")
    with pytest.raises(Problem) as refused:
        subscriptions.ask(here.store, "other@example.org", Watch("tag", "sea"), reader=reader)
    assert refused.value.field == "email"
    with pytest.raises(Problem):
        subscriptions.ask(here.store, "ada@example.org", Watch("tag", "sea"))
    subscribed(here, "ada@example.org", Watch("tag", "sea"), reader=reader)
    queue.enqueue_due(here.store, tomorrow())
    digest = queue.claim(here.store, "me", tomorrow())
    assert digest is not None
    picks = content_of(here, digest).picks
    assert {pick.paper.title for pick in picks} == {f"walrus study {i}" for i in (3, 4, 5)}
    assert "walrus" in picks[0].because


def test_letters_show_verdicts_in_both_parts_and_escape_what_sources_say(
    here: Context, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.store.upsert(
        [Record(source="huggingface", title="Tags like <s> & <mask>", arxiv_id="2601.00077", entered=TODAY)]
    )
    board = here.board.snapshot
    entry = next(entry for entry in board if entry.headline is not None)
    recorded = list(entry.standing.evidence.values())[-1].recorded
    subscription = subscribed(here)
    with here.store.writing() as connection:
        connection.execute(table.update().values(covered_to=recorded.replace(tzinfo=None) - timedelta(seconds=1)))
    monkeypatch.setattr(queue, "LONGEST", timedelta(days=3650))
    assert send_due(here, now=tomorrow).sent == 1
    (letter,) = letters(home)
    part = letter.get_body(("html",))
    assert part is not None
    html = str(part.get_content())
    assert "&lt;s&gt; &amp; &lt;mask&gt;" in html
    assert "Tags like <s> & <mask>" in plain(letter)
    assert "NEW VERDICTS" in plain(letter)
    assert entry.headline is not None
    assert subscriptions.unsubscribe_token(here.key, subscription) in html
    assert re.search(r"\[(UPHELD|CONTRADICTED|UNDECIDED) AT (SMALL|GPU)\]", plain(letter))
    assert re.search(r"<b>(Upheld|Contradicted|Undecided)</b> at (small|gpu)", html)


def test_what_is_not_known_of_a_paper_leaves_no_mark_in_a_letter(here: Context, home: Path) -> None:
    """A paper without names of authors begins with its date, and not with a dot."""
    nameless = Record(source="huggingface", title="By nobody", arxiv_id="2601.00088", entered=TODAY, published=TODAY)
    here.store.upsert([nameless])
    subscribed(here)
    assert send_due(here, now=tomorrow).sent == 1
    (letter,) = letters(home)
    part = letter.get_body(("html",))
    assert part is not None
    lines = re.findall(r'<p class="soft"[^>]*>(.*?)</p>', str(part.get_content()))
    assert TODAY.isoformat() in lines
    assert any(re.fullmatch(r"Ada Number0, Grace Hopper &middot; Example Lab &middot; [\d-]+", line) for line in lines)
    assert not [line for line in lines if line.strip().startswith(("&middot;", "·")) or not line.strip()]


def digest_until(here: Context, moment: datetime) -> queue.Digest:
    """The digest of the only subscription that is due by a moment, covered from now on."""
    queue.enqueue_due(here.store, moment)
    digest = queue.claim(here.store, "me", moment)
    assert digest is not None
    return digest


def covered(here: Context, digest: queue.Digest, moment: datetime) -> None:
    assert queue.begin_sending(here.store, digest, 1, moment)
    queue.sent(here.store, digest, moment)


def test_verdicts_that_come_by_an_upgrade_are_in_the_next_digest(here: Context) -> None:
    """Their evidence was recorded long before, in a span that digests have covered already."""
    board = here.board.snapshot
    chosen = [entry for entry in board if entry.headline is not None][:3]
    *known, late = chosen
    older = Snapshot({entry.card.slug: entry for entry in known}, {}, (), 1)
    news.note_evidence(here.store, older, utc_now)
    subscribed(here)
    first = digest_until(here, tomorrow())
    covered(here, first, tomorrow())
    upgraded = first.ends + timedelta(hours=2)
    newer = Snapshot({entry.card.slug: entry for entry in chosen}, {}, (), 2)
    for _ in range(2):  # a second look notes nothing more
        news.note_evidence(here.store, newer, lambda: upgraded)
    second = digest_until(here, tomorrow() + DAY)
    assert second.starts == first.ends
    found = news.new_verdicts(here.store, newer, second.starts, second.ends)
    assert [entry.card.slug for entry in found] == [late.card.slug]
    family = late.card.family
    assert news.new_verdicts(here.store, newer, second.starts, second.ends, family) == [late]
    assert news.new_verdicts(here.store, newer, second.starts, second.ends, "no such family") == []
    third_span = (second.ends, second.ends + DAY)
    assert news.new_verdicts(here.store, newer, *third_span) == []


def test_what_comes_with_the_installation_is_no_news(here: Context) -> None:
    """It counts from its recording: a new service does not announce every verdict there is."""
    news.note_evidence(here.store, here.board.snapshot, utc_now)
    recorded = max(entry.evidence["small"].recorded for entry in here.board.snapshot if "small" in entry.evidence)
    last = recorded.astimezone(UTC).replace(tzinfo=None)
    assert news.new_verdicts(here.store, here.board.snapshot, last, utc_now() + DAY) == []
    assert news.new_verdicts(here.store, here.board.snapshot, last - timedelta(microseconds=1), utc_now() + DAY)


def test_a_digest_waits_for_papers_that_are_being_stored(here: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that began within the span, and is stored after its end, is in that digest or in the next."""
    subscribed(here)
    covered(here, digest_until(here, tomorrow()), tomorrow())
    with here.store.reading() as connection:
        due = connection.execute(sa.select(table.c.next_due)).scalar_one()
    began, go_on, plain_write = threading.Event(), threading.Event(), Batch.write

    def slow(batch: Batch) -> None:
        for row in batch.rows.values():
            row["first_seen"] = due - timedelta(seconds=1)
        began.set()
        go_on.wait(10)
        plain_write(batch)

    monkeypatch.setattr(Batch, "write", slow)
    late = [Record(source="huggingface", title="Zebras parse", arxiv_id="2601.00099", entered=TODAY + DAY)]
    writer = threading.Thread(target=here.store.upsert, args=(late,))
    writer.start()
    assert began.wait(10)
    threading.Timer(0.5, go_on.set).start()
    digest = digest_until(here, due)
    titles = [pick.paper.title for pick in content_of(here, digest).picks]
    writer.join()
    assert digest.ends == due
    assert "Zebras parse" in titles


# -- once, whatever happens -------------------------------------------------------------------------------------------


def test_a_period_is_sent_once_however_often_one_looks(here: Context, home: Path) -> None:
    subscribed(here)
    subscribed(here, "weekly@example.org", cadence="weekly")
    for _ in range(4):
        send_due(here, now=tomorrow)
    assert sum(m["To"] == "reader@example.org" for m in letters(home)) == 1
    assert sum(m["To"] == "weekly@example.org" for m in letters(home)) <= 1


def test_after_a_pause_one_digest_covers_it(here: Context, home: Path) -> None:
    subscribed(here)
    assert send_due(here, now=lambda: utc_now() + 9 * DAY).queued == 1


def test_workers_side_by_side_send_no_digest_twice(here: Context, home: Path) -> None:
    count, workers = 24, 4
    for i in range(count):
        subscribed(here, f"reader{i}@example.org")
    url = here.settings.database
    code = (
        "from datetime import datetime; from papertrial.site.context import Context; "
        "from papertrial.site.limits import Limiter; from papertrial.site.settings import Settings; "
        "from papertrial.feed.store import Store; from papertrial.site.delivery.digests import send_due; "
        f"s = Settings(database={url!r}, encoder=False); "
        f"o = send_due(Context(s, Store.open({url!r}), Limiter(s)), now=lambda: datetime({_numbers(tomorrow())})); "
        "print(o.sent)"
    )
    run = [sys.executable, "-c", code]
    started = [subprocess.Popen(run, stdout=subprocess.PIPE, text=True) for _ in range(workers)]
    sent = [int(process.communicate(timeout=120)[0]) for process in started]
    assert sum(sent) == count
    found = [message["To"] for message in letters(home)]
    assert sorted(found) == sorted(f"reader{i}@example.org" for i in range(count))
    assert {state for _, state in states(here)} == {"sent"}


def _numbers(moment: datetime) -> str:
    return ", ".join(str(n) for n in moment.timetuple()[:6])


def test_threads_never_claim_the_same_digest(here: Context) -> None:
    for i in range(30):
        subscribed(here, f"reader{i}@example.org")
    queue.enqueue_due(here.store, tomorrow())
    claimed: list[int] = []

    def work(holder: str) -> None:
        while (digest := queue.claim(here.store, holder, tomorrow())) is not None:
            claimed.append(digest.id)

    threads = [threading.Thread(target=work, args=(f"worker{i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == 30
    assert len(set(claimed)) == 30


def test_a_worker_that_dies_while_building_is_replaced(here: Context) -> None:
    subscribed(here)
    queue.enqueue_due(here.store, tomorrow())
    dead = queue.claim(here.store, "dead", tomorrow())
    assert dead is not None
    assert queue.claim(here.store, "other", tomorrow()) is None
    later = tomorrow() + queue.HELD + timedelta(seconds=1)
    digest = queue.claim(here.store, "other", later)
    assert digest is not None
    assert not queue.begin_sending(here.store, dead, 1, later)  # it wakes up: too late
    assert queue.begin_sending(here.store, digest, 1, later)


def test_a_worker_that_dies_while_sending_sends_no_second_letter_and_no_paper_is_lost(here: Context) -> None:
    subscribed(here)
    queue.enqueue_due(here.store, tomorrow())
    digest = queue.claim(here.store, "dead", tomorrow())
    assert digest is not None
    before = [pick.paper.id for pick in content_of(here, digest).picks]
    assert queue.begin_sending(here.store, digest, len(before), tomorrow())
    much_later = tomorrow() + DAY
    assert send_due(here, now=lambda: much_later).sent == 1  # the next day's digest
    assert [state for _, state in states(here)] == ["unknown", "sent"]
    with here.store.reading() as connection:
        starts = connection.execute(sa.select(digests.c.starts).order_by(digests.c.id)).scalars().all()
    assert starts[0] - starts[1] == timedelta(0) or starts[1] <= digest.starts + DAY
    assert before


def test_one_who_unsubscribes_meanwhile_gets_no_letter(here: Context) -> None:
    subscription = subscribed(here)
    queue.enqueue_due(here.store, tomorrow())
    digest = queue.claim(here.store, "me", tomorrow())
    assert digest is not None
    subscriptions.end(here.store, subscription.id, subscription.nonce)
    assert not queue.begin_sending(here.store, digest, 1, tomorrow())


def test_a_blocked_account_gets_no_digest(here: Context, home: Path) -> None:
    token = accounts.make_sign_in_link(here.store, "ada@example.org", minutes=5)
    reader = accounts.sign_in(here.store, token, days=1).reader
    subscribed(here, "ada@example.org", reader=reader)
    accounts.ensure_admin(here.store, None)
    accounts.set_role(here.store, reader.id, "blocked")
    assert send_due(here, now=tomorrow).sent == 0
    assert letters(home) == []


# -- over SMTP --------------------------------------------------------------------------------------------------------


class Postman:
    """What a mail server does with letters: keeps them, or answers as it is told."""

    def __init__(self) -> None:
        self.letters: list[tuple[str, list[str], bytes]] = []
        self.answer = "250 taken"
        self.at_rcpt = "250 ok"
        self.hang_up = False

    async def handle_RCPT(  # noqa: N802  aiosmtpd's name
        self, server: Any, session: Any, envelope: Any, address: str, options: Any
    ) -> str:
        if self.at_rcpt.startswith("250"):
            envelope.rcpt_tos.append(address)
        return self.at_rcpt

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802  aiosmtpd's name
        if self.hang_up:
            self.letters.append((envelope.mail_from, envelope.rcpt_tos, envelope.content))
            server.transport.abort()
            return "250 never said"
        if self.answer.startswith("250"):
            self.letters.append((envelope.mail_from, envelope.rcpt_tos, envelope.content))
        return self.answer


@pytest.fixture
def postman() -> Iterator[tuple[Postman, str]]:
    handler = Postman()
    port = free_port()
    controller = Controller(handler, hostname="127.0.0.1", port=port)
    controller.start()
    yield handler, f"smtp://127.0.0.1:{port}"
    controller.stop()


def over_smtp(here: Context, url: str) -> Context:
    settings = here.settings.model_copy(update={"smtp_url": url, "mail_from": "papers@example.org"})
    return Context(settings, here.store, Limiter(settings))


def test_a_real_mail_server_takes_the_digest_whole(here: Context, postman: tuple[Postman, str]) -> None:
    server, url = postman
    subscribed(here)
    assert send_due(over_smtp(here, url), now=tomorrow).sent == 1
    ((sender, to, content),) = server.letters
    assert (sender, to) == ("papers@example.org", ["reader@example.org"])
    message: Any = email.message_from_bytes(content, policy=email.policy.default)
    assert [part.get_content_type() for part in message.walk()] == [
        "multipart/alternative",
        "text/plain",
        "text/html",
    ]
    assert message["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    assert re.search(rb"\r\nList-Unsubscribe: <http://\S+>\r\n", content)
    assert "List-Id" in message
    assert all(len(line) <= 998 for line in content.split(b"\r\n"))
    assert "Paper number 1" in plain(message)


def test_a_server_that_is_away_gets_the_letter_later(here: Context, postman: tuple[Postman, str]) -> None:
    server, url = postman
    subscribed(here)
    away = over_smtp(here, f"smtp://127.0.0.1:{free_port()}")
    assert send_due(away, now=tomorrow).failed == 1
    assert send_due(over_smtp(here, url), now=tomorrow).sent == 0  # not at once
    assert send_due(over_smtp(here, url), now=lambda: tomorrow() + timedelta(minutes=6)).sent == 1
    assert len(server.letters) == 1


def test_a_server_that_is_busy_is_asked_a_few_times_only(here: Context, postman: tuple[Postman, str]) -> None:
    server, url = postman
    server.answer = "451 try later"
    subscribed(here)
    busy, moment = over_smtp(here, url), tomorrow()
    for _ in range(queue.ATTEMPTS + 3):
        send_due(busy, now=lambda: moment)  # noqa: B023
        moment += timedelta(hours=3)
    assert "failed" in {state for _, state in states(here)}
    assert not server.letters
    server.answer = "250 ok"
    assert send_due(busy, now=lambda: moment + DAY).sent == 1  # the papers come with the next digest
    assert b"Paper number 1" in server.letters[0][2]


def test_an_address_that_refuses_for_good_is_given_up(here: Context, postman: tuple[Postman, str]) -> None:
    server, url = postman
    server.at_rcpt = "550 no such user"
    subscribed(here)
    for day in range(queue.REFUSALS + 2):
        send_due(over_smtp(here, url), now=lambda: tomorrow() + day * DAY)  # noqa: B023
    (row,) = subscriptions_in(here)
    assert (row.state, row.refusals) == ("bounced", queue.REFUSALS)
    assert len(states(here)) == queue.REFUSALS


def test_a_letter_that_may_have_gone_out_is_not_sent_again(here: Context, postman: tuple[Postman, str]) -> None:
    server, url = postman
    server.hang_up = True
    subscribed(here)
    assert send_due(over_smtp(here, url), now=tomorrow).failed == 1
    server.hang_up = False
    for hours in (1, 3, 6):
        send_due(over_smtp(here, url), now=lambda: tomorrow() + timedelta(hours=hours))  # noqa: B023
    assert states(here)[0][1] == "unknown"
    assert len(server.letters) <= 2
    assert len(server.letters) == len(states(here))


def test_each_answer_of_a_server_means_what_it_says(home: Path, postman: tuple[Postman, str]) -> None:
    server, url = postman
    mailer = SmtpMailer(Settings(smtp_url=url))
    letter = Letter("a@example.org", "Hello", "Hello.\n.\n..dots at the start of a line stay\n")
    mailer.send(letter)
    assert b"\r\n..dots at the start" in server.letters[0][2]
    server.answer = "554 spam"
    with pytest.raises(LetterRefused, match="554 spam"):
        mailer.send(letter)
    server.answer = "452 full"
    with pytest.raises(LetterDelayed, match="452 full"):
        mailer.send(letter)
    server.hang_up = True
    with pytest.raises(LetterUnclear):
        mailer.send(letter)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # nobody listens
        away = SmtpMailer(Settings(smtp_url=f"smtp://127.0.0.1:{deaf.getsockname()[1]}"))
        with pytest.raises(LetterDelayed, match="cannot be used"):
            away.send(letter)


def test_credentials_log_in_and_never_show(home: Path) -> None:
    seen = []

    def check(server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> Any:
        from aiosmtpd.smtp import AuthResult

        seen.append((data.login, data.password))
        return AuthResult(success=data.password == b"p@ss word")

    handler, port = Postman(), free_port()
    controller = Controller(
        handler, hostname="127.0.0.1", port=port, authenticator=check, auth_required=True, auth_require_tls=False
    )
    controller.start()
    try:
        letter = Letter("a@example.org", "Hello", "Hello.")
        SmtpMailer(Settings(smtp_url=f"smtp://me%40x:p%40ss%20word@127.0.0.1:{port}")).send(letter)
        assert seen[-1] == (b"me@x", b"p@ss word")
        with pytest.raises(LetterDelayed) as refused:
            SmtpMailer(Settings(smtp_url=f"smtp://me:wrong-secret@127.0.0.1:{port}")).send(letter)
    finally:
        controller.stop()
    assert "wrong-secret" not in str(refused.value)
    assert len(handler.letters) == 1


@pytest.mark.parametrize("url", ["http://x", "smtp://", "smtp://h/path", "smtp://h:0x", "smtp://u:secret@mail.example"])
def test_a_wrong_mail_server_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(UsageError, match="smtp_url") as refused:
        Server.of(url)
    assert "secret" not in str(refused.value)


# -- commands and the API ---------------------------------------------------------------------------------------------


def test_the_command_sends_what_is_due(here: Context, home: Path) -> None:
    subscribed(here)
    with here.store.writing() as connection:
        moved = {"next_due": utc_now() - timedelta(minutes=1), "hour": (utc_now().hour) % 24}
        connection.execute(table.update().values(**moved))
    settings = here.settings
    outcome = send_digests(settings)
    assert outcome.queued + outcome.sent + outcome.empty >= 1
    assert send_digests(settings).queued == 0


def test_the_service_sends_what_is_due_by_itself(site: Site, home: Path) -> None:
    subscribed(site.context)
    with site.context.store.writing() as connection:
        moved = {"next_due": utc_now() - timedelta(minutes=1), "covered_to": utc_now() - 3 * DAY}
        connection.execute(table.update().values(**moved, hour=utc_now().hour))
        earlier = schema.papers.update().where(schema.papers.c.entered.is_not(None))
        connection.execute(earlier.values(first_seen=utc_now() - timedelta(hours=2)))
    site.client.app.state.jobs.nudge("digests")  # type: ignore[attr-defined]
    end = time.monotonic() + 30
    while not letters(home):
        assert time.monotonic() < end
        time.sleep(0.05)
    (letter,) = letters(home)
    assert letter["To"] == "reader@example.org"
    assert "Paper number 1" in plain(letter)


def test_a_reader_asks_for_and_ends_digests_over_the_api(site: Site, home: Path) -> None:
    browser = site.sign_in()
    body = {"kind": "search", "value": "sparse attention", "cadence": "weekly", "timezone": "Europe/Berlin", "hour": 8}
    made = browser.client.post("/api/subscriptions", json=body)
    assert made.status_code == 202, made.text
    assert made.json()["state"] == "pending"
    assert len(letters(home)) == 1
    (listed,) = browser.client.get("/api/subscriptions").json()
    assert listed["title"] == "papers about sparse attention"
    other = site.sign_in("other@example.org")
    assert other.client.delete(f"/api/subscriptions/{listed['id']}").status_code == 404
    assert browser.client.delete(f"/api/subscriptions/{listed['id']}").status_code == 204
    assert browser.client.get("/api/subscriptions").json() == []
    assert site.client.get("/api/subscriptions").status_code == 401
    assert browser.client.post("/api/subscriptions", json=body | {"hour": 99}).json()["field"] == "hour"


def test_searches_are_saved_once_and_forgotten(site: Site) -> None:
    browser = site.sign_in()
    first = browser.client.post("/api/searches", json={"query": " sparse   attention "}).json()
    again = browser.client.post("/api/searches", json={"query": "sparse attention"}).json()
    assert first == again
    assert site.client.get(first["feeds"]["atom"].removeprefix("http://testserver")).status_code == 200
    assert [one["id"] for one in browser.client.get("/api/searches").json()] == [first["id"]]
    assert browser.client.delete(f"/api/searches/{first['id']}").status_code == 204
    assert browser.client.get("/api/searches").json() == []


def test_the_page_of_digests_lists_and_ends_them(site: Site) -> None:
    browser = site.sign_in()
    asking.subscribe(site.context, browser.reader.email, Watch("topic", "cs.CL"), "daily", "UTC", 7, browser.reader, "")
    page = browser.client.get("/subscriptions")
    assert "papers in cs.CL" in page.text
    (found,) = subscriptions_in(site.context)
    ended = browser.client.post(f"/subscriptions/{found.id}/end", follow_redirects=False)
    assert ended.status_code == 303
    assert subscriptions_in(site.context) == []
    assert site.client.get("/subscriptions?kind=search&value=x").status_code == 200


def test_an_account_takes_its_digests_along_when_it_goes(site: Site) -> None:
    browser = site.sign_in()
    subscribed(site.context, browser.reader.email, reader=browser.reader)
    accounts.delete_account(site.context.store, browser.reader.id)
    assert subscriptions_in(site.context) == []
