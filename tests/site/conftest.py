"""The fixtures of `site_service`, for every test of the service."""

from site_service import home, make_site, postgresql_site, prepared, prepared_postgresql, site  # noqa: F401
