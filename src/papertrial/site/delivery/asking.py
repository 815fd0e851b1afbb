"""What a form or a program asks for, put into effect: the subscription and its letter."""

from papertrial.errors import PapertrialError
from papertrial.site.context import Context
from papertrial.site.delivery import digests, subscriptions
from papertrial.site.delivery.periods import Cadence
from papertrial.site.delivery.subscriptions import Watch
from papertrial.site.people.accounts import Reader


def subscribe(
    here: Context,
    email: str,
    watch: Watch,
    cadence: Cadence,
    timezone: str,
    hour: int,
    reader: Reader | None,
    network: str,
) -> None:
    """Ask for a digest, and send the letter that confirms it.

    Parameters
    ----------
    network
        Who asks, as `papertrial.site.limits.network_of` names it.

    Raises
    ------
    Problem
        As `subscriptions.ask`.
    PapertrialError
        The letter cannot be sent; the address is not kept then.
    """
    when = {"timezone": timezone, "hour": hour}
    quota = {"network": network, "letters": here.settings.letter_quota}
    asked = subscriptions.ask(here.store, email, watch, cadence, reader=reader, **when, **quota)  # type: ignore[arg-type]
    if asked is None:
        return
    subscription, token = asked
    try:
        here.mailer.send(digests.confirmation_letter(here, subscription, token))
    except (PapertrialError, OSError):
        subscriptions.end(here.store, subscription.id, subscription.nonce)
        raise
