"""The fixtures of `site_service`, for every test of the service."""

from site_service import home, make_site, site  # noqa: F401
