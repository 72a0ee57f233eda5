"""Which file of the entry a figure was measured of: GGUF files have figures of their own."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("measurements", sa.Column("artifact", sa.Text()))


def downgrade() -> None:
    # The older table cannot say of which file these are: they would pass for the entry's own.
    op.execute("DELETE FROM measurements WHERE artifact LIKE '%.gguf'")
    op.drop_column("measurements", "artifact")
