"""The fixtures of `site_service` and `site_browser`, for every test of the service."""

from site_browser import chromium, playwright_driver, reading, served  # noqa: F401
from site_service import home, make_site, postgresql_site, prepared, prepared_postgresql, site  # noqa: F401
