"""Columns for what SAEs are compared by: output hook, control, the sparsity setting for people, the L0 steered to.

What is there already is of the first release, which had one l1 or k for each SAE, no control and no transcoder.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

NEW = {"output_hook": sa.Text, "control": sa.Text, "sparsity": sa.Text, "target_l0": lambda: sa.Float(53)}

# Only the columns that this revision reads and writes, as they are now: the code's own table goes on changing.
saes = sa.table(
    "saes",
    *(sa.column(name, sa.Text) for name in ("id", "hook", "output_hook", "control", "sparsity")),
    sa.column("l1", sa.Float(53)),
    sa.column("k", sa.Integer),
)


def upgrade() -> None:
    """Add the columns, and fill them for SAEs whose settings are known."""
    for name, kind in NEW.items():
        op.add_column("saes", sa.Column(name, kind()))
    connection = op.get_bind()
    for row in connection.execute(sa.select(saes).where(saes.c.hook.is_not(None))).mappings().all():
        setting = next((f"{name} {row[name]:g}" for name in ("k", "l1") if row[name] is not None), None)
        change = {"output_hook": row["hook"], "control": "none", "sparsity": setting}
        connection.execute(sa.update(saes).where(saes.c.id == row["id"]).values(change))


def downgrade() -> None:
    """Drop the columns, one by one: on SQLite, Alembic's batch mode would drop the table, and with it its children."""
    for name in NEW:
        op.drop_column("saes", name)
