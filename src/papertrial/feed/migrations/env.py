"""Runs the migrations on the connection that `papertrial.feed.database` hands over, in its transaction."""

from alembic import context

from papertrial.feed.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
context.run_migrations()
