"""Signing in over HTTP: the letter with the link, and the cookie of a session."""

from datetime import UTC, datetime

from starlette.responses import Response

from papertrial.site.context import Context
from papertrial.site.mail import Letter
from papertrial.site.people import accounts


def send_link(here: Context, email: str, network: str) -> None:
    """Send a sign-in link to an address. The answer is the same whether or not it has an account.

    Parameters
    ----------
    network
        Who asks, as `papertrial.site.limits.network_of` names it.

    Raises
    ------
    Problem
        422 for what is not an address; 429 for too many links.
    PapertrialError
        The letter cannot be sent.
    """
    settings = here.settings
    email = accounts.checked_email(email)
    made = accounts.ask_for_link(
        here.store, email, minutes=settings.link_minutes, network=network, letters=settings.letter_quota
    )
    link = settings.url(f"/sign-in/{made.token}")
    text = (
        f"Open this address to sign in to {settings.title}:\n\n{link}\n\n"
        f"It works once, within {made.minutes} minutes. If you did not ask for it, do nothing: "
        "nobody can sign in without this letter.\n"
    )
    here.mailer.send(Letter(email, f"Sign in to {settings.title}", text))


def set_session(response: Response, here: Context, session: str) -> None:
    """Give the browser its session."""
    settings = here.settings
    response.set_cookie(
        settings.cookie_name,
        session,
        max_age=settings.session_days * 86400,
        path="/",
        secure=settings.secure,
        httponly=True,
        samesite="lax",
    )


def drop_session(response: Response, here: Context) -> None:
    """Take the session's cookie away."""
    settings = here.settings
    response.delete_cookie(settings.cookie_name, path="/", secure=settings.secure, httponly=True, samesite="lax")


def iso(moment: datetime) -> str:
    """A stored time (UTC, no zone) as RFC 3339."""
    return moment.replace(tzinfo=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
