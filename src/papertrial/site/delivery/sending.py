"""The job that sends digests while the service runs; ``papertrial digest`` does the same from cron."""

from papertrial.site.background import Job
from papertrial.site.context import Context
from papertrial.site.delivery.digests import send_due


def jobs(here: Context) -> list[Job]:
    """Digests at most a minute after they are due."""
    return [Job("digests", 60.0, lambda: send_due(here), apart=True, after=2.0)]
