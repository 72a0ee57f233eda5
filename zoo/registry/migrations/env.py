"""What Alembic runs: the scripts in `versions/`, on the connection that `zoo.registry` hands over.

A change of the tables is a new script `versions/NNNN_what.py`, written by hand with
`op.batch_alter_table` (SQLite alters a table by copying it) and without importing `zoo.registry.models`,
which will have moved on; then `HEAD` in `registry.py`. The tests compare the result with the models.
"""

from alembic import context

context.configure(connection=context.config.attributes["connection"], render_as_batch=True)
context.run_migrations()
