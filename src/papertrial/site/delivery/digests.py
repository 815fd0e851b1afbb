"""Digests: what is in one, and the sending of all that are due."""

import logging
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from urllib.parse import urlencode, urlsplit
from zoneinfo import ZoneInfo

import jinja2

from papertrial.errors import PapertrialError
from papertrial.feed.store import Store, utc_now
from papertrial.site import upkeep
from papertrial.site.address import with_known_address
from papertrial.site.board import Entry
from papertrial.site.context import Context
from papertrial.site.delivery import news, queue, subscriptions
from papertrial.site.delivery.queue import Digest
from papertrial.site.delivery.smtp import LetterRefused, LetterUnclear
from papertrial.site.delivery.subscriptions import Subscription
from papertrial.site.delivery.watching import Pick, new_papers
from papertrial.site.limits import Limiter
from papertrial.site.mail import Letter
from papertrial.site.people.recommend import Recommender
from papertrial.site.settings import Settings
from papertrial.site.templating import TEMPLATES

log = logging.getLogger("papertrial.site.digests")

#: Papers, and new verdicts, that one letter shows; it says how many more there are.
SHOWN = 30
SHOWN_VERDICTS = 10


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a round of sending did, in letters; ``empty`` are digests without anything new."""

    queued: int = 0
    sent: int = 0
    empty: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Content:
    """What a digest holds: papers best first, and papers in scope whose evidence is new."""

    picks: list[Pick]
    verdicts: list[Entry]

    @property
    def total(self) -> int:
        return len(self.picks) + len(self.verdicts)


def content_of(here: Context, digest: Digest, recommender: Recommender | None = None) -> Content:
    """What came since the last digest of a subscription. The same digest always holds the same papers."""
    watch = digest.subscription.watch
    picks = new_papers(
        here, watch, digest.starts, digest.ends, user_id=digest.subscription.user_id, recommender=recommender
    )
    verdicts = []
    if watch.kind == "feed":
        verdicts = news.new_verdicts(here.store, here.board.snapshot, digest.starts, digest.ends, watch.family)
    return Content(picks, verdicts)


# -- letters ----------------------------------------------------------------------------------------------------------


def digest_letter(here: Context, digest: Digest, content: Content) -> Letter:
    """The letter of a digest, in plain text and HTML, with a link that ends it."""
    subscription, settings = digest.subscription, here.settings
    address = settings.url(f"/unsubscribe/{subscriptions.unsubscribe_token(here.key, subscription)}")
    values = {
        "subscription": subscription,
        "picks": content.picks[:SHOWN],
        "more": max(0, len(content.picks) - SHOWN),
        "more_address": settings.url(_address_of(subscription)),
        "verdicts": content.verdicts[:SHOWN_VERDICTS],
        "more_verdicts": max(0, len(content.verdicts) - SHOWN_VERDICTS),
        "unsubscribe": address,
        "manage": settings.url("/subscriptions"),
        "starts": _clock(digest.starts, subscription.timezone),
        "ends": _clock(digest.ends, subscription.timezone),
    }
    host = urlsplit(settings.base_url).hostname or "localhost"
    headers = {
        "List-Unsubscribe": f"<{address}>",
        "List-Unsubscribe-Post": "List-Unsubscribe=One-Click",
        "List-Id": f"<digest-{subscription.id}.{host}>",
        # The same for every try, so that a mail system which got it twice can tell.
        "Message-ID": f"<digest-{digest.id}.{subscription.nonce}@{host}>",
    }
    return _letter(here, subscription.email, _subject(digest, content), "digest", values, headers)


def confirmation_letter(here: Context, subscription: Subscription, token: str) -> Letter:
    """The letter that asks whether an address wants a digest."""
    values = {
        "subscription": subscription,
        "link": here.settings.url(f"/subscriptions/confirm/{token}"),
        "days": subscriptions.CONFIRM_DAYS,
    }
    subject = f"Confirm your digest from {here.settings.title}: {subscription.watch.title}"
    return _letter(here, subscription.email, subject[:150], "confirm", values, {})


def _letter(
    here: Context, to: str, subject: str, name: str, values: dict[str, object], headers: dict[str, str]
) -> Letter:
    shared = {"settings": here.settings, "subject": subject} | values
    text = _environment().get_template(f"mail/{name}.txt.j2").render(shared)
    html = _environment().get_template(f"mail/{name}.html.j2").render(shared)
    return Letter(to, subject, text, html, headers)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    """Letters have no request, and their plain parts are not escaped."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters["wrapped"] = _wrapped
    return made


