"""The first schema: entries and all that is known of them, machines, runs."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "entries",
        sa.Column("id", sa.String(96), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("failure", sa.Text()),
        sa.Column("family", sa.String(16), nullable=False),
        sa.Column("base_model", sa.Text(), nullable=False),
        sa.Column("base_repository", sa.Text()),
        sa.Column("base_revision", sa.Text(), nullable=False),
        sa.Column("base_sha256", sa.String(64), nullable=False),
        sa.Column("license", sa.Text()),
        sa.Column("recipe", sa.Text(), nullable=False),
        sa.Column("recipe_sha256", sa.String(64), nullable=False),
        sa.Column("created", sa.Text(), nullable=False),
        sa.Column("parameters", sa.BigInteger(), nullable=False),
        sa.Column("sparsity", sa.Double(), nullable=False),
        sa.Column("bits_per_weight", sa.Double(), nullable=False),
        sa.Column("compression_ratio", sa.Double(), nullable=False),
        sa.Column("versions", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_entries"),
    )
    op.create_index("ix_entries_base_sha256", "entries", ["base_sha256"])
    op.create_index("ix_entries_family", "entries", ["family"])
    op.create_index("ix_entries_recipe_sha256", "entries", ["recipe_sha256"])
    op.create_index("ix_entries_status", "entries", ["status"])
    op.create_table(
        "machines",
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("cpu", sa.Text(), nullable=False),
        sa.Column("cores", sa.BigInteger(), nullable=False),
        sa.Column("threads_per_core", sa.BigInteger(), nullable=False),
        sa.Column("isa", sa.JSON(), nullable=False),
        sa.Column("memory_bytes", sa.BigInteger(), nullable=False),
        sa.Column("system", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("fingerprint", name="pk_machines"),
    )
    op.create_table(
        "artifacts",
        sa.Column("entry_id", sa.String(96), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("format", sa.Text()),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.ForeignKeyConstraint(
            ["entry_id"],
            ["entries.id"],
            name="fk_artifacts_entry_id_entries",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("entry_id", "position", name="pk_artifacts"),
    )
    op.create_index("ix_artifacts_sha256", "artifacts", ["sha256"])
    op.create_table(
        "benchmarks",
        sa.Column("entry_id", sa.String(96), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("runner", sa.Text(), nullable=False),
        sa.Column("runner_version", sa.Text(), nullable=False),
        sa.Column("artifact", sa.Text(), nullable=False),
        sa.Column("threads", sa.BigInteger(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("generated_tokens", sa.BigInteger(), nullable=False),
        sa.Column("repeats", sa.BigInteger(), nullable=False),
        sa.Column("prefill_tokens_per_s", sa.Double(), nullable=False),
        sa.Column("decode_tokens_per_s", sa.Double(), nullable=False),
        sa.Column("load_s", sa.Double(), nullable=False),
        sa.Column("peak_memory_bytes", sa.BigInteger(), nullable=False),
        sa.Column("machine_fingerprint", sa.String(64), nullable=False),
        sa.ForeignKeyConstraint(
            ["entry_id"],
            ["entries.id"],
            name="fk_benchmarks_entry_id_entries",
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["machine_fingerprint"],
            ["machines.fingerprint"],
            name="fk_benchmarks_machine_fingerprint_machines",
        ),
        sa.PrimaryKeyConstraint("entry_id", "position", name="pk_benchmarks"),
    )
    op.create_index("ix_benchmarks_machine_fingerprint", "benchmarks", ["machine_fingerprint"])
    op.create_table(
        "layers",
        sa.Column("entry_id", sa.String(96), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.Column("columns", sa.BigInteger(), nullable=False),
        sa.Column("sparsity", sa.Double(), nullable=False),
        sa.Column("pattern", sa.Text()),
        sa.Column("window", sa.BigInteger()),
        sa.Column("bits", sa.Double(), nullable=False),
        sa.Column("group", sa.BigInteger()),
        sa.Column("symmetric", sa.Boolean()),
        sa.Column("zero_point", sa.Text()),
        sa.Column("method", sa.Text()),
        sa.Column("error", sa.Double()),
        sa.ForeignKeyConstraint(
            ["entry_id"],
            ["entries.id"],
            name="fk_layers_entry_id_entries",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("entry_id", "position", name="pk_layers"),
    )
    op.create_table(
        "measurements",
        sa.Column("entry_id", sa.String(96), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("metric", sa.Text(), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("stderr", sa.Double()),
        sa.Column("unit", sa.Text(), nullable=False),
        sa.Column("direction", sa.Text(), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("task_version", sa.Text()),
        sa.Column("data_revision", sa.Text()),
        sa.Column("context_length", sa.BigInteger()),
        sa.Column("stride", sa.BigInteger()),
        sa.Column("samples", sa.BigInteger(), nullable=False),
        sa.Column("sample_unit", sa.Text(), nullable=False),
        sa.Column("few_shot", sa.BigInteger()),
        sa.Column("limit", sa.BigInteger()),
        sa.Column("harness", sa.Text(), nullable=False),
        sa.Column("dtype", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["entry_id"],
            ["entries.id"],
            name="fk_measurements_entry_id_entries",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("entry_id", "position", name="pk_measurements"),
    )
    op.create_table(
        "runs",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("recipe_name", sa.Text(), nullable=False),
        sa.Column("recipe_sha256", sa.String(64), nullable=False),
        sa.Column("pid", sa.BigInteger(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("started", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished", sa.DateTime(timezone=True)),
        sa.Column("entry_id", sa.String(96)),
        sa.Column("failure", sa.Text()),
        sa.ForeignKeyConstraint(
            ["entry_id"],
            ["entries.id"],
            name="fk_runs_entry_id_entries",
            ondelete="SET NULL",
        ),
        sa.PrimaryKeyConstraint("id", name="pk_runs"),
    )
    op.create_index("ix_runs_entry_id", "runs", ["entry_id"])
    op.create_index("ix_runs_recipe_sha256", "runs", ["recipe_sha256"])
    op.create_index("ix_runs_status", "runs", ["status"])
    op.create_table(
        "stages",
        sa.Column("entry_id", sa.String(96), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.ForeignKeyConstraint(
            ["entry_id"],
            ["entries.id"],
            name="fk_stages_entry_id_entries",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("entry_id", "position", name="pk_stages"),
    )
    op.create_table(
        "verifications",
        sa.Column("entry_id", sa.String(96), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("runner", sa.Text(), nullable=False),
        sa.Column("runner_version", sa.Text(), nullable=False),
        sa.Column("artifact", sa.Text(), nullable=False),
        sa.Column("passed", sa.Boolean(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("top1_agreement", sa.Double()),
        sa.Column("kl_divergence", sa.Double()),
        sa.Column("min_top1_agreement", sa.Double()),
        sa.Column("max_kl_divergence", sa.Double()),
        sa.Column("positions", sa.BigInteger(), nullable=False),
        sa.Column("sample", sa.Text()),
        sa.ForeignKeyConstraint(
            ["entry_id"],
            ["entries.id"],
            name="fk_verifications_entry_id_entries",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("entry_id", "position", name="pk_verifications"),
    )
    op.create_table(
        "run_stages",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("reason", sa.Text()),
        sa.ForeignKeyConstraint(
            ["run_id"],
            ["runs.id"],
            name="fk_run_stages_run_id_runs",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("run_id", "position", name="pk_run_stages"),
    )


def downgrade() -> None:
    op.drop_table("run_stages")
    op.drop_table("verifications")
    op.drop_table("stages")
    op.drop_table("runs")
    op.drop_table("measurements")
    op.drop_table("layers")
    op.drop_table("benchmarks")
    op.drop_table("artifacts")
    op.drop_table("machines")
    op.drop_table("entries")
