"""PostgreSQL: an index of what filters look at, a third as wide as the rows, which is read in their place.

Families come first: a filter by them reads its part only. Nothing for SQLite, whose planner would not use it.
"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

READ = ["key", "entry_id", "status", "license", "method", "pattern", "sparsity", "bits_per_weight", "size"]


def upgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.create_index("ix_entry_index_filters", "entry_index", ["family"], postgresql_include=READ)


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        op.drop_index("ix_entry_index_filters", "entry_index")
