"""The address under which readers reach the service, for commands that run beside it.

Letters hold links. A command from cron knows the database, not the options that the service was started with, so the
service notes its address there; an address that is set (``PAPERTRIAL_BASE_URL``) goes before it.
"""

from papertrial.errors import UsageError
from papertrial.feed.cursors import read_position, save_position
from papertrial.feed.store import Store
from papertrial.site.settings import Settings

_NAME = "service-address"


def note(store: Store, settings: Settings) -> None:
    """Keep the address of a service that starts."""
    known = {"base_url": settings.base_url}
    if read_position(store, _NAME) != known:
        save_position(store, _NAME, known)


def with_known_address(store: Store, settings: Settings) -> Settings:
    """Settings with the noted address, unless they were given one."""
    if "base_url" in settings.model_fields_set:
        return settings
    known = (read_position(store, _NAME) or {}).get("base_url")
    if not isinstance(known, str):
        return settings
    try:
        return Settings.model_validate(settings.model_dump(exclude_unset=True) | {"base_url": known})
    except ValueError:
        raise UsageError(f"the address {known[:80]!r} in the database is not one; set PAPERTRIAL_BASE_URL") from None
