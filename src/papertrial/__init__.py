"""Papertrial: a self-hosted Daily Papers service, and a lab that puts each paper's method on trial."""

__version__ = "0.1.0"