def _wrapped(text: str, indent: int = 0) -> str:
    import textwrap

    margin = " " * indent
    return textwrap.fill(text, 76, initial_indent=margin, subsequent_indent=margin, break_long_words=False)


def _subject(digest: Digest, content: Content) -> str:
    count = len(content.picks)
    parts = [f"{count} new paper{'s' if count != 1 else ''}"] if count else []
    if content.verdicts:
        parts.append(f"{len(content.verdicts)} verdict{'s' if len(content.verdicts) != 1 else ''}")
    return f"{' and '.join(parts)}, {digest.period}: {digest.subscription.watch.title}"[:150]


def _clock(moment: datetime, zone: str) -> str:
    return moment.replace(tzinfo=UTC).astimezone(ZoneInfo(zone)).strftime("%A %Y-%m-%d %H:%M %Z")


def _address_of(subscription: Subscription) -> str:
    watch = subscription.watch
    if watch.kind == "search":
        return f"/search?{urlencode({'q': watch.value} | ({'family': watch.family} if watch.family else {}))}"
    return "/recommendations" if watch.kind == "tag" else "/"


# -- sending ----------------------------------------------------------------------------------------------------------


def send_due(here: Context, *, now: Callable[[], datetime] = utc_now, most: int = 10_000) -> Outcome:
    """Queue what is due, then build and send until nothing waits; any number of workers may do this at once."""
    store, holder = here.store, f"{os.getpid()}-{secrets.token_hex(8)}"
    queue.tidy(store, now())
    subscriptions.tidy(store)
    news.note_evidence(store, here.board.snapshot, now)
    queued = queue.enqueue_due(store, now())
    recommender = Recommender(store)  # knows every paper of a period that has ended, unlike one made earlier
    counts = {"sent": 0, "empty": 0, "failed": 0}
    for _ in range(most):
        digest = queue.claim(store, holder, now())
        if digest is None:
            break
        counts[_deliver(here, digest, recommender, now)] += 1
    return Outcome(queued, **counts)


def _deliver(here: Context, digest: Digest, recommender: Recommender, now: Callable[[], datetime]) -> str:
    """Build one digest and hand it over; ``sent``, ``empty`` or ``failed``."""
    try:
        content = content_of(here, digest, recommender)
        if not content.total:
            queue.empty(here.store, digest, now())
            return "empty"
        letter = digest_letter(here, digest, content)
    except Exception as error:
        # Whatever one digest stumbles over must not keep the others from going out.
        log.exception("digest %d cannot be built", digest.id)
        queue.try_later(here.store, digest, f"it could not be built: {type(error).__name__}", now())
        return "failed"
    if not queue.begin_sending(here.store, digest, content.total, now()):
        return "failed"  # ended, or taken over by another worker
    try:
        here.mailer.send(letter)
    except LetterRefused as error:
        queue.refused(here.store, digest, str(error), now())
    except LetterUnclear as error:
        log.error("digest %d: %s", digest.id, error)
        queue.unclear(here.store, digest, str(error), now())
    except (PapertrialError, OSError) as error:
        log.error("digest %d: %s", digest.id, error)
        queue.try_later(here.store, digest, str(error), now())
    else:
        queue.sent(here.store, digest, now())
        return "sent"
    return "failed"


def send_digests(settings: Settings) -> Outcome:
    """Send every digest that is due: what ``papertrial digest`` does, from cron or by hand, beside a running service.

    Raises
    ------
    PapertrialError
        The database or the home folder cannot be used, or the mail server's address is wrong.
    """
    with Store.open(settings.database) as store:
        settings = with_known_address(store, settings)
        here = Context(settings, store, Limiter(settings))
        _ = here.mailer  # a wrong address is told at once, not once a letter
        upkeep.prepare(here)
        return send_due(here)
