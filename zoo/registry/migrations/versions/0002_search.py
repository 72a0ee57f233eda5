"""Search: a narrow table of what entries are found by, with trigrams of its text. Publications, training
curves, and imported entries, of which the origin is known and the base may not be.

`Registry.migrate` fills the table for the entries that are there already.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

PLAIN_TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "entry_index",
        sa.Column("key", sa.Integer(), nullable=False),
        sa.Column("entry_id", PLAIN_TEXT, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("family", sa.String(16), nullable=False),
        sa.Column("base", sa.Text(), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("license", sa.Text(), nullable=False),
        sa.Column("created", PLAIN_TEXT, nullable=False),
        sa.Column("sparsity", sa.Double(), nullable=False),
        sa.Column("bits_per_weight", sa.Double(), nullable=False),
        sa.Column("size", sa.BigInteger()),
        sa.Column("accuracy", sa.Double()),
        sa.Column("accuracy_delta", sa.Double()),
        sa.Column("perplexity", sa.Double()),
        sa.Column("base_perplexity", sa.Double()),
        sa.Column("speed", sa.Double()),
        sa.Column("method", sa.Text(), nullable=False),
        sa.Column("pattern", sa.Text(), nullable=False),
        sa.Column("text", PLAIN_TEXT, nullable=False),
        sa.ForeignKeyConstraint(
            ["entry_id"], ["entries.id"], name="fk_entry_index_entry_id_entries", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("key", name="pk_entry_index"),
        sa.UniqueConstraint("entry_id", name="uq_entry_index_entry_id"),
    )
    database = op.get_bind().dialect.name
    for name in ("base", "base_model"):
        op.create_index(f"ix_entry_index_{name}", "entry_index", [name])
    # Best first, who has none last, as SQLite's NULL is less than all values and PostgreSQL's is greater.
    last = " NULLS LAST" if database == "postgresql" else ""
    for name in ("created", "sparsity", "accuracy", "speed"):
        op.create_index(f"ix_entry_index_{name}", "entry_index", [sa.text(f"{name} DESC{last}"), "entry_id"])
    for name in ("perplexity", "size", "bits_per_weight"):
        op.create_index(f"ix_entry_index_{name}", "entry_index", [name, "entry_id"])
    if database == "postgresql":
        op.execute("CREATE EXTENSION IF NOT EXISTS pg_trgm")
        op.create_index(
            "ix_entry_index_text",
            "entry_index",
            ["text"],
            postgresql_using="gin",
            postgresql_ops={"text": "gin_trgm_ops"},
        )
    elif database == "sqlite":
        for statement in FULL_TEXT:
            op.execute(statement)
    op.create_table(
        "entry_speed",
        sa.Column("key", sa.Integer(), nullable=False),
        sa.Column("machine_fingerprint", sa.String(64), nullable=False),
        sa.Column("speed", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["key"], ["entry_index.key"], name="fk_entry_speed_key_entry_index", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["machine_fingerprint"],
            ["machines.fingerprint"],
            name="fk_entry_speed_machine_fingerprint_machines",
        ),
        sa.PrimaryKeyConstraint("key", "machine_fingerprint", name="pk_entry_speed"),
    )
    op.create_index("ix_entry_speed_machine", "entry_speed", ["machine_fingerprint", "key", "speed"])
    op.create_table(
        "publications",
        sa.Column("entry_id", sa.String(96), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("endpoint", sa.Text(), nullable=False),
        sa.Column("repository", sa.Text(), nullable=False),
        sa.Column("commit", sa.Text(), nullable=False),
        sa.Column("tag", sa.Text(), nullable=False),
        sa.Column("published", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["entry_id"], ["entries.id"], name="fk_publications_entry_id_entries", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("entry_id", "position", name="pk_publications"),
    )
    op.create_table(
        "training",
        sa.Column("entry_id", sa.String(96), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("loss", sa.Double(), nullable=False),
        sa.Column("learning_rate", sa.Double(), nullable=False),
        sa.Column("terms", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(
            ["entry_id"], ["entries.id"], name="fk_training_entry_id_entries", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("entry_id", "position", name="pk_training"),
    )
    with op.batch_alter_table("entries") as entries:
        entries.add_column(sa.Column("origin", sa.Text()))
        entries.alter_column("base_sha256", existing_type=sa.String(64), nullable=True)


def downgrade() -> None:
    op.drop_table("training")
    op.drop_table("publications")
    if op.get_bind().dialect.name == "sqlite":
        op.execute("DROP TABLE entry_text")
    op.drop_table("entry_speed")
    op.drop_table("entry_index")
    # The older tables cannot hold these, and SQLite's foreign keys are off while it copies tables.
    for table in ("artifacts", "benchmarks", "layers", "measurements", "stages", "verifications"):
        op.execute(
            f"DELETE FROM {table} WHERE entry_id IN (SELECT id FROM entries WHERE base_sha256 IS NULL)"
        )
    op.execute(
        "UPDATE runs SET entry_id = NULL WHERE entry_id IN (SELECT id FROM entries WHERE base_sha256 IS NULL)"
    )
    op.execute("DELETE FROM entries WHERE base_sha256 IS NULL")
    with op.batch_alter_table("entries") as entries:
        entries.alter_column("base_sha256", existing_type=sa.String(64), nullable=False)
        entries.drop_column("origin")


# SQLite's trigram index of `entry_index.text`, which it reads there and keeps up to date by triggers.
FULL_TEXT = (
    "CREATE VIRTUAL TABLE entry_text USING fts5"
    "(text, content='entry_index', content_rowid='key', tokenize='trigram')",
    "CREATE TRIGGER entry_text_insert AFTER INSERT ON entry_index BEGIN"
    " INSERT INTO entry_text (rowid, text) VALUES (new.key, new.text);"
    " END",
    "CREATE TRIGGER entry_text_delete AFTER DELETE ON entry_index BEGIN"
    " INSERT INTO entry_text (entry_text, rowid, text) VALUES ('delete', old.key, old.text);"
    " END",
    "CREATE TRIGGER entry_text_update AFTER UPDATE OF text ON entry_index BEGIN"
    " INSERT INTO entry_text (entry_text, rowid, text) VALUES ('delete', old.key, old.text);"
    " INSERT INTO entry_text (rowid, text) VALUES (new.key, new.text);"
    " END",
)
