"""Figures of an entry's own files only, and the tasks that its accuracy is over, by which a sort goes first.

`Registry.migrate` computes the figures anew for the entries that are there already.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

PLAIN_TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    _empty()
    op.drop_index("ix_entry_index_accuracy", "entry_index")
    op.add_column("entry_index", sa.Column("tasks", PLAIN_TEXT))
    op.add_column("entry_index", sa.Column("task_count", sa.Integer(), nullable=False, server_default="0"))
    op.create_index(
        "ix_entry_index_accuracy",
        "entry_index",
        [sa.text("task_count DESC"), "tasks", sa.text(f"accuracy DESC{_last()}"), "entry_id"],
    )


def downgrade() -> None:
    _empty()
    op.drop_index("ix_entry_index_accuracy", "entry_index")
    op.drop_column("entry_index", "task_count")
    op.drop_column("entry_index", "tasks")
    op.create_index(
        "ix_entry_index_accuracy", "entry_index", [sa.text(f"accuracy DESC{_last()}"), "entry_id"]
    )


def _empty() -> None:
    op.execute("DELETE FROM entry_speed")  # SQLite's foreign keys are off
    op.execute("DELETE FROM entry_index")


def _last() -> str:
    """SQLite's NULL is less than all values, PostgreSQL's is greater."""
    return " NULLS LAST" if op.get_bind().dialect.name == "postgresql" else ""
