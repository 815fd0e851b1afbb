"""What a form or a program asks for, put into effect: the subscription and its letter."""

from papertrial.errors import PapertrialError
from papertrial.site.context import Context
from papertrial.site.delivery import digests, subscriptions
from papertrial.site.delivery.periods import Cadence
from papertrial.site.delivery.subscriptions import Watch
from papertrial.site.people.accounts import Reader


def subscribe(
    here: Context, email: str, watch: Watch, cadence: Cadence, timezone: str, hour: int, reader: Reader | None
) -> None:
    """Ask for a digest, and send the letter that confirms it.

    Raises
    ------
    Problem
        As `subscriptions.ask`.
    PapertrialError
        The letter cannot be sent; the address is not kept then.
    """
    asked = subscriptions.ask(here.store, email, watch, cadence, timezone=timezone, hour=hour, reader=reader)
    if asked is None:
        return
    subscription, token = asked
    try:
        here.mailer.send(digests.confirmation_letter(here, subscription, token))
    except (PapertrialError, OSError):
        subscriptions.end(here.store, subscription.id, subscription.nonce)
        raise
