"""Delivery: digests, feeds and MCP; every module here with a ``router`` is part of the application."""
