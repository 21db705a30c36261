"""What Alembic runs for each command: the revisions, on the open transaction that `engine` hands over.

There is no offline mode and no alembic.ini: a tracker is migrated by opening it.
"""

from __future__ import annotations

from alembic import context

from midiscover.tracking.tables import metadata

# transactional_ddl: SQLite can roll DDL back, but Alembic takes it for a database that can't.
context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
